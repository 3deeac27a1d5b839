"""The efficiency of the stack: the numbers that say how far from its peaks a chip computes, and how sure that is.

The time of a kernel is

    max( sum of FLOPs / (peak * e * fill),  bytes / (bandwidth * e_bandwidth) )  +  launch

with `fill = min(1, elements of the result / (tile * multiprocessors))`: a product that has fewer tiles than the chip
has multiprocessors leaves the others idle. `e` is one number for 16 and 32 bits (`compute`) and one for 8 and fewer
(`compute8`). Four are fitted on published latencies, as least squares of the logarithm of computed over published. The
tile is not fitted: it is the 64 x 128 of a common kernel, since the rows cannot tell it from the launch time, and a
fit in which every product fills the chip does as well. What an estimate says of fewer tokens is held against that fit
too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta
from msgspec.structs import replace

from edgecomp.errors import InvalidSpec
from edgecomp.resources import data_path

__all__ = [
    "TILE",
    "Efficiency",
    "Fit",
    "Load",
    "Observed",
    "fit",
    "fit_filling",
    "left_out",
    "log_error",
    "modelled_us",
    "shipped_fit",
]

Share = Annotated[float, Meta(gt=0, le=1)]
Array = npt.NDArray[np.float64]
_STEPS = 40
_FITTED = ("compute", "compute8", "bandwidth", "launch_us")
_SHARES = 3  # the first parameters, which stay at most 1
TILE = 64.0 * 128.0
_NO_TILE = 1.0


class Efficiency(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a stack makes of a chip.

    Attributes:
        compute: share of the dense peak in fp16, bf16, tf32 and fp32 that a full chip reaches.
        compute8: the same in int8, fp8 and fp4.
        bandwidth: share of the peak bandwidth.
        launch_us: of each kernel, microseconds.
        tile: elements of a result that keep one multiprocessor busy.
    """

    compute: Share
    compute8: Share
    bandwidth: Share
    launch_us: Annotated[float, Meta(gt=0)]
    tile: Annotated[float, Meta(gt=0)]


class Load(msgspec.Struct, frozen=True):
    """The kernels of a graph on a target, one entry each, at the target's peaks.

    Attributes:
        compute_us, compute8_us: of the products, in 16 and 32 bits, and in 8 and fewer.
        memory_us: of the bytes.
        blocks: elements of the largest result over the multiprocessors; 0 without products, or where they are unknown.
        launches: how many each kernel needs.
    """

    compute_us: Array
    compute8_us: Array
    memory_us: Array
    blocks: Array
    launches: Array


class Observed(msgspec.Struct, frozen=True):
    """A measured latency, with what was computed."""

    target: str
    load: Load
    us: float


