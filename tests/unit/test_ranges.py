"""Calibration: ranges of activations, thresholds, and values that come too near to fp16's largest number."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed; pip install 'edgecomp[cpu]' brings it")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; pip install 'edgecomp[cpu]' brings it")

import onnx_ir as ir

from edgecomp.errors import ExportError, InvalidSpec
from edgecomp.export import ranges as module
from edgecomp.export.passes.strip_metadata import MODULE_KEY
from edgecomp.export.ranges import (
    FP16_LIMIT,
    collect_largest,
    collect_ranges,
    float_activations,
    nodes_out_of_range,
    run_graph,
)

Array = npt.NDArray[np.float32]


def chain() -> ir.Model:
    """Return h = x * 3; y = h - 100, and an index that is no float."""
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 20]> g (float[2,8] x) => (float[2,8] y, int64[2,1] i)
        <float three = {3.0}, float hundred = {100.0}>
        { h = Mul (x, three)  y = Sub (h, hundred)  i = ArgMax <axis = 1> (h) }"""
    )
    for node, name, owner in zip(model.graph, ("scale", "shift", "best"), ("blocks.0.mlp", "", ""), strict=True):
        node.name = name
        if owner:
            node.metadata_props[MODULE_KEY] = owner
    for value in (v for node in model.graph for v in node.outputs):
        value.shape = value.shape or ir.Shape([2, 8])
        value.dtype = value.dtype or ir.DataType.FLOAT
    return model


def random(seed: int, *, scale: float = 1.0) -> Array:
    return (np.random.default_rng(seed).standard_normal((2, 8)) * scale).astype(np.float32)


def test_ranges_are_those_of_the_values() -> None:
    inputs = [random(seed, scale=10.0**seed) for seed in range(4)]
    found = collect_ranges(chain(), [{"x": x} for x in inputs])
    assert list(found) == ["x", "h", "y"]
    for name, compute in (("h", lambda x: x * np.float32(3)), ("y", lambda x: x * np.float32(3) - np.float32(100))):
        values = np.concatenate([np.abs(compute(x)).ravel() for x in inputs])
        seen = found[name]
        assert seen.absmax == values.max()
        assert seen.images == 8
        assert sum(seen.counts) == values.size
        assert seen.top / 2 < seen.absmax <= seen.top
        expected, _ = np.histogram(values, bins=2048, range=(0, seen.top))
        assert seen.counts == tuple(expected)


def test_ranges_do_not_depend_on_the_order() -> None:
    batches = [{"x": random(seed, scale=7.0 ** (seed - 2))} for seed in range(5)]
    assert collect_ranges(chain(), batches) == collect_ranges(chain(), batches[::-1])


def test_an_input_of_the_graph_has_a_range() -> None:
    x = random(3)
    assert collect_ranges(chain(), [{"x": x}], tensors=["x"])["x"].absmax == np.abs(x).max()


def test_the_largest_are_found_by_the_graph_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [{"x": random(seed, scale=(-3.0) ** seed)} for seed in range(3)]
    expected = {name: seen.absmax for name, seen in collect_ranges(chain(), batches).items()}
    runs: list[int] = []
    run = module._run
    monkeypatch.setattr(module, "_run", lambda *words: runs.append(1) or run(*words))
    model = chain()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert collect_largest(model, batches) == expected
    assert runs == [1]
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    tall = [{"x": np.full((2, 8), 3e37, np.float32)}]  # their sum is beyond fp32, they are not
    assert collect_largest(model, tall)["h"] == pytest.approx(9e37)


def test_groups_bound_memory_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [{"x": random(seed)} for seed in range(2)]
    together = collect_ranges(chain(), batches)
    sizes: list[int] = []
    run = module._run

    def watch(model: ir.Model, group: Any, *rest: Any) -> Any:
        sizes.append(len(group))
        return run(model, group, *rest)

    monkeypatch.setattr(module, "_GROUP_BYTES", 64)
    monkeypatch.setattr(module, "_run", watch)
    assert collect_ranges(chain(), batches) == together
    assert sizes == [1, 1]


def test_the_graph_is_left_as_it_was() -> None:
    model = chain()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    collect_ranges(model, [{"x": random(0)}])
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_only_fp32_values_that_are_read_count() -> None:
    assert float_activations(chain()) == ("x", "h", "y")


def test_run_graph_hands_on_what_a_stem_gives() -> None:
    x = random(1)
    ((first),) = run_graph(chain(), [{"x": x}])
    assert set(first) == {"y", "i"}
    np.testing.assert_array_equal(first["y"], x * np.float32(3) - np.float32(100))


