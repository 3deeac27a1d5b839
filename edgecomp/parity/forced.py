"""A forced graph against the goldens: values under the original's choices, and its own choices beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgecomp.bundle import GOLDEN, choice_key
from edgecomp.errors import BundleError, RunError
from edgecomp.parity.check import (
    CASES,
    NO_LIMITS,
    OutputParity,
    SelectionParity,
    counts_of,
    expected_of,
    inputs_of,
    judge,
    label_of,
)
from edgecomp.parity.limits import Limits
from edgecomp.parity.selection import ChoiceParity, judge_choices
from edgecomp.runners import Runner
from edgecomp.specs import Tolerance
from edgecomp.specs.choice import ChoiceNode
from edgecomp.specs.manifest import Bucket, PartGraph

__all__ = ["Recorded", "check_selection", "forced_inputs", "own_choices", "recorded_choices"]

Array = npt.NDArray[Any]
Recorded = dict[int, tuple[Array, Array]]


def recorded_choices(
    bundle: Path, bucket: Bucket | PartGraph, nodes: tuple[ChoiceNode, ...], goldens: Mapping[str, Array], case: str
) -> Recorded:
    """Return scores and indices of each of the original's choices, for the rows of a bucket's batch.

    Raises:
        BundleError: the golden file has none, or those of another graph.
    """
    prefix = choice_key(case, bucket.choice_part, 0, "").rsplit(".", 2)[0] + "."
    held = sorted({key.removeprefix(prefix).rpartition(".")[0] for key in goldens if key.startswith(prefix)})
    if nodes and not held:
        raise BundleError(
            f"bundle {bundle}: {GOLDEN} does not hold what the original chose, as bundles of older versions do not; "
            "export it again with the same options and --force"
        )
    if [name.partition(".")[2] for name in held] != [node.op for node in nodes]:
        raise BundleError(
            f"bundle {bundle}: the original made {len(held)} choices and {bucket.model} makes {len(nodes)}, or others; "
            "export it again with --force"
        )
    found: Recorded = {}
    for name, node in zip(held, nodes, strict=True):
        scores, indices = (goldens[f"{prefix}{name}.{what}"] for what in ("scores", "indices"))
        if node.op == "TopK" and indices.shape[-1] < node.k:
            raise BundleError(
                f"bundle {bundle}: choice {node.number} of {bucket.model} takes {node.k} and the original took "
                f"{indices.shape[-1]}; export it again with --force"
            )
        rows = node.indices[0]
        found[node.number] = _first(scores, rows), _first(indices, rows)
    return found


def _first(array: Array, rows: int) -> Array:
    """Return the first rows; one row serves for all."""
    return array[:rows] if len(array) >= rows else np.repeat(array[:1], rows, axis=0)


def forced_inputs(nodes: tuple[ChoiceNode, ...], chosen: Mapping[int, tuple[Array, Array]]) -> dict[str, Array]:
    """Return what a forced graph takes besides its inputs."""
    given: dict[str, Array] = {}
    for node in nodes:
        index = chosen[node.number][1][..., : node.k if node.op == "TopK" else 1]
        given[node.name] = np.ascontiguousarray(index.reshape(node.indices).astype(np.int64))
    return given


def own_choices(
    runner: Runner, nodes: tuple[ChoiceNode, ...], inputs: Mapping[str, Array]
) -> tuple[dict[str, Array], Recorded]:
    """Return the outputs of a forced graph under its own choices, and these: scores and indices of each by its number.

    It is run with what it chose in the run before, until it chooses the same again. Each run settles at least the first
    choice that was not, so that there are at most as many runs as choices, and one. What is settled is the run of the
    graph as it is: each value is made of the same values.

    Raises:
        RunError: the choices do not settle, so that the runner chooses otherwise on equal inputs.
    """
    given = {node.name: np.broadcast_to(np.arange(node.k), node.indices).astype(np.int64) for node in nodes}
    for _ in range(len(nodes) + 1):
        outputs = runner.infer({**inputs, **given})
        own = {n.name: outputs[f"{n.name}.indices"].reshape(n.indices).astype(np.int64) for n in nodes}
        moved = [name for name in own if not np.array_equal(own[name], given[name])]
        if not moved:
            return outputs, {n.number: (outputs[f"{n.name}.scores"], own[n.name]) for n in nodes}
        given = own
    raise RunError(
        f"{moved[0]} is chosen otherwise in each of {len(nodes) + 1} runs on the same inputs; `edgecomp parity "
        "--self-test` shows whether this runner gives equal bits"
    )


def check_selection(
    runner: Runner,
    bundle: Path,
    bucket: Bucket | PartGraph,
    nodes: tuple[ChoiceNode, ...],
    goldens: Mapping[str, Array],
    tolerance: Tolerance,
    *,
    limits: Limits = NO_LIMITS,
    against: Runner | None = None,
) -> SelectionParity:
    """Run a forced graph on each golden case, and judge its outputs and its own choices.

    Args:
        runner: of the forced graph.
        nodes: its choices.
        against: another runner of the forced graph, which stands in the original's place; both are given the
            original's choices.
    """
    forced: list[OutputParity] = []
    choices: list[ChoiceParity] = []
    counts = counts_of(bucket)
    for case in CASES:
        original = recorded_choices(bundle, bucket, nodes, goldens, case)
        inputs = {**inputs_of(bucket, goldens, case), **forced_inputs(nodes, original)}
        outputs = runner.infer(inputs)
        wanted = expected_of(bucket, goldens, case)
        if against is not None:
            others = against.infer(inputs)
            wanted = {name: others[name] for name in wanted}
            original = {node.number: _as_recorded(node, others) for node in nodes}
        forced += [
            judge(label_of(bucket), case, name, outputs[name], expected, tolerance, limits, is_count=name in counts)
            for name, expected in wanted.items()
        ]
        choices += judge_choices(label_of(bucket), case, nodes, original, outputs, max_rel=tolerance.max_rel)
    return SelectionParity(label_of(bucket), tuple(forced), tuple(choices))


def _as_recorded(node: ChoiceNode, outputs: Mapping[str, Array]) -> tuple[Array, Array]:
    """Return a runner's own scores and choice in the form in which the golden file has the original's."""
    scores, own = outputs[f"{node.name}.scores"], outputs[f"{node.name}.indices"]
    if node.op == "TopK":
        return scores, own
    ranked = np.argsort(-scores if node.largest else scores, axis=-1, kind="stable")[..., :2]
    return np.take_along_axis(scores, ranked, -1), ranked