class Fit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The fitted numbers and their error, as `profiles/efficiency.toml` holds them.

    Attributes:
        error_row: the 90th percentile of |log(computed / published)| when each row is left out of the fit in turn.
        error_device: the same when all rows of a device are left out at once: for targets that have none.
        devices: of each device's own rows, the 90th percentile of that error: some are foretold worse than
            all together.
        median_row, median_device: the medians of the same.
        targets: those with published rows.
        without: the fit without the rows of each of these targets.
        filling: the fit of all rows in which every product fills the chip, and the root mean square of its log errors
            (`rms_filling`) beside that of `efficiency` (`rms`).
    """

    schema: Literal[1]
    rows: int
    efficiency: Efficiency
    error_row: float
    median_row: float
    error_device: float
    median_device: float
    rms: float
    rms_filling: float
    targets: tuple[str, ...]
    devices: dict[str, float]
    without: dict[str, Efficiency]
    filling: Efficiency

    @property
    def worst_device(self) -> str:
        """The device that the rows of all others foretell worst."""
        return max(self.devices, key=lambda name: self.devices[name])

    @property
    def others(self) -> tuple[Efficiency, ...]:
        """Other numbers that explain most rows as well: what they disagree in, the rows do not say."""
        return (*self.without.values(), self.filling)

    def error_for(self, target: str) -> float:
        """Return the error to state for a target, as a logarithm."""
        return self.error_row if target in self.targets else self.error_device


@functools.cache
def shipped_fit() -> Fit:
    """Read the fit that ships with edgecomp; a test makes it anew from the rows.

    Raises:
        InvalidSpec: the file is damaged.
    """
    path = data_path("profiles", "published", "fit.toml")
    try:
        return msgspec.toml.decode(path.read_bytes(), type=Fit)
    except (OSError, msgspec.DecodeError) as error:
        raise InvalidSpec(f"{path} cannot be read ({error}); install edgecomp again") from None


def modelled_us(load: Load, efficiency: Efficiency) -> Array:
    """Return the microseconds of each kernel; the formula stands above."""
    fill = np.where(load.blocks > 0, np.minimum(1.0, load.blocks / efficiency.tile), 1.0)
    compute = (load.compute_us / efficiency.compute + load.compute8_us / efficiency.compute8) / fill
    times: Array = np.maximum(compute, load.memory_us / efficiency.bandwidth) + load.launches * efficiency.launch_us
    return times


def fit(observed: Sequence[Observed], start: Efficiency, *, hold: float = 0.0) -> Efficiency:
    """Fit the four numbers to measured latencies.

    Args:
        observed: at least one.
        start: where the search begins; its tile is kept.
        hold: how strongly the logarithm of each number is held to that of `start`: a few measurements of one device
            cannot tell four numbers apart. 0: not at all.

    Returns:
        the numbers with the least sum of squared log errors that Levenberg's and Marquardt's method finds.
    """
    joined = _join([one.load for one in observed])
    ends = np.cumsum([0, *(len(one.load.launches) for one in observed)])[:-1]
    wanted = np.log([one.us for one in observed])
    origin = np.log([getattr(start, name) for name in _FITTED])

    def make(x: Array) -> Efficiency:
        return replace(start, **dict(zip(_FITTED, (float(value) for value in np.exp(x)), strict=True)))

    def errors(x: Array) -> Array:
        found = np.log(np.add.reduceat(modelled_us(joined, make(x)), ends)) - wanted
        return np.concatenate([found, math.sqrt(hold) * (x - origin)]) if hold else found

    return make(_least_squares(errors, origin))


def _least_squares(errors: Callable[[Array], Array], x: Array) -> Array:
    """Levenberg-Marquardt with numeric derivatives; shares are kept at 1 or below."""
    damping, width = 1e-2, 1e-4
    now = errors(x)
    for _ in range(_STEPS):
        slopes = np.stack([(errors(x + width * axis) - now) / width for axis in np.eye(len(x))], axis=1)
        squares = slopes.T @ slopes
        for _ in range(8):
            step = np.linalg.solve(
                squares + damping * (np.diag(np.diag(squares)) + 1e-9 * np.eye(len(x))), slopes.T @ now
            )
            tried = x - np.clip(step, -0.5, 0.5)
            tried[:_SHARES] = np.minimum(tried[:_SHARES], 0.0)
            then = errors(tried)
            if then @ then < now @ now:
                gain = now @ now - then @ then
                x, now, damping = tried, then, max(damping / 3, 1e-9)
                break
            damping *= 4
        else:
            break
        if gain < 1e-10 * (now @ now):
            break
    return x


def _join(loads: Sequence[Load]) -> Load:
    return Load(*(np.concatenate([getattr(one, name) for one in loads]) for name in Load.__struct_fields__))


def left_out(
    observed: Sequence[Observed], start: Efficiency
) -> tuple[Efficiency, list[float], list[float], dict[str, Efficiency]]:
    """Fit all, and again without each row, and without each device.

    Returns:
        the fit; log(computed / published) of each row when it is left out; the same when its device is; the fits
        without each device.
    """
    whole = fit(observed, start)
    rows = []
    for place, one in enumerate(observed):
        others = [*observed[:place], *observed[place + 1 :]]
        rows.append(log_error(one, fit(others, whole)))
    targets = sorted({one.target for one in observed})
    without = {name: fit([one for one in observed if one.target != name], whole) for name in targets}
    devices = [log_error(one, without[one.target]) for one in observed]
    return whole, rows, devices, without


def log_error(one: Observed, efficiency: Efficiency) -> float:
    """Return log(computed / measured)."""
    return math.log(float(modelled_us(one.load, efficiency).sum()) / one.us)


def fit_filling(observed: Sequence[Observed], start: Efficiency) -> Efficiency:
    """Fit with every product taken to fill the chip."""
    return fit(observed, replace(start, tile=_NO_TILE))