def test_nothing_to_calibrate_with_is_refused() -> None:
    with pytest.raises(InvalidSpec, match="at least one input, and there is none"):
        collect_ranges(chain(), [])
    with pytest.raises(InvalidSpec, match="at least one input, and there is none"):
        collect_largest(chain(), [])


def test_a_lacking_input_is_named() -> None:
    with pytest.raises(InvalidSpec, match="calibration input 1 lacks x; it has image"):
        collect_ranges(chain(), [{"x": random(0)}, {"image": random(0)}])
    with pytest.raises(InvalidSpec, match="calibration input 1 lacks x; it has image"):
        collect_largest(chain(), [{"x": random(0)}, {"image": random(0)}])


def test_an_unknown_value_is_named() -> None:
    with pytest.raises(InvalidSpec, match="no value 'gelu_7'"):
        collect_ranges(chain(), [{"x": random(0)}], tensors=["gelu_7"])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_number_that_is_none_is_an_error_that_names_the_node(bad: float) -> None:
    x = random(0)
    x[1, 3] = bad
    with pytest.raises(ExportError, match=r"node 'scale' \(Mul\) gives NaN or Inf in 'h'"):
        collect_ranges(chain(), [{"x": x}], tensors=["h"])
    with pytest.raises(ExportError, match=r"a calibration input gives NaN or Inf in 'x'"):
        collect_largest(chain(), [{"x": random(1)}, {"x": x}])
    with pytest.raises(ExportError, match=r"a calibration input gives NaN or Inf in 'x'"):
        collect_ranges(chain(), [{"x": x}])


def test_an_input_of_the_wrong_shape_is_said_by_onnx_runtime() -> None:
    with pytest.raises(ExportError, match=r"cannot run the graph to calibrate it: .*invalid dimensions for input: x"):
        collect_ranges(chain(), [{"x": np.ones((3, 8), np.float32)}])


# -- thresholds ---------------------------------------------------------------------------------------


def seen(values: Array) -> module.Range:
    histogram = module._Histogram()
    histogram.add(np.abs(values), 1)
    return histogram.range()


def test_percentile_cuts_an_outlier_and_absmax_does_not() -> None:
    values = np.append(np.linspace(0, 1, 100_000, dtype=np.float32), np.float32(50))
    assert seen(values).threshold("absmax") == 50
    assert 0.99 < seen(values).threshold("percentile") < 1.1


def test_mse_chooses_the_smallest_error() -> None:
    values = np.append(np.random.default_rng(0).standard_normal(50_000, dtype=np.float32), np.float32(30))
    found = seen(values)

    def error(threshold: float) -> float:
        step = threshold / 127
        return float(np.mean((values - np.clip(np.rint(values / step), -127, 127) * step) ** 2))

    chosen = found.threshold("mse")
    choices = [30 * k / 64 for k in range(1, 65)]
    assert error(chosen) <= 1.05 * min(map(error, choices))
    assert error(chosen) < error(found.threshold("absmax"))
    assert chosen < 30


def test_all_zeros_have_the_threshold_zero() -> None:
    zeros = seen(np.zeros(7, np.float32))
    assert (zeros.absmax, zeros.top, zeros.counts[0]) == (0, 0, 7)
    assert zeros.threshold("mse") == zeros.threshold("percentile") == 0


def test_an_unknown_threshold_lists_the_choices() -> None:
    with pytest.raises(InvalidSpec, match="'entropy'; choices: absmax, percentile, mse"):
        seen(np.ones(1, np.float32)).threshold("entropy")  # type: ignore[arg-type]


# -- the range check ----------------------------------------------------------------------------------


def test_values_near_fp16s_end_are_listed_with_their_island() -> None:
    model = chain()
    largest = collect_largest(model, [{"x": np.full((2, 8), 2750, np.float32)}])
    (found,) = nodes_out_of_range(model, largest)
    assert (found.tensor, found.node, found.op, found.module) == ("h", "scale", "Mul", "blocks.0.mlp")
    assert found.absmax == 8250 > FP16_LIMIT == 8188
    assert found.readers == ("shift", "best")
    assert found.island == ("scale", "shift", "best")


def test_the_limit_itself_is_in_range() -> None:
    model = chain()
    largest = collect_largest(model, [{"x": np.full((2, 8), 100, np.float32)}])
    assert nodes_out_of_range(model, largest, limit=300) == ()
    assert [found.tensor for found in nodes_out_of_range(model, largest, limit=299)] == ["h"]
    (first, *_) = nodes_out_of_range(model, largest, limit=99)
    assert (first.tensor, first.node, first.island) == ("x", "", ("scale",))
