"""`edgecomp parity --per-layer` and `--bisect`: a graph and the original, module by module."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from edgecomp.api._forced import forced_graph
from edgecomp.bundle import Bundle
from edgecomp.errors import BundleError, MissingDependency
from edgecomp.parity import CASES, LayerParity, inputs_of, judge, judge_layer
from edgecomp.parity.forced import forced_inputs, recorded_choices
from edgecomp.runners import Array, Runner
from edgecomp.specs import Tolerance
from edgecomp.specs.manifest import Bucket

__all__ = ["compare_layers"]

Opener = Callable[[Path], Runner]


def compare_layers(
    opened: Bundle,
    bucket: Bucket,
    goldens: Mapping[str, Array],
    tolerance: Tolerance,
    open_model: Opener,
    *,
    weights: str,
    backbone_weights: str,
    then_weights: str,
) -> tuple[LayerParity, ...]:
    """Run a graph with what its modules read and give as outputs, and hold it to the model in torch.

    Where the graph chooses tokens, the original's choices are forced upon it.

    Args:
        open_model: loads a graph whose weights are the bundle's.

    Raises:
        MissingDependency: torch or onnx_ir is not there. BundleError: the model of now is not the one of the goldens.
    """
    try:
        import onnx_ir as ir

        from edgecomp.export.retrace import explain, rebuild, trace
        from edgecomp.export.taps import Tap, tap_modules
    except ImportError as error:
        raise MissingDependency(
            error.name or str(error), needed_for="`edgecomp parity --per-layer` and `--bisect`", extra="export"
        ) from error
    model = rebuild(
        opened.manifest, bucket, weights=weights, backbone_weights=backbone_weights, then_weights=then_weights
    )
    path, forced = forced_graph(opened, bucket)
    prefix = "model." if bucket.stem else ""
    rows: list[LayerParity] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        chain: list[Runner] = []
        taps: list[Tap] = []
        for number, source in enumerate([opened.path / bucket.stem] * bool(bucket.stem) + [path]):
            graph = ir.load(source)
            taps += tap_modules(graph, prefix=prefix)
            target = Path(folder) / f"{number}.onnx"
            target.write_bytes(ir.to_proto(graph).SerializeToString(deterministic=True))
            chain.append(stack.enter_context(open_model(target)))
        for case in CASES:
            inputs = inputs_of(bucket, goldens, case)
            seen, outputs = trace(model, [inputs[spec.name] for spec in model.input_specs(bucket.batch)])
            _require_original(opened, bucket, case, outputs, goldens, tolerance)
            values: dict[str, Array] = {**inputs}
            if forced.choices:
                recorded = recorded_choices(opened.path, bucket, forced.choices, goldens, case)
                values |= forced_inputs(forced.choices, recorded)
            for runner in chain:
                values |= runner.infer({name: values[name] for name in runner.input_names})
            for tap in taps:
                there = seen.get(tap.module)
                read, gave = values[tap.read], values[tap.gave]
                if there is None or (read.size, gave.size) != (there.read.size, there.gave.size):
                    continue
                read, gave = read.reshape(there.read.shape), gave.reshape(there.gave.shape)
                explained = explain(model, tap.module, np.ascontiguousarray(read))
                rows.append(
                    judge_layer(
                        bucket.model, case, tap.module, read=read, gave=gave, explained=explained, original=there
                    )
                )
    return tuple(rows)


def _require_original(
    opened: Bundle,
    bucket: Bucket,
    case: str,
    outputs: tuple[Array, ...],
    goldens: Mapping[str, Array],
    tolerance: Tolerance,
) -> None:
    """Refuse to compare with a model that does not give the goldens."""
    from edgecomp.parity import expected_of

    for (name, expected), got in zip(expected_of(bucket, goldens, case).items(), outputs, strict=True):
        row = judge(bucket.model, case, name, got, expected, tolerance)
        if not row:
            raise BundleError(
                f"bundle {opened.path}: the model that its manifest describes gives another {name} than its goldens "
                f"({row.failures[0]}); versions differ, or the options of the export are more than the manifest says"
            )
