"""Bundles against their goldens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from edgecomp.bundle import GOLDEN, golden_key
from edgecomp.errors import BundleError
from edgecomp.parity.layers import Culprit, LayerParity
from edgecomp.parity.limits import Limits
from edgecomp.parity.metrics import Difference, compare
from edgecomp.parity.selection import ChoiceParity
from edgecomp.runners import Runner
from edgecomp.specs import Tolerance
from edgecomp.specs.manifest import Bucket, Graph, PartGraph, PlainGraph, RouterGraph

__all__ = [
    "OutputParity",
    "ParityReport",
    "SelectionParity",
    "SelfTest",
    "cases_of",
    "check_bucket",
    "counts_of",
    "expected_of",
    "inputs_of",
    "judge",
    "label_of",
    "read_goldens",
    "rows_of",
]

Array = npt.NDArray[np.generic]
Judged = Bucket | PlainGraph | RouterGraph | PartGraph
CASES = ("seeded", "photo")
_ROUTER_MAX_REL = 1e-3
NO_LIMITS = Limits()


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


class SelectionParity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one graph makes of the original's choices, and what it would have chosen itself.

    Attributes:
        forced: the outputs with the original's choices forced upon the graph.
        choices: each choice, on the rows that the original had there; empty where the graph chooses nothing.
    """

    model: str
    forced: tuple[OutputParity, ...]
    choices: tuple[ChoiceParity, ...]

    def __bool__(self) -> bool:
        return all(self.forced) and all(self.choices)


class SelfTest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One question that a runner answers about itself, without any original.

    Attributes:
        test: `duplicate rows`, `repeated run` or `threads`.
        detail: what was compared, and how far it is apart; or why it could not be.
        failures: as in `OutputParity`.
        is_not_shown: the question could not be put, as `detail` says.
    """

    model: str
    test: str
    detail: str
    failures: tuple[str, ...] = ()
    is_not_shown: bool = False

    def __bool__(self) -> bool:
        return not self.failures


class ParityReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How close a runner's outputs are to the original's; `bool(report)` is the verdict.

    Attributes:
        outputs: of the graphs as they are.
        against: whose outputs were expected: `original`, or another runner.
        limits: thresholds in place of the recipe's.
        selection: of graphs that choose tokens, where it was asked for.
        self_tests: where they were asked for.
        layers: each torch module of each graph, where that was asked for.
        culprits: where an error begins, one for each graph and case that has one; none where all is within limits.
        emulated: a twin ran in place of the graphs: fp32, rounded as the precision rounds.
        left_out: graphs that the runner cannot run: routers, in torch.
    """

    bundle: str
    runner: str
    version: str
    threads: int
    precision: str
    tolerance: Tolerance
    outputs: tuple[OutputParity, ...]
    against: str = "original"
    limits: Limits = Limits()
    selection: tuple[SelectionParity, ...] = ()
    self_tests: tuple[SelfTest, ...] = ()
    layers: tuple[LayerParity, ...] = ()
    culprits: tuple[Culprit, ...] = ()
    emulated: bool = False
    left_out: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return (
            all(row or self.close_call(row) is not None for row in self.outputs)
            and all(self.selection)
            and all(self.self_tests)
            and not self.culprits
        )

    def close_call(self, row: OutputParity) -> ChoiceParity | None:
        """Return the choice that rounding may decide and that an output depends on; none: values must agree.

        Where the graph and the original may both be right and choose other tokens, the values of the free run say
        nothing; with the choices forced they are held to the thresholds all the same. A wrong choice excuses nothing.
        """
        mine = (part for part in self.selection if part.model == row.model)
        found = [one for part in mine for one in part.choices if one.case == row.case]
        return next((one for one in found if one.is_close), None) if all(found) else None

    @property
    def ties(self) -> tuple[OutputParity, ...]:
        """Outputs that are judged with the original's choices forced, since rounding may decide a choice."""
        return tuple(row for row in self.outputs if not row and self.close_call(row) is not None)

    @property
    def judged(self) -> tuple[OutputParity, ...]:
        """Outputs that are held to the thresholds by their values: free, or with choices forced."""
        ties = self.ties
        forced = (row for part in self.selection for row in part.forced) if ties else ()
        return (*(row for row in self.outputs if row not in ties), *forced)

    @property
    def worst(self) -> OutputParity:
        """The output that is furthest off, of those that are judged by their values."""
        return max(self.judged, key=lambda row: (bool(row.failures), row.difference.max_rel))


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
    runner: Runner,
    bucket: Judged,
    goldens: Mapping[str, Array],
    tolerance: Tolerance,
    *,
    limits: Limits = NO_LIMITS,
    against: Runner | None = None,
) -> tuple[OutputParity, ...]:
    """Run one bucket, the plain model or the router on each of its golden cases, and judge each output.

    Args:
        against: another runner of the same graph, whose outputs are expected in place of the goldens.
    """
    if isinstance(bucket, RouterGraph):  # shares of pixels at an edge: one pixel may fall to either side
        tolerance = msgspec.structs.replace(tolerance, max_rel=max(_ROUTER_MAX_REL, tolerance.max_rel), min_cosine=-1.0)
    rows = []
    counts = counts_of(bucket)
    for case in cases_of(bucket):
        inputs = inputs_of(bucket, goldens, case)
        outputs = runner.infer(inputs)
        wanted = against.infer(inputs) if against is not None else expected_of(bucket, goldens, case)
        for name, expected in wanted.items():
            is_count = name in counts
            rows.append(
                judge(label_of(bucket), case, name, outputs[name], expected, tolerance, limits, is_count=is_count)
            )
    return tuple(rows)


