"""Bundles against their goldens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from edgecomp.bundle import GOLDEN, golden_key
from edgecomp.errors import BundleError
from edgecomp.parity.metrics import Difference, compare
from edgecomp.runners import Runner
from edgecomp.specs import Tolerance
from edgecomp.specs.manifest import Bucket, PlainGraph, RouterGraph

__all__ = ["OutputParity", "ParityReport", "cases_of", "check_bucket", "judge", "read_goldens"]

Array = npt.NDArray[np.generic]
CASES = ("seeded", "photo")
_ROUTER_MAX_REL = 1e-3


class OutputParity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One output of one bucket on one golden case.

    Attributes:
        failures: each threshold that was missed, in words; empty when it passed.
    """

    model: str
    case: str
    output: str
    difference: Difference
    failures: tuple[str, ...]

    def __bool__(self) -> bool:
        return not self.failures


class ParityReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How close a runner's outputs are to the original's; `bool(report)` is the verdict.

    Attributes:
        emulated: a twin ran in place of the graphs: fp32, rounded as the precision rounds.
    """

    bundle: str
    runner: str
    version: str
    threads: int
    precision: str
    tolerance: Tolerance
    outputs: tuple[OutputParity, ...]
    emulated: bool = False

    def __bool__(self) -> bool:
        return all(self.outputs)

    @property
    def worst(self) -> OutputParity:
        """The output that is furthest off."""
        return max(self.outputs, key=lambda row: (bool(row.failures), row.difference.max_rel))


def read_goldens(bundle: Path) -> dict[str, Array]:
    """Read the golden tensors of a bundle by name."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        goldens: dict[str, Array] = load_file(bundle / GOLDEN)
        return goldens
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise BundleError(f"bundle {bundle}: {GOLDEN} cannot be read ({error}); copy or export it again") from None


def check_bucket(
    runner: Runner, bucket: Bucket | PlainGraph | RouterGraph, goldens: Mapping[str, Array], tolerance: Tolerance
) -> tuple[OutputParity, ...]:
    """Run one bucket, the plain model or the router on each of its golden cases, and judge each output."""
    if isinstance(bucket, RouterGraph):  # shares of pixels at an edge: one pixel may fall to either side
        tolerance = msgspec.structs.replace(tolerance, max_rel=_ROUTER_MAX_REL, min_cosine=-1.0)
    rows = []
    for case in cases_of(bucket):
        outputs = runner.infer(
            {spec.name: _rows(goldens, golden_key("input", case, spec.name), bucket.batch) for spec in bucket.inputs}
        )
        for spec in bucket.outputs:
            expected = _rows(goldens, golden_key("output", case, spec.name, part=bucket.golden_part), bucket.batch)
            rows.append(judge(bucket.model, case, spec.name, outputs[spec.name], expected, tolerance))
    return tuple(rows)


def cases_of(graph: Bucket | PlainGraph | RouterGraph) -> tuple[str, ...]:
    """Return the golden cases of a graph; a router has more, one on each side of each threshold."""
    if not isinstance(graph, RouterGraph):
        return CASES
    sides = (f"{side}-{place + 1}" for place in range(graph.inputs[-1].shape[1]) for side in ("under", "over"))
    return (*CASES, *sides)


def _rows(goldens: Mapping[str, Array], key: str, batch: int) -> Array:
    """Return the first rows of a golden tensor; one row serves for all."""
    array = _golden(goldens, key)
    return np.ascontiguousarray(array[:batch] if len(array) >= batch else np.repeat(array[:1], batch, axis=0))


def _golden(goldens: Mapping[str, Array], key: str) -> Array:
    if key not in goldens:
        raise BundleError(f"{GOLDEN} holds no tensor {key!r}; export the bundle again")
    return goldens[key]


def judge(model: str, case: str, output: str, got: Array, expected: Array, tolerance: Tolerance) -> OutputParity:
    """Compare one output with its golden and hold it to the thresholds; NaN and Inf always fail."""
    if got.shape != expected.shape:
        raise BundleError(
            f"{model}: output {output!r} has shape {got.shape} and its golden {expected.shape}; export again"
        )
    difference = compare(got, expected)
    failures = []
    if expected.dtype.kind in "iu":
        wrong = int((got != expected).sum())
        if wrong:
            failures.append(
                f"{wrong} of {got.size} indices differ, most at {list(difference.worst)}: got {difference.got:.0f}, "
                f"expected {difference.expected:.0f}"
            )
        return OutputParity(model, case, output, difference, tuple(failures))
    if difference.not_finite:
        failures.append(f"{difference.not_finite} of {got.size} values are NaN or Inf")
    if not difference.max_rel <= tolerance.max_rel:
        failures.append(
            f"max rel error {difference.max_rel:.3g} above {tolerance.max_rel:g} at {list(difference.worst)}: "
            f"got {difference.got:.6g}, expected {difference.expected:.6g}"
        )
    if not difference.cosine_min >= tolerance.min_cosine:
        failures.append(f"least cosine {difference.cosine_min:.9f} below {tolerance.min_cosine}")
    return OutputParity(model, case, output, difference, tuple(failures))
