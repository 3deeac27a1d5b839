"""Module by module: how far a graph is from the original there, and how much of it a module's own input explains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

__all__ = ["Culprit", "LayerParity", "find_culprits", "judge_layer"]

Array = npt.NDArray[Any]
_JUMP = 10.0  # times what any module before was off: more is not handed on, but made


class LayerParity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One torch module of one graph on one golden case; errors are over the largest magnitude expected.

    Attributes:
        module: its name in PyTorch.
        input_error: how far what it read is from what the original read.
        error: how far what it gave is from what the original gave.
        local: how far it is from what the module makes of the input that the graph handed it, in fp64.
        cosine: least cosine of a token with the original's.
    """

    model: str
    case: str
    module: str
    input_error: float
    error: float
    local: float
    cosine: float


class Culprit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where an error begins.

    Attributes:
        module: that makes it; where it is made between two modules, the one that reads it.
        after: the module before, where it is made between two; "" for the input.
        error: what is made there.
        inherited: what is read there.
        limit: what is allowed.
        is_between: no module makes it, but what is computed between two, such as attention or a choice.
    """

    model: str
    case: str
    module: str
    after: str
    error: float
    inherited: float
    limit: float
    is_between: bool = False

    def __str__(self) -> str:
        where = f"between {self.after or 'the input'} and" if self.is_between else "in"
        return (
            f"{self.model}, {self.case}: the error begins {where} {self.module}: {self.error:.3g} is made there, "
            f"{self.inherited:.3g} is read, {self.limit:.3g} allowed"
        )


def judge_layer(
    model: str, case: str, module: str, *, read: Array, gave: Array, explained: Array, original: tuple[Array, Array]
) -> LayerParity:
    """Compare one module on both sides.

    Args:
        read, gave: the graph's values.
        explained: what the module makes of `read`.
        original: what it read and gave in the original.
    """
    return LayerParity(
        model,
        case,
        module,
        input_error=_error(read, original[0]),
        error=_error(gave, original[1]),
        local=_error(gave, explained),
        cosine=_cosine(gave, original[1]),
    )


def find_culprits(layers: Sequence[LayerParity], *, limit: float) -> tuple[Culprit, ...]:
    """Return where the error of each graph and case begins: the first module whose error its input does not explain.

    Args:
        layers: in the order of the graphs.
        limit: largest error of a module's own.
    """
    parts: dict[tuple[str, str], list[LayerParity]] = {}
    for layer in layers:
        parts.setdefault((layer.model, layer.case), []).append(layer)
    found = (_first(part, limit) for part in parts.values())
    return tuple(one for one in found if one is not None)


def _first(layers: Sequence[LayerParity], limit: float) -> Culprit | None:
    before, last = 0.0, ""
    for layer in layers:
        if layer.input_error > max(limit, _JUMP * before):
            return Culprit(
                layer.model, layer.case, layer.module, last, layer.input_error, before, limit, is_between=True
            )
        if layer.local > limit:
            return Culprit(layer.model, layer.case, layer.module, "", layer.local, layer.input_error, limit)
        before, last = max(before, layer.error), layer.module
    return None


def _error(got: Array, expected: Array) -> float:
    x, y = got.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    if not np.isfinite(x).all():
        return float(np.finfo(np.float64).max)
    peak = float(np.abs(y).max(initial=0.0))
    return float(np.abs(x - y).max(initial=0.0)) / (peak or 1.0)


def _cosine(got: Array, expected: Array) -> float:
    x, y = (np.nan_to_num(side.astype(np.float64)).reshape(-1, expected.shape[-1]) for side in (got, expected))
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return float(np.where(norms > 0, (x * y).sum(1) / np.where(norms > 0, norms, 1.0), 1.0).min())
