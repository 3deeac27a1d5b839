"""Which layout a checkpoint is in, told by its names alone, before any tensor is read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch

from edgecomp.checkpoint import Stored, count_tensors
from edgecomp.compressors import compressor_class
from edgecomp.compressors._base import Compressor
from edgecomp.compressors._checkpoint import METHOD, Saved, saved_of
from edgecomp.errors import EdgecompError, WeightsError
from edgecomp.specs import Recipe, load_recipe, method_names
from edgecomp.specs.layout import (
    Layout,
    Match,
    best_match,
    closest_by_words,
    larger_form,
    match_layout,
    name_groups,
    number_keys,
)

__all__ = ["OWN", "fitting", "fitting_own", "own_layout", "recognise", "require_whole", "tell"]

OWN = "edgecomp"


def recognise(recipe: Recipe, cls: type[Compressor], stored: Stored) -> Match | None:
    """Return how a checkpoint answers to a layout of the method's originals.

    Returns:
        None: to edgecomp's own layout, or to one that the recipe does not declare and the class itself may know.

    Raises:
        WeightsError: it is in none, or another method's; the text names the nearest layout and what differs.
    """
    saved = stored.metadata.get(METHOD, "")
    if saved and saved != recipe.method:
        raise WeightsError(
            f"weights file {stored.located.path} was saved by edgecomp for the method {saved}, and this is "
            f"{recipe.method}; give --method {saved}, or other weights"
        )
    names = stored.names
    match = best_match(names, recipe.layouts)
    if match is not None and match.fits:
        require_whole(match, recipe, stored)
        return match
    if saved or cls.takes_inner_layouts:
        return None
    own = own_layout(recipe, cls)
    if own is not None and set(number_keys(names)) & {*own.keys, *own.optional}:
        return None
    others = [name for name, _ in fitting(stored) if name != recipe.method]
    if others or (own is not None and recipe.layouts):
        raise WeightsError(_none_fits(recipe, stored, match, others))
    return None


def require_whole(match: Match, recipe: Recipe, stored: Stored) -> None:
    """Refuse a file that holds a layout twice, a larger form of it in part, or what it does not know."""
    _require_one(match, recipe, stored)
    larger = larger_form(stored.names, match, recipe.layouts)
    if larger is not None:
        lacking = [larger.prefix + key for key in larger.missing]
        told = f"{', '.join(lacking[:5])}{', ...' if len(lacking) > 5 else ''}"
        raise WeightsError(
            f"weights file {stored.located.path} holds the layout {match.layout.name} of {recipe.method} in part: "
            f"{len(lacking)} missing: {told}. Give the whole checkpoint, or save what is below {match.prefix!r} in a "
            "file of its own"
        )
    _require_known(match, recipe, stored)


def _require_one(match: Match, recipe: Recipe, stored: Stored) -> None:
    """Refuse a model that holds the layout twice."""
    same = [layout for layout in recipe.layouts if layout.name == match.layout.name]
    twice = [other for other in _matches(stored.names, same) if other.fits and other.prefix != match.prefix]
    apart: list[Match] = []  # the larger first, and no other form of what is in one of these
    for other in sorted(twice, key=lambda one: -len(one.names)):
        if not any(_nested(other, one) for one in (match, *apart)):
            apart.append(other)
    if apart:
        raise WeightsError(
            f"weights file {stored.located.path} holds the layout {match.layout.name} {1 + len(apart)} times, below "
            f"{match.prefix!r} and {apart[0].prefix!r}; save the one that is meant in a file of its own"
        )


def _require_known(match: Match, recipe: Recipe, stored: Stored) -> None:
    """Refuse what stands among the layout's own keys, and which it does not know."""
    strange = [
        key for key in match.unknown if not any(fnmatchcase(key.removeprefix(match.prefix), p) for p in recipe.unread)
    ]
    if strange:
        below = f" below {match.prefix!r}" if match.prefix else ""
        told = f"{', '.join(strange[:5])}{', ...' if len(strange) > 5 else ''}"
        raise WeightsError(
            f"weights file {stored.located.path} is in the layout {match.layout.name} of {recipe.method}{below}, with "
            f"{len(strange)} not known: {told}. Leave them out of the file, or give another"
        )


def _nested(one: Match, other: Match) -> bool:
    """Say whether two matches are forms of one, as a layout with and without what stands around it."""
    return bool(set(one.names.values()) & set(other.names.values()))


