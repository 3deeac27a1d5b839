"""Each graph pass alone, on small graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed; pip install 'edgecomp[cpu]' brings it")

import onnx_ir as ir

from edgecomp.errors import DynamicShape
from edgecomp.export.modules import MODULE_KEY, module_of
from edgecomp.export.passes import WeightsFile, name_weights, require_static, share_weights, strip_metadata

SCOPES = "pkg.torch.onnx.name_scopes"
TRACE = 'File "/somewhere/model.py", line 3, in forward'
Array = npt.NDArray[np.generic]


def parse(body: str, *, inputs: str = "float[2,8] x", outputs: str = "float[2,8] y") -> ir.Model:
    return ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 20]> g ({inputs}) => ({outputs}) {{ {body} }}')


def add_weight(model: ir.Model, name: str, array: Array) -> ir.Value:
    """Put an initializer in the place of the graph's free name of that name."""
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
    for old in list(model.graph.inputs):
        if old.name == name:
            model.graph.inputs.remove(old)
            for node, index in [(use.node, use.idx) for use in old.uses()]:
                node.replace_input_with(index, value)
    model.graph.initializers[name] = value
    return value


def product(weight: Array, *, name: str = "w") -> ir.Model:
    """Return y = x @ weight."""
    rows, columns = weight.shape
    model = parse(
        f"y = MatMul (x, {name})",
        inputs=f"float[2,{rows}] x, float[{rows},{columns}] {name}",
        outputs=f"float[2,{columns}] y",
    )
    add_weight(model, name, weight)
    return model


def save(model: ir.Model, path: Path) -> None:
    path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def infer(path: Path, **inputs: Array) -> Any:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; edgecomp[cpu] brings it")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def random(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


# -- strip_metadata -----------------------------------------------------------------------------------


def traced() -> ir.Model:
    model = parse("t = Relu (x)\n y = Neg (t)")
    first, second = model.graph
    first.metadata_props[SCOPES] = "['', 'compressor', 'compressor.blocks.0.mlp', 'relu']"
    second.metadata_props[SCOPES] = "not a list"
    for node in (first, second):
        node.metadata_props["pkg.torch.onnx.stack_trace"] = TRACE
        node.doc_string = TRACE
    for holder in (model, model.graph, model.graph.inputs[0], model.graph.outputs[0], first.outputs[0]):
        holder.metadata_props["pkg.torch.note"] = TRACE
        holder.doc_string = TRACE
    return model


def test_strip_metadata_drops_traces_everywhere() -> None:
    model = traced()
    assert b"/somewhere" in ir.to_proto(model).SerializeToString()
    strip_metadata(model, producer_version="1.2.3")
    content = ir.to_proto(model).SerializeToString()
    assert b"/somewhere" not in content
    assert b"pkg.torch" not in content


def test_strip_metadata_keeps_the_module_alone() -> None:
    model = traced()
    strip_metadata(model, producer_version="1.2.3")
    first, second = model.graph
    assert dict(first.metadata_props) == {MODULE_KEY: "compressor.blocks.0.mlp"}
    assert (module_of(first), module_of(second)) == ("compressor.blocks.0.mlp", "")
    assert dict(second.metadata_props) == {}


def test_strip_metadata_names_the_producer() -> None:
    model = traced()
    strip_metadata(model, producer_version="1.2.3")
    assert (model.producer_name, model.producer_version) == ("edgecomp", "1.2.3")


@pytest.mark.parametrize("scopes", ["", "[]", "['relu']", "{'a': 1}", "(", "[1"])
def test_strip_metadata_bears_scopes_without_a_module(scopes: str) -> None:
    model = parse("y = Neg (x)")
    (node,) = model.graph
    node.metadata_props[SCOPES] = scopes
    strip_metadata(model, producer_version="1")
    assert dict(node.metadata_props) == {}


def test_strip_metadata_reaches_initializers() -> None:
    model = product(random(8, 8))
    model.graph.initializers["w"].metadata_props["pkg.torch.note"] = TRACE
    model.graph.initializers["w"].doc_string = TRACE
    strip_metadata(model, producer_version="1")
    assert b"/somewhere" not in ir.to_proto(model).SerializeToString()


# -- name_weights -------------------------------------------------------------------------------------


def test_name_weights_takes_module_and_role_of_the_reader() -> None:
    model = product(random(8, 16), name="val_20")
    (node,) = model.graph
    node.metadata_props[MODULE_KEY] = "blocks.0.to_q"
    name_weights(model)
    assert list(model.graph.initializers) == ["blocks.0.to_q.weight_t"]
    value = node.inputs[1]
    assert value is not None
    assert value.name == "blocks.0.to_q.weight_t"
    assert value.const_value is not None
    assert value.const_value.name == "blocks.0.to_q.weight_t"


