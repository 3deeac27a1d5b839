"""Records which tokens a torch module chooses, in the order in which it chooses: what `parity --selection` holds to.

Recorded is the static module while the export holds its outputs to the original's: where indices and values agree, the
choices are the original's, and in the form in which the graph makes them. A choice is an op, so that a method of
somebody else's is recorded too, without a word in its code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.overrides import TorchFunctionMode

__all__ = ["Choice", "ChoiceRecorder"]

_SORTS = (torch.sort, torch.Tensor.sort, torch.argsort, torch.Tensor.argsort)
_TOP_KS = (torch.topk, torch.Tensor.topk)
_BESTS = {torch.argmax: True, torch.Tensor.argmax: True, torch.argmin: False, torch.Tensor.argmin: False}
_RUNNERS_UP = 2


class Choice(NamedTuple):
    """One choice among tokens.

    Attributes:
        op: `TopK`, or `ArgMax` for the best alone, as the graph has it; of smallest values likewise.
        scores: (..., N) float32 of all that could be chosen; of `ArgMax` the best two alone, (..., 2).
        indices: (..., N) int32 ranked, as far as the op ranks; of `ArgMax` the best two.
    """

    op: str
    scores: npt.NDArray[np.float32]
    indices: npt.NDArray[np.int32]


class ChoiceRecorder(TorchFunctionMode):
    """While it is entered, each choice by a floating-point score is noted in `choices`."""

    def __init__(self) -> None:
        super().__init__()
        self.choices: list[Choice] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.choices.extend(_choices_of(func, result, args, kwargs or {}))
        return result


def _choices_of(func: Any, result: Any, args: Any, given: Mapping[str, Any]) -> Iterator[Choice]:
    """Yield the choice that a call made, if it made one."""
    if not (func in _SORTS or func in _TOP_KS or func in _BESTS) or not args[0].is_floating_point():
        return
    scores: torch.Tensor = args[0]
    named = dict(zip(("k", "dim") if func in _TOP_KS else ("dim",), args[1:], strict=False)) | dict(given)
    if func in _BESTS:
        if named.get("dim") is None:
            return  # the place in all axes at once: no token's
        ranked = scores.movedim(named["dim"], -1).sort(dim=-1, descending=_BESTS[func], stable=True)
        yield Choice("ArgMax", _floats(ranked.values[..., :_RUNNERS_UP]), _ints(ranked.indices[..., :_RUNNERS_UP]))
        return
    dim = named.get("dim", -1)
    indices = result if isinstance(result, torch.Tensor) else result.indices
    yield Choice("TopK", _floats(scores.movedim(dim, -1)), _ints(indices.movedim(dim, -1)))


def _floats(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(tensor.to(torch.float32).numpy())


def _ints(tensor: torch.Tensor) -> npt.NDArray[np.int32]:
    return np.ascontiguousarray(tensor.to(torch.int32).numpy())