def label_of(graph: Graph) -> str:
    """Return what reports call a graph."""
    return graph.label if isinstance(graph, PartGraph) else graph.model


def cases_of(graph: Judged) -> tuple[str, ...]:
    """Return the golden cases of a graph; a router has more, one on each side of each threshold."""
    if not isinstance(graph, RouterGraph):
        return CASES
    sides = (f"{side}-{place + 1}" for place in range(graph.inputs[-1].shape[1]) for side in ("under", "over"))
    return (*CASES, *sides)


def inputs_of(graph: Judged, goldens: Mapping[str, Array], case: str) -> dict[str, Array]:
    """Return the golden inputs of a graph by name; the second of two methods reads what the first's original gave."""
    keys = {spec.name: golden_key("input", case, spec.name) for spec in graph.inputs}
    if isinstance(graph, PartGraph):
        handed = {name: golden_key("output", case, name, part="stem") for name in keys}
        keys = {name: handed[name] if handed[name] in goldens else key for name, key in keys.items()}
    return {name: rows_of(goldens, key, graph.batch) for name, key in keys.items()}


def expected_of(graph: Judged, goldens: Mapping[str, Array], case: str) -> dict[str, Array]:
    """Return what the original makes of them."""
    keys = {spec.name: golden_key("output", case, spec.name, part=graph.golden_part) for spec in graph.outputs}
    return {name: rows_of(goldens, key, graph.batch) for name, key in keys.items()}


def counts_of(graph: Graph) -> frozenset[str]:
    """Return the outputs that are counts: whole numbers that choices alone decide, and that no precision may round."""
    return frozenset(spec.name for spec in graph.outputs if spec.kind == "counts")


def rows_of(goldens: Mapping[str, Array], key: str, batch: int) -> Array:
    """Return the first rows of a golden tensor; one row serves for all."""
    array = _golden(goldens, key)
    return np.ascontiguousarray(array[:batch] if len(array) >= batch else np.repeat(array[:1], batch, axis=0))


def _golden(goldens: Mapping[str, Array], key: str) -> Array:
    if key not in goldens:
        raise BundleError(f"{GOLDEN} holds no tensor {key!r}; export the bundle again")
    return goldens[key]


def judge(
    model: str,
    case: str,
    output: str,
    got: Array,
    expected: Array,
    tolerance: Tolerance,
    limits: Limits = NO_LIMITS,
    *,
    is_count: bool = False,
) -> OutputParity:
    """Compare one output with its golden and hold it to the thresholds; NaN and Inf always fail.

    Args:
        is_count: whole numbers in a float type. As indices, they are equal or wrong, whatever the precision's
            tolerance; a user's own threshold for that very output is heard.
    """
    if got.shape != expected.shape:
        raise BundleError(
            f"{model}: output {output!r} has shape {got.shape} and its golden {expected.shape}; export again"
        )
    difference = compare(got, expected)
    failures = []
    if expected.dtype.kind in "iu" or (is_count and not limits.names(output)):
        wrong = int((got != expected).sum())
        if wrong:
            failures.append(
                f"{wrong} of {got.size} {'counts' if is_count else 'indices'} differ, most at "
                f"{list(difference.worst)}: got {difference.got:.6g}, expected {difference.expected:.6g}"
            )
        return OutputParity(model, case, output, difference, tuple(failures))
    for what, array in (("", got), ("expected ", expected)):
        if unreal := int((~np.isfinite(array)).sum()):
            failures.append(f"{unreal} of {got.size} {what}values are NaN or Inf")
    if limits.of(output) is not None:
        if missed := limits.missed(output, got, expected):
            failures.append(missed)
        return OutputParity(model, case, output, difference, tuple(failures))
    if not difference.max_rel <= tolerance.max_rel:
        failures.append(
            f"max rel error {difference.max_rel:.3g} above {tolerance.max_rel:g} at {list(difference.worst)}: "
            f"got {difference.got:.6g}, expected {difference.expected:.6g}"
        )
    if not difference.cosine_min >= tolerance.min_cosine:
        failures.append(f"least cosine {difference.cosine_min:.9f} below {tolerance.min_cosine}")
    return OutputParity(model, case, output, difference, tuple(failures))