def test_name_weights_numbers_what_one_module_reads_twice() -> None:
    body = "a = MatMul (x, val_1)\n b = MatMul (a, val_2)\n y = MatMul (b, val_3)"
    model = parse(body, inputs="float[2,8] x, float[8,8] val_1, float[8,8] val_2, float[8,8] val_3")
    for number in (1, 2, 3):
        add_weight(model, f"val_{number}", random(8, 8, seed=number))
    for node in model.graph:
        node.metadata_props[MODULE_KEY] = "mix"
    name_weights(model)
    assert sorted(model.graph.initializers) == ["mix.weight_t", "mix.weight_t.1", "mix.weight_t.2"]
    readers = [node.inputs[1].const_value.numpy() for node in model.graph]  # type: ignore[union-attr]
    for number, found in enumerate(readers, start=1):
        np.testing.assert_array_equal(found, random(8, 8, seed=number))


@pytest.mark.parametrize(
    ("name", "size", "module"),
    [
        ("blocks.0.weight", 8, "blocks.0"),  # it has its parameter's name
        ("val_1", 4, "blocks.0"),  # too small to matter
        ("val_1", 8, ""),  # nothing is known of its reader
    ],
)
def test_name_weights_leaves_the_rest_alone(name: str, size: int, module: str) -> None:
    model = product(random(8, size), name="val_1")
    value = model.graph.initializers.pop("val_1")
    value.name = name
    model.graph.initializers[name] = value
    (node,) = model.graph
    if module:
        node.metadata_props[MODULE_KEY] = module
    name_weights(model)
    assert list(model.graph.initializers) == [name]


def test_name_weights_never_takes_a_name_that_is_there() -> None:
    body = "a = MatMul (x, val_1)\n y = MatMul (a, other)"
    model = parse(body, inputs="float[2,8] x, float[8,8] val_1, float[8,8] other")
    add_weight(model, "val_1", random(8, 8, seed=1))
    value = add_weight(model, "other", random(8, 8, seed=2))
    model.graph.initializers.pop("other")
    value.name = "m.weight_t"
    model.graph.initializers["m.weight_t"] = value
    for node in model.graph:
        node.metadata_props[MODULE_KEY] = "m"
    name_weights(model)
    assert sorted(model.graph.initializers) == ["m.weight_t", "m.weight_t.1"]
    np.testing.assert_array_equal(model.graph.initializers["m.weight_t"].const_value.numpy(), random(8, 8, seed=2))  # type: ignore[union-attr]


# -- require_static -----------------------------------------------------------------------------------


def test_require_static_accepts_integers() -> None:
    model = parse("t = Relu (x)\n y = Neg (t)")
    next(iter(model.graph)).outputs[0].shape = ir.Shape([2, 8])
    require_static(model)


@pytest.mark.parametrize(
    ("shape", "seen"),
    [
        (ir.Shape(["tokens", 8]), "tokens"),
        (ir.Shape([0, 8]), "'0'"),
        (ir.Shape([None, 8]), "None"),
        (None, "unknown"),
    ],
    ids=["symbolic", "zero", "unnamed", "unknown"],
)
def test_require_static_names_value_and_node(shape: ir.Shape | None, seen: str) -> None:
    model = parse("t = Relu (x)\n y = Neg (t)")
    node = next(iter(model.graph))
    node.name, node.outputs[0].shape = "gather_keys", shape
    with pytest.raises(DynamicShape, match="Relu node 'gather_keys': the shape of 't' is") as raised:
        require_static(model)
    assert seen in str(raised.value)
    assert "Take sizes from the budget" in str(raised.value)


def test_require_static_looks_at_graph_inputs() -> None:
    with pytest.raises(DynamicShape, match=r"graph input: the shape of 'x' is \['batch', '8'\]"):
        require_static(parse("y = Neg (x)", inputs="float[batch,8] x"))


def test_require_static_looks_into_subgraphs() -> None:
    one = "then_branch = a () => (float[2,8] z) { t = Relu (x) z = Neg (t) }"
    other = "else_branch = b () => (float[2,8] w) { w = Neg (x) }"
    model = parse(f"y = If (c) <{one}, {other}>", inputs="float[2,8] x, bool c")
    with pytest.raises(DynamicShape, match=r"'t' is unknown"):
        require_static(model)


# -- share_weights ------------------------------------------------------------------------------------


