"""Checkpoint layouts: how the keys of a file tell which original it is of, and which keys are another model's.

The rule: the keys of a layout stand under one prefix, whatever it is (`resampler.`, `model.connector.`, or none). What
stands elsewhere belongs to the rest of a whole model and is left out, and counted. Under the prefix every key must be
known, but for those that the layout itself calls foreign.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Annotated

import msgspec
from msgspec import Meta

__all__ = [
    "Layout",
    "Match",
    "best_match",
    "closest_by_words",
    "expand_alternatives",
    "larger_form",
    "match_layout",
    "name_groups",
    "number_keys",
]

_PLACE = r"^([^/()\s]+|1/[^/()\s]+|\([^/()\s]+/[^/()\s]+\)\^2)$"
Patterns = tuple[Annotated[str, Meta(pattern=r"^\S+$")], ...]


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How an original names its tensors.

    Patterns are keys without the prefix of a whole model. `*` stands for a number, `{a,b}` for either, and `**` at the
    end for all that follows.

    Attributes:
        name: as `Compressor.layout_of` and presets call it; several layouts may be forms of one name.
        keys: what each checkpoint in it holds, at least once.
        optional: what some hold.
        foreign: what stands under the same prefix in a whole model and belongs to another part of it.
        config: parameters that no tensor stores -> the places where an original's config.json has them, of which the
            first that is there counts: a dotted key, `1/key` for its inverse, or `(key/key)^2` for the tokens of a
            square.
        fixed: keys of that file -> the only value that the method computes with.
    """

    name: Annotated[str, Meta(min_length=2)]
    keys: Annotated[Patterns, Meta(min_length=1)]
    optional: Patterns = ()
    foreign: Patterns = ()
    config: dict[str, tuple[Annotated[str, Meta(pattern=_PLACE)], ...]] = {}
    fixed: dict[str, str | float] = {}


class Match(msgspec.Struct, frozen=True):
    """How the keys of a file answer to a layout.

    Attributes:
        prefix: in front of all keys of the layout; "" for none.
        names: key without prefix -> key in the file, of the tensors to read.
        missing: patterns of the layout that no key answers to.
        unknown: keys of `names` that the layout does not know.
        foreign: keys of the file that are left out.
        required: how many patterns the layout has that every checkpoint in it answers to.
    """

    layout: Layout
    prefix: str
    names: dict[str, str]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    foreign: tuple[str, ...]
    required: int

    @property
    def fits(self) -> bool:
        """Whether the file holds all that the layout needs."""
        return not self.missing

    @property
    def share(self) -> float:
        """How much of the layout is there, 0 to 1; keys that it does not know count against it."""
        held = self.required - len(self.missing)
        return held / self.required * (1 - len(self.unknown) / max(1, len(self.names)) / 2)

    @property
    def needed(self) -> tuple[str, ...]:
        """The file's keys that answer to what every checkpoint in the layout holds."""
        known = _Known(_expand_all(self.layout.keys))
        return tuple(key for name, key in self.names.items() if known.has(tuple(name.split("."))))

    def differences(self, count: int = 3) -> str:
        """Return what the file lacks and has too much, the first of each."""
        parts = []
        for what, keys in (("missing", [self.prefix + key for key in self.missing]), ("not known", self.unknown)):
            if keys:
                more = ", ..." if len(keys) > count else ""
                parts.append(f"{len(keys)} {what}: {', '.join(keys[:count])}{more}")
        return "; ".join(parts)


def best_match(keys: Sequence[str], layouts: Iterable[Layout]) -> Match | None:
    """Return the layout that fits best: one that lacks nothing before others; None where not one key answers.

    Of forms of one layout, one of which is a part of the other, the larger is it, whatever stands among its keys: a
    stranger there is to be refused, and not to be left out together with what only the larger form reads.
    """
    found = [match for layout in layouts for match in match_layout(keys, layout)]
    best = max(found, key=_rank, default=None)
    if best is None or not best.fits:
        return best
    needed = set(best.needed)
    forms = [match for match in found if match.fits and match.layout.name == best.layout.name]
    return max((form for form in forms if needed < set(form.needed)), key=_rank, default=best)


def _rank(match: Match) -> tuple[bool, int, float]:
    """Of those that fit, the one with the fewest strange keys, then with the most keys; of others the most complete."""
    return match.fits, (-len(match.unknown) if match.fits else 0), (len(match.names) if match.fits else match.share)


def larger_form(keys: Sequence[str], match: Match, layouts: Iterable[Layout]) -> Match | None:
    """Return the form of the same layout that a file holds in part: it needs keys that are foreign to `match`."""
    left_out, taken = set(match.foreign), set(match.names.values())
    for layout in layouts:
        if layout.name != match.layout.name or layout == match.layout:
            continue
        for other in match_layout(keys, layout):
            held = set(other.needed)
            if not other.fits and held & left_out and held & taken:
                return other
    return None


