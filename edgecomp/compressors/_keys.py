"""How an original names a module's tensors: one table for each layout, read in both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from edgecomp.errors import InvalidSpec
from edgecomp.specs.layout import expand_alternatives

__all__ = ["COLUMNS", "CONV_1X1", "SAME", "TRANSPOSED", "Form", "KeyMap", "leading_axis"]

Names = str | tuple[str, ...]


def _same(tensor: Tensor) -> Tensor:
    return tensor


class Form(NamedTuple):
    """How values lie in the original, where not as in the module.

    Attributes:
        read, write: of a tensor of the original, and of the module.
        axis: along which tensors lie that are one tensor on the other side.
    """

    read: Callable[[Tensor], Tensor] = _same
    write: Callable[[Tensor], Tensor] = _same
    axis: int = 0


SAME = Form()
COLUMNS = Form(axis=1)
TRANSPOSED = Form(lambda tensor: tensor.T, lambda tensor: tensor.T)
#: A linear layer that is a 1x1 convolution in the original.
CONV_1X1 = Form(
    lambda tensor: tensor[:, :, 0, 0] if tensor.ndim == 4 and tensor.shape[2:] == (1, 1) else tensor,
    lambda tensor: tensor[:, :, None, None],
)


def leading_axis(ndim: int) -> Form:
    """Return the form of tensors that have `ndim` axes in the original, the first of size one, and one less here."""
    return Form(
        lambda tensor: tensor[0] if tensor.ndim == ndim and tensor.shape[0] == 1 else tensor,
        lambda tensor: tensor.unsqueeze(0),
    )


class KeyMap:
    """A layout's names and the module's own, side by side.

    Args:
        rules: (theirs, own) or (theirs, own, form). In a name `*` is a number, `2*` twice and `1+*` one more than that
            number on the other side, `**` at the end all that follows, and `{a,b}`, which stands on both sides, is two
            rules. Several names on one side lie behind each other in the one tensor of the other side. Of rules that
            fit a name the first holds. Another map stands for all its rules.
    """

    def __init__(self, *rules: KeyMap | tuple[Names, Names] | tuple[Names, Names, Form]) -> None:
        self._reading: list[_Step] = []
        self._writing: list[_Step] = []
        for rule in rules:
            if isinstance(rule, KeyMap):
                self._reading += rule._reading
                self._writing += rule._writing
                continue
            theirs, own, *more = rule
            form: Form = more[0] if more else SAME
            for one, other in zip(_write_out(theirs), _write_out(own), strict=True):
                self._reading.append(_Step(one, other, form.read, _same, form.axis))
                self._writing.append(_Step(other, one, _same, form.write, form.axis))

    def knows(self, name: str) -> bool:
        """Say whether a rule takes a name of the original."""
        return _find(name, self._reading) is not None

    def read(self, state: Mapping[str, Tensor], part: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return an original's tensors by the module's names, and what the file calls each.

        What no rule names keeps its name, so that whoever loads it can refuse it.

        Args:
            state: the file's tensors.
            part: name without a whole model's prefix -> name in the file, of those to read.
        """
        own, sources, _ = _convert({short: state[key] for short, key in part.items()}, self._reading)
        return own, {name: " with ".join(part[short] for short in shorts) for name, shorts in sources.items()}

    def write(self, state: Mapping[str, Tensor], *, method: str, layout: str) -> dict[str, Tensor]:
        """Return a module's tensors by the original's names.

        Raises:
            InvalidSpec: the layout has no name for one of them.
        """
        theirs, _, left = _convert(state, self._writing)
        if left:
            more = ", ..." if len(left) > 3 else ""
            raise InvalidSpec(
                f"{method}: the layout {layout!r} has no name for {len(left)} of {len(state)} tensors: "
                f"{', '.join(left[:3])}{more}; leave layout out, which saves all in edgecomp's own"
            )
        return {key: tensor.detach() for key, tensor in theirs.items()}