def _matches(names: Sequence[str], layouts: Sequence[Layout]) -> Iterator[Match]:
    for layout in layouts:
        yield from match_layout(names, layout)


def _none_fits(recipe: Recipe, stored: Stored, nearest: Match | None, others: Sequence[str]) -> str:
    known = ", ".join(dict.fromkeys([*(layout.name for layout in recipe.layouts), OWN]))
    text = f"weights file {stored.located.path} is in none of the layouts of {recipe.method} ({known})"
    if nearest is not None and 2 * len(nearest.missing) <= nearest.required:
        below = f" below {nearest.prefix!r}" if nearest.prefix else ""
        text += f"; the nearest is {nearest.layout.name}{below}, with {nearest.differences()}"
    elif recipe.layouts:
        layout = closest_by_words(stored.names, recipe.layouts)
        text += f"; the nearest is {layout.name}, which needs {', '.join(layout.keys[:3])}"
    if others:
        text += f". It is a checkpoint of {' or '.join(others)}: give --method {others[0]}"
    else:
        text += ". Convert it to one of these"
    return f"{text}; first keys of {len(stored.names)}: {', '.join(stored.names[:5])}"


def fitting(stored: Stored) -> list[tuple[str, Match]]:
    """Return the methods whose originals' layouts a checkpoint fits, the closest first."""
    found = []
    for name in method_names():
        match = best_match(stored.names, load_recipe(name).layouts)
        if match is not None and match.fits:
            found.append((name, match))
    return sorted(found, key=lambda item: (len(item[1].unknown), -len(item[1].names)))


def own_layout(recipe: Recipe, cls: type[Compressor]) -> Layout | None:
    """Return edgecomp's own keys, as the presets of the tests show them; None where only a host would tell them."""
    seen: list[set[str]] = []
    for name in recipe.smoke_presets:
        preset = recipe.preset(name)
        if preset.placement == "inside":
            return None
        try:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = cls.from_recipe(recipe, recipe.rule(name).default[0], preset=name)
        except EdgecompError:  # a preset that only a host completes
            continue
        seen.append(set(number_keys(made.state_dict())))
    if not seen or not any(seen):
        return None
    always = set.intersection(*seen)
    keys = sorted(always) or sorted(set.union(*seen))
    return Layout(OWN, tuple(keys), tuple(sorted(set.union(*seen) - always)))


def _layout_as_saved(recipe: Recipe, cls: type[Compressor], saved: Saved) -> Layout | None:
    """Return the keys of the very module that a file says it was saved from; None where it cannot be made again."""
    try:
        preset = recipe.preset(saved.preset or recipe.defaults.preset)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kept = saved.tokens_out or recipe.rule(saved.preset or recipe.defaults.preset).default[0]
            made = cls.from_recipe(
                recipe, kept, preset=saved.preset, image_size=saved.image_size, **{**preset.params, **saved.params}
            )
    except (EdgecompError, TypeError):  # parameters of another release, or of nobody
        return None
    keys = tuple(number_keys(made.state_dict()))
    return Layout(OWN, keys) if keys else None


def fitting_own(stored: Stored) -> list[tuple[str, Match]]:
    """Return the methods whose own keys, as edgecomp names them, a checkpoint fits: by what it says, or by its keys."""
    saved = stored.metadata.get(METHOD, "")
    found = []
    for name in [saved] if saved in method_names() else method_names():
        recipe = load_recipe(name)
        own = own_layout(recipe, compressor_class(name))
        match = best_match(stored.names, [own]) if own is not None else None
        if saved and (match is None or not match.fits):
            own = _layout_as_saved(recipe, compressor_class(name), saved_of(stored))
            match = best_match(stored.names, [own]) if own is not None else match
        if match is not None and match.prefix in ("", "compressor.") and match.fits and (saved or not match.unknown):
            found.append((name, match))
    return found


def tell(match: Match, method: str) -> str:
    """Return the sentence that says what was recognised, and what was left out."""
    below = f", below {match.prefix!r}" if match.prefix else ""
    text = f"weights in the layout {match.layout.name} of {method}{below}: {count_tensors(len(match.names))}"
    if match.foreign:
        text += (
            f" of {len(match.names) + len(match.foreign)}; left out as of another model: {name_groups(match.foreign)}"
        )
    return text