def closest_by_words(keys: Sequence[str], layouts: Sequence[Layout]) -> Layout:
    """Return the layout of whose patterns the most end as a key does, where hardly one answers as a whole."""
    last = {key.rpartition(".")[2] for key in keys}

    def share(layout: Layout) -> float:
        patterns = _expand_all(layout.keys)
        return sum(pattern[-1] in last for pattern in patterns) / len(patterns)

    return max(layouts, key=share)


def match_layout(keys: Sequence[str], layout: Layout) -> list[Match]:
    """Return how keys answer to a layout, below each prefix that lacks the least of it (two: it is there twice)."""
    required, optional, foreign = (_expand_all(part) for part in (layout.keys, layout.optional, layout.foreign))
    held: dict[str, set[tuple[str, ...]]] = {}
    parts = {key: tuple(key.split(".")) for key in keys}
    by_end: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for pattern in required:
        by_end.setdefault(pattern[-2:], []).append(pattern)
    for words in parts.values():
        for pattern in (found for end in _ends(words[-2:]) for found in by_end.get(end, ())):
            if len(words) >= len(pattern) and _answers(words[len(words) - len(pattern) :], pattern):
                prefix = ".".join(words[: len(words) - len(pattern)])
                held.setdefault(f"{prefix}." if prefix else "", set()).add(pattern)
    if not held:
        return []
    most = max(map(len, held.values()))
    patterns = _Known((*required, *optional)), _Known(foreign)
    return [
        _match_under(prefix, parts, layout, required, found, *patterns)
        for prefix, found in held.items()
        if len(found) == most
    ]


@lru_cache(maxsize=4096)
def _ends(words: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Return the last two words, and the last, of the patterns that a key with these last two may answer to."""
    last = (words[-1], "*") if words[-1].isdigit() else (words[-1],)
    before = (words[-2], "*") if len(words) > 1 and words[-2].isdigit() else words[-2:-1]
    return (*((word,) for word in last), *((one, word) for one in before for word in last))


def _match_under(
    prefix: str,
    parts: Mapping[str, tuple[str, ...]],
    layout: Layout,
    required: Sequence[tuple[str, ...]],
    found: Collection[tuple[str, ...]],
    known: _Known,
    other: _Known,
) -> Match:
    depth = prefix.count(".")
    names, unknown, foreign = {}, [], []
    for key, words in parts.items():
        below = words[depth:]
        if not key.startswith(prefix) or not below:
            foreign.append(key)
        elif known.has(below):
            names[key.removeprefix(prefix)] = key
        elif other.has(below):
            foreign.append(key)
        else:
            names[key.removeprefix(prefix)] = key
            unknown.append(key)
    missing = tuple(".".join(pattern) for pattern in required if pattern not in found)
    return Match(layout, prefix, names, missing, tuple(unknown), tuple(foreign), len(required))


class _Known:
    """A set of patterns, found by their first and last words."""

    def __init__(self, patterns: Iterable[tuple[str, ...]]) -> None:
        self._whole: dict[tuple[int, str], list[tuple[str, ...]]] = {}
        self._open: list[tuple[str, ...]] = []
        for pattern in patterns:
            if pattern[-1] == "**":
                self._open.append(pattern[:-1])
            else:
                self._whole.setdefault((len(pattern), pattern[-1]), []).append(pattern)

    def has(self, words: tuple[str, ...]) -> bool:
        """Say whether a pattern takes the key."""
        ends = (words[-1], "*") if words[-1].isdigit() else (words[-1],)
        whole = (p for end in ends for p in self._whole.get((len(words), end), ()))
        return any(_answers(words, pattern) for pattern in whole) or any(
            len(words) > len(pattern) and _answers(words[: len(pattern)], pattern) for pattern in self._open
        )


def _answers(words: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    return all(
        want in (word, "*") and (want != "*" or word.isdigit()) for word, want in zip(words, pattern, strict=True)
    )


def _expand_all(patterns: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [tuple(text.split(".")) for pattern in patterns for text in expand_alternatives(pattern)]


@lru_cache(maxsize=4096)
def expand_alternatives(pattern: str) -> tuple[str, ...]:
    """Write out the alternatives: `a.{b,c}` is `a.b` and `a.c`."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return (pattern,)
    before, after = pattern[: found.start()], pattern[found.end() :]
    return tuple(text for part in found[1].split(",") for text in expand_alternatives(f"{before}{part}{after}"))


def number_keys(keys: Iterable[str]) -> dict[str, int]:
    """Return keys with `*` for each number, and how often each occurs."""
    return dict(Counter(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", key) for key in keys))


def name_groups(keys: Iterable[str], *, count: int = 4) -> str:
    """Return whose keys these are by their first words, the largest groups first: `llm 338, vpm 437`."""
    groups = Counter(_group(key) for key in keys).most_common()
    told = ", ".join(f"{name} {number}" for name, number in groups[:count])
    return told + (f", {len(groups) - count} more" if len(groups) > count else "")


def _group(key: str) -> str:
    words = key.split(".")
    return ".".join(words[:2]) if words[0] in ("model", "module", "transformer") and len(words) > 2 else words[0]
