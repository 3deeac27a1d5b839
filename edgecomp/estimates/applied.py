"""Which efficiency an estimate computes with: the user's own calibration of the target, or the fit of published rows.

A calibration is one JSON file a target in the user's config folder (`resources.config_dir`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edgecomp.errors import InvalidSpec
from edgecomp.estimates.efficiency import Efficiency, Observed, fit, log_error, shipped_fit
from edgecomp.files import JSON_ERRORS, encode_document, write_whole
from edgecomp.resources import config_dir

__all__ = ["Applied", "Calibration", "applied_for", "calibrate", "calibration_path", "clear", "save", "shipped_for"]

_HOLD = 0.04  # (0.1 / 0.5)^2: a measurement is believed to 10 %, a number of the fit to half a unit of its logarithm
_ENOUGH = 3  # different graphs or batches from which on leaving one out says something
_FLOOR = math.log(1.1)  # no fit is believed further than the measurements it is made of
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Applied(msgspec.Struct, frozen=True):
    """An efficiency with its error.

    Attributes:
        error: the 90th percentile of |log(computed / measured)|, left out of the fit.
        source: whose it is, for people.
        is_own: the user's calibration, whose `error` is the largest of its results.
    """

    efficiency: Efficiency
    error: float
    source: str
    is_own: bool = False


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a user's own measurements of a target gave.

    Attributes:
        error: when each graph and batch is left out in turn, the largest of |log(computed / measured)|, at least 10 %;
            of fewer than three of them that of the published fit, which `error_of` says.
        results: labels of what was measured, never a path.
        forced: results of another device, or of a runner that uses no GPU, were let in.
    """

    schema: Literal[1]
    target: str
    efficiency: Efficiency
    error: Annotated[float, Meta(ge=0)]
    error_of: Literal["left out", "published"]
    results: tuple[str, ...]
    forced: bool = False


def applied_for(target: str) -> Applied:
    """Return what an estimate of a target computes with.

    Raises:
        InvalidSpec: the user's calibration of it is damaged.
    """
    path = calibration_path(target)
    if not path.is_file():
        return shipped_for(target)
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Calibration)
    except (OSError, *JSON_ERRORS) as error:
        raise InvalidSpec(
            f"the calibration {path} cannot be read ({error}); remove it with: edgecomp target calibrate "
            f"{target} --clear"
        ) from None
    count = len(found.results)
    forced = ", some of another device or of no GPU" if found.forced else ""
    source = f"your own calibration of {target} ({count} result{'s' * (count > 1)}{forced})"
    if found.error_of == "published":  # the error of another fit, and said to be
        source += f", too few to tell its error; the band is that of {shipped_for(target).source}"
    return Applied(found.efficiency, found.error, source, is_own=found.error_of == "left out")


def shipped_for(target: str) -> Applied:
    """Return the fit of published rows, with its error for a target."""
    shipped = shipped_fit()
    if target in shipped.targets:
        source = f"the fit of {shipped.rows} published rows, each left out in turn"
    else:
        worst = shipped.worst_device
        source = (
            f"the fit of {shipped.rows} published rows, none of {target}: each device left out in turn (the worst, "
            f"{worst}: 9 of 10 within {math.exp(shipped.devices[worst]):.2f})"
        )
    return Applied(shipped.efficiency, shipped.error_for(target), source)


def calibrate(
    target: str,
    observed: Sequence[Observed],
    results: Sequence[str],
    *,
    graphs: Sequence[Hashable],
    forced: bool,
) -> Calibration:
    """Refit the efficiency of a target from what its user measured.

    The numbers are held to the published fit as if each were believed to half a unit of its logarithm, and a
    measurement to 10 %: a single result then moves mostly what it depends on.

    Args:
        observed: the measurements, and `results` their labels.
        graphs: of each, what was measured at which batch. All measurements of one are left out together: another of
            the same graph foretells it, whatever the fit is worth.
        forced: see `Calibration`.
    """
    start = shipped_fit().efficiency
    made = fit(observed, start, hold=_HOLD)
    if len(set(graphs)) < _ENOUGH:
        return Calibration(1, target, made, shipped_fit().error_for(target), "published", tuple(results), forced)
    errors = [_FLOOR]
    for graph in dict.fromkeys(graphs):
        without = fit(_where(observed, [one != graph for one in graphs]), start, hold=_HOLD)
        errors += [abs(log_error(one, without)) for one in _where(observed, [one == graph for one in graphs])]
    return Calibration(1, target, made, max(errors), "left out", tuple(results), forced)


def _where(observed: Sequence[Observed], chosen: Sequence[bool]) -> list[Observed]:
    return [one for one, is_chosen in zip(observed, chosen, strict=True) if is_chosen]


def calibration_path(target: str) -> Path:
    """Return where the calibration of a target is kept.

    Raises:
        InvalidSpec: the target's name cannot be a file's name.
    """
    if not _PLAIN_NAME.fullmatch(target):
        raise InvalidSpec(f"target name {target!r} has characters that a calibration cannot be kept under; rename it")
    return config_dir() / "calibrations" / f"{target}.json"


def save(calibration: Calibration) -> Path:
    """Write a calibration in place of the one before; whole, or not at all."""
    return write_whole(calibration_path(calibration.target), encode_document(calibration), noun="calibration")


def clear(target: str) -> bool:
    """Remove the calibration of a target; say whether there was one."""
    path = calibration_path(target)
    there = path.is_file()
    path.unlink(missing_ok=True)
    return there
