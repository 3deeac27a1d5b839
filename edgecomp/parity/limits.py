"""Thresholds that a user gives for outputs, in place of the recipe's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from edgecomp.errors import InvalidSpec

__all__ = ["Limits", "read_limits"]


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Largest errors allowed: every element must be within `atol + rtol |expected|`, as in NumPy's allclose.

    Attributes:
        atol, rtol: by the name of an output; "" stands for all that are not named. One that is not given counts as 0,
            and where neither is, the recipe's thresholds hold.
    """

    atol: Mapping[str, float] = msgspec.field(default_factory=dict)
    rtol: Mapping[str, float] = msgspec.field(default_factory=dict)

    def of(self, output: str) -> tuple[float, float] | None:
        """Return both for an output, or none where the recipe's thresholds hold."""
        found = [table.get(output, table.get("")) for table in (self.atol, self.rtol)]
        if found == [None, None]:
            return None
        return found[0] or 0.0, found[1] or 0.0

    def names(self, output: str) -> bool:
        """Say whether an output has a threshold of its own, beside that of all others."""
        return output in self.atol or output in self.rtol

    def missed(self, output: str, got: npt.NDArray[np.generic], expected: npt.NDArray[np.generic]) -> str:
        """Say in words by how much an output misses them; "" where it does not."""
        limit = self.of(output)
        assert limit is not None
        x, y = got.astype(np.float64), expected.astype(np.float64)
        finite = np.isfinite(x) & np.isfinite(y)
        clean, wanted = np.where(finite, x, 0.0), np.where(finite, y, 0.0)
        over = np.where(finite, np.abs(clean - wanted) - limit[1] * np.abs(wanted), np.inf)
        bad = over > limit[0]
        if not bad.any():
            return ""
        worst = np.unravel_index(int(over.argmax()), over.shape)
        return (
            f"{int(bad.sum())} of {got.size} values are not within atol {limit[0]:g} + rtol {limit[1]:g}, most at "
            f"{[int(i) for i in worst]}: got {x[worst]:.6g}, expected {y[worst]:.6g}"
        )

    def require_known(self, outputs: Iterable[str]) -> None:
        """Refuse a threshold for an output that there is not."""
        known = sorted(set(outputs))
        for option, table in (("--atol", self.atol), ("--rtol", self.rtol)):
            for name in table:
                if name and name not in known:
                    raise InvalidSpec(f"{option} names the output {name!r}; the bundle's are {', '.join(known)}")


def read_limits(*, atol: Sequence[str | float] = (), rtol: Sequence[str | float] = ()) -> Limits:
    """Read thresholds: `NAME:1e-3` for one output, `1e-3` for all others.

    Raises:
        InvalidSpec: one is no number, is negative, or is given twice.
    """
    return Limits(_table("atol", atol), _table("rtol", rtol))


def _table(option: str, given: Sequence[str | float]) -> dict[str, float]:
    table: dict[str, float] = {}
    for item in given:
        name, _, text = str(item).rpartition(":")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= 0) or (":" in str(item) and not name):
            raise InvalidSpec(f"--{option} {item}: give a number that is not negative, or NAME:NUMBER, such as 1e-3")
        if name in table:
            whose = f"the output {name!r}" if name else "all outputs"
            raise InvalidSpec(f"--{option} is given twice for {whose}: {table[name]:g} and {value:g}; give one")
        table[name] = value
    return table