def test_share_weights_gives_the_same_numbers_in_onnxruntime(tmp_path: Path) -> None:
    weight, x = random(64, 48), random(2, 64, seed=1)
    save(product(weight), tmp_path / "inline.onnx")
    model = product(weight)
    with WeightsFile(tmp_path / "weights.data") as weights:
        share_weights(model, weights)
    save(model, tmp_path / "shared.onnx")
    assert (tmp_path / "shared.onnx").stat().st_size < 1024 < (tmp_path / "inline.onnx").stat().st_size
    np.testing.assert_array_equal(infer(tmp_path / "shared.onnx", x=x), infer(tmp_path / "inline.onnx", x=x))
    np.testing.assert_allclose(infer(tmp_path / "shared.onnx", x=x), x @ weight, rtol=1e-4, atol=1e-4)


def test_graphs_share_one_file_and_each_tensor_stands_there_once(tmp_path: Path) -> None:
    shared, own, x = random(64, 64), random(64, 64, seed=2), random(2, 64, seed=1)
    first, second, third = product(shared), product(shared.copy(), name="other"), product(own)
    with WeightsFile(tmp_path / "weights.data") as weights:
        for model in (first, second, third):
            share_weights(model, weights)
    places = [_place(model) for model in (first, second, third)]
    assert places[0] == places[1] != places[2]
    assert (tmp_path / "weights.data").stat().st_size == 2 * shared.nbytes
    for name, model, weight in (("a", first, shared), ("b", second, shared), ("c", third, own)):
        save(model, tmp_path / f"{name}.onnx")
        np.testing.assert_allclose(infer(tmp_path / f"{name}.onnx", x=x), x @ weight, rtol=1e-4, atol=1e-4)


def test_equal_tensors_of_one_graph_stand_there_once(tmp_path: Path) -> None:
    body = "a = MatMul (x, v)\n y = MatMul (a, w)"
    model = parse(body, inputs="float[2,64] x, float[64,64] v, float[64,64] w", outputs="float[2,64] y")
    for name in ("v", "w"):
        add_weight(model, name, random(64, 64))
    with WeightsFile(tmp_path / "weights.data") as weights:
        share_weights(model, weights)
    assert _place(model, "v") == _place(model, "w")
    assert (tmp_path / "weights.data").stat().st_size == 64 * 64 * 4


def test_small_tensors_stay_in_the_graph(tmp_path: Path) -> None:
    model = product(random(8, 8))
    with WeightsFile(tmp_path / "weights.data") as weights:
        share_weights(model, weights)
    assert not isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)
    assert (tmp_path / "weights.data").stat().st_size == 0


@pytest.mark.parametrize(("columns", "is_external"), [(31, False), (32, True)])
def test_the_limit_is_1024_bytes(tmp_path: Path, columns: int, is_external: bool) -> None:
    model = product(random(8, columns))
    with WeightsFile(tmp_path / "weights.data") as weights:
        share_weights(model, weights)
    assert isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor) is is_external


def test_large_tensors_begin_on_a_page_and_middling_ones_on_64_bytes(tmp_path: Path) -> None:
    sizes = (1028, 4096, 1032, 8192, 4100)
    with WeightsFile(tmp_path / "weights.data") as weights:
        arrays = [np.full(size, index + 1, dtype=np.uint8) for index, size in enumerate(sizes)]
        places = [weights.place(memoryview(array.tobytes()), user="one") for array in arrays]
    content = (tmp_path / "weights.data").read_bytes()
    assert len(content) == weights.size
    for (offset, length), array in zip(places, arrays, strict=True):
        assert offset % (4096 if array.nbytes >= 4096 else 64) == 0
        assert content[offset : offset + length] == array.tobytes()
    assert [length for _, length in places] == list(sizes)


def test_graphs_name_the_file_beside_them(tmp_path: Path) -> None:
    model = product(random(64, 64))
    with WeightsFile(tmp_path / "weights.data") as weights:
        share_weights(model, weights)
    (initializer,) = ir.to_proto(model).graph.initializer
    entries = {entry.key: entry.value for entry in initializer.external_data}
    assert entries == {"location": "weights.data", "offset": "0", "length": str(64 * 64 * 4)}
    assert str(tmp_path).encode() not in ir.to_proto(model).SerializeToString()


def test_share_weights_twice_changes_nothing(tmp_path: Path) -> None:
    model = product(random(64, 64))
    with WeightsFile(tmp_path / "weights.data") as weights:
        share_weights(model, weights)
        before = ir.to_proto(model).SerializeToString(deterministic=True)
        share_weights(model, weights)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_weights_file_that_is_not_open_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the weights file is not open"):
        WeightsFile(tmp_path / "weights.data").place(memoryview(b"\0" * 2048), user="one")


def _place(model: ir.Model, name: str = "") -> tuple[int | None, int | None]:
    value = model.graph.initializers[name or next(iter(model.graph.initializers))]
    assert isinstance(value.const_value, ir.ExternalTensor)
    return value.const_value.offset, value.const_value.length
