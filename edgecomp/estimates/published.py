"""The published latencies that the efficiency is fitted on, and the fit that they give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta

from edgecomp.errors import InvalidSpec
from edgecomp.estimates.efficiency import TILE, Efficiency, Fit, Observed, fit_filling, left_out, log_error
from edgecomp.estimates.geometry import Geometry, transformer_costs
from edgecomp.estimates.roofline import load_of, prepare
from edgecomp.resources import data_path
from edgecomp.specs.target import Precision, load_target

__all__ = ["LeftOut", "PublishedRow", "PublishedRows", "RowError", "observed_rows", "refit", "shipped_rows"]

_START = Efficiency(compute=0.4, compute8=0.35, bandwidth=0.6, launch_us=8.0, tile=TILE)
Positive = Annotated[float, Meta(gt=0)]


class PublishedRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A published figure; one of `ms` (of a batch) and `fps` (items in a second) is 0.

    Attributes:
        assumed: what the source leaves open, and what was taken for it.
    """

    model: str
    geometry: str
    target: str
    precision: Precision
    batch: Annotated[int, Meta(ge=1)]
    stack: str
    source: str
    ms: float = 0.0
    fps: float = 0.0
    assumed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.ms > 0) == (self.fps > 0):
            raise ValueError(f"row {self.model} on {self.target}: give either ms or fps, above 0")

    @property
    def us(self) -> float:
        """Microseconds of one run."""
        return 1e3 * self.ms if self.ms else 1e6 * self.batch / self.fps


class LeftOut(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A published figure that cannot be modelled, and why."""

    model: str
    device: str
    reason: str


class PublishedRows(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`profiles/published/rows.toml`."""

    schema: Literal[1]
    geometries: dict[str, Geometry]
    rows: tuple[PublishedRow, ...]
    left_out: tuple[LeftOut, ...]


class RowError(msgspec.Struct, frozen=True):
    """A published row beside what the model computes without it.

    Attributes:
        us, without_row, without_device: microseconds: published; computed by a fit without this row, and by one without
            any row of its device.
    """

    row: PublishedRow
    us: float
    without_row: float
    without_device: float


def shipped_rows() -> PublishedRows:
    """Read the published rows."""
    path = data_path("profiles", "published", "rows.toml")
    try:
        return msgspec.toml.decode(path.read_bytes(), type=PublishedRows)
    except (OSError, msgspec.DecodeError) as error:
        raise InvalidSpec(f"{path} cannot be read ({error}); install edgecomp again") from None


def observed_rows(rows: PublishedRows) -> list[Observed]:
    """Return the rows as the fit takes them."""
    found = []
    for row in rows.rows:
        target = load_target(row.target)
        costs = transformer_costs(rows.geometries[row.geometry], batch=row.batch, name=row.model)
        work = prepare(costs, precision=row.precision, batch=0, plugin=True, target=target)
        found.append(Observed(row.target, load_of(work, target)[0], row.us))
    return found


def refit(rows: PublishedRows) -> tuple[Fit, tuple[RowError, ...]]:
    """Fit the rows, and again without each row and each device: some seconds."""
    observed = observed_rows(rows)
    whole, by_row, by_device, without = left_out(observed, _START)
    errors = tuple(
        RowError(row, one.us, one.us * math.exp(of_row), one.us * math.exp(of_device))
        for row, one, of_row, of_device in zip(rows.rows, observed, by_row, by_device, strict=True)
    )
    sizes = np.abs(by_row), np.abs(by_device)
    filling = fit_filling(observed, whole)
    made = Fit(
        schema=1,
        rows=len(observed),
        efficiency=whole,
        error_row=float(np.quantile(sizes[0], 0.9)),
        median_row=float(np.median(sizes[0])),
        error_device=float(np.quantile(sizes[1], 0.9)),
        median_device=float(np.median(sizes[1])),
        rms=_rms(observed, whole),
        rms_filling=_rms(observed, filling),
        targets=tuple(sorted({one.target for one in observed})),
        devices={name: _of_device(errors, name) for name in without},
        without=without,
        filling=filling,
    )
    return made, errors


def _of_device(errors: Sequence[RowError], target: str) -> float:
    sizes = [abs(math.log(one.without_device / one.us)) for one in errors if one.row.target == target]
    return float(np.quantile(sizes, 0.9))


def _rms(observed: list[Observed], efficiency: Efficiency) -> float:
    return float(np.sqrt(np.mean([log_error(one, efficiency) ** 2 for one in observed])))