class _Pattern:
    """A name with numbers and an open end."""

    def __init__(self, text: str) -> None:
        body, self._is_open = text.removesuffix("**"), text.endswith("**")
        self._words, self._rules = [], []
        for index, part in enumerate(re.split(r"((?:\d+\+|\d+)?\*)", body)):
            if index % 2 == 0:
                self._words.append(part)
            else:
                given = part.removesuffix("*")
                self._rules.append((1, int(given[:-1])) if given.endswith("+") else (int(given or 1), 0))
        tail = "(.+)" if self._is_open else ""
        self._regex = re.compile(r"(\d+)".join(map(re.escape, self._words)) + tail)

    def match(self, name: str) -> tuple[tuple[int, ...], str] | None:
        """Return the numbers in a name, and its end; None where it is another."""
        found = self._regex.fullmatch(name)
        if found is None:
            return None
        numbers = []
        for (factor, offset), text in zip(self._rules, found.groups(), strict=False):
            number, rest = divmod(int(text) - offset, factor)
            if rest or number < 0:
                return None
            numbers.append(number)
        return tuple(numbers), found.groups()[-1] if self._is_open else ""

    def fill(self, numbers: Sequence[int], end: str) -> str:
        """Return the name with these numbers and this end."""
        told = [str(number * factor + offset) for number, (factor, offset) in zip(numbers, self._rules, strict=True)]
        return "".join(part for pair in zip(self._words, [*told, end], strict=True) for part in pair)


class _Step(NamedTuple):
    """One rule in one direction."""

    sources: tuple[_Pattern, ...]
    targets: tuple[_Pattern, ...]
    before: Callable[[Tensor], Tensor]
    behind: Callable[[Tensor], Tensor]
    axis: int


def _write_out(names: Names) -> list[tuple[_Pattern, ...]]:
    """Return the patterns of a rule's side, once for each alternative."""
    sides = [expand_alternatives(name) for name in ((names,) if isinstance(names, str) else names)]
    return [tuple(map(_Pattern, side)) for side in zip(*sides, strict=True)]


def _convert(
    tensors: Mapping[str, Tensor], steps: Sequence[_Step]
) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]], list[str]]:
    """Return tensors by their new names, the old names that each comes of, and the old names that no step takes."""
    groups: dict[tuple[int, tuple[int, ...], str], dict[int, str]] = {}
    left = []
    for name in tensors:
        found = _find(name, steps)
        if found is None:
            left.append(name)
        else:
            number, place, values, end = found
            groups.setdefault((number, values, end), {})[place] = name
    made: dict[str, Tensor] = {}
    sources: dict[str, tuple[str, ...]] = {}
    for (number, values, end), names in groups.items():
        step = steps[number]
        given = tuple(names[place] for place in sorted(names))
        parts = [step.before(tensors[name]) for name in given]
        count = len(step.targets)
        cannot_be_cut = count > 1 and (parts[0].ndim <= step.axis or parts[0].shape[step.axis] % count)
        if len(given) < len(step.sources) or cannot_be_cut:
            left += given
            continue
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, step.axis)
        cut = (whole,) if count == 1 else whole.chunk(count, step.axis)
        for pattern, tensor in zip(step.targets, cut, strict=True):
            made[pattern.fill(values, end)] = step.behind(tensor)
            sources[pattern.fill(values, end)] = given
    for name in left:
        made.setdefault(name, tensors[name])
        sources.setdefault(name, (name,))
    return made, sources, left


def _find(name: str, steps: Sequence[_Step]) -> tuple[int, int, tuple[int, ...], str] | None:
    """Return the first step that takes a name, which of its sources it is, the numbers and the end."""
    for number, step in enumerate(steps):
        for place, pattern in enumerate(step.sources):
            if (found := pattern.match(name)) is not None:
                return number, place, *found
    return None
