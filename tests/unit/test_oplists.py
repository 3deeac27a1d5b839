"""The op allow-lists load, hold what vision encoders need, and state the limits of TensorRT."""

from __future__ import annotations

import pytest

from edgecomp.specs.oplist import OpList, load_oplists

LISTS = {oplist.name: oplist for oplist in load_oplists()}

# What encoders and compressors export to at opset 18 to 22.
ENCODER_OPS = [
    "Abs",
    "Add",
    "And",
    "ArgMax",
    "ArgMin",
    "Atan",
    "AveragePool",
    "BatchNormalization",
    "Cast",
    "Ceil",
    "Clip",
    "Concat",
    "Constant",
    "ConstantOfShape",
    "Conv",
    "ConvTranspose",
    "Cos",
    "CumSum",
    "DepthToSpace",
    "DequantizeLinear",
    "Div",
    "Einsum",
    "Elu",
    "Equal",
    "Erf",
    "Exp",
    "Expand",
    "EyeLike",
    "Flatten",
    "Floor",
    "Gather",
    "GatherElements",
    "GatherND",
    "Gelu",
    "Gemm",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "Greater",
    "GreaterOrEqual",
    "GridSample",
    "GroupNormalization",
    "HardSigmoid",
    "HardSwish",
    "Hardmax",
    "Identity",
    "If",
    "InstanceNormalization",
    "IsInf",
    "IsNaN",
    "LayerNormalization",
    "LeakyRelu",
    "Less",
    "LessOrEqual",
    "Log",
    "LogSoftmax",
    "Loop",
    "MatMul",
    "Max",
    "MaxPool",
    "Min",
    "Mish",
    "Mod",
    "Mul",
    "Neg",
    "Not",
    "OneHot",
    "Or",
    "PRelu",
    "Pad",
    "Pow",
    "QuantizeLinear",
    "Range",
    "Reciprocal",
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
    "Relu",
    "Reshape",
    "Resize",
    "Round",
    "Scan",
    "ScatterElements",
    "ScatterND",
    "Selu",
    "Shape",
    "Sigmoid",
    "Sin",
    "Size",
    "Slice",
    "Softmax",
    "Softplus",
    "SpaceToDepth",
    "Split",
    "Sqrt",
    "Squeeze",
    "Sub",
    "Tan",
    "Tanh",
    "Tile",
    "TopK",
    "Transpose",
    "Trilu",
    "Unsqueeze",
    "Where",
    "Xor",
]
# Not on every TensorRT: a list must take a position, either way.
LATER_OPS = ["Attention", "RMSNormalization", "RoiAlign", "RotaryEmbedding", "Swish"]

each_list = pytest.mark.parametrize("oplist", LISTS.values(), ids=LISTS.keys())


def test_three_lists_are_there() -> None:
    assert list(LISTS) == ["tensorrt-10", "tensorrt-11", "tensorrt-rtx"]


@each_list
def test_holds_what_encoders_need(oplist: OpList) -> None:
    assert sorted(set(ENCODER_OPS) - set(oplist.ops)) == []
    assert sorted(set(LATER_OPS) - set(oplist.ops) - set(oplist.refused)) == []


@each_list
def test_takes_the_opsets_of_the_exporter(oplist: OpList) -> None:
    low, high = oplist.opset
    assert low <= 18
    assert high >= 22  # 18: what the exporter builds at; 22: the first with a bfloat16 Conv


@each_list
def test_a_condition_comes_with_reason_and_remedy(oplist: OpList) -> None:
    silent = [name for name, rule in oplist.ops.items() if rule.constant_inputs or rule.attributes or rule.types]
    assert [name for name in silent if not (oplist.ops[name].reason and oplist.ops[name].remedy)] == []


@each_list
def test_limits_of_topk_and_resize(oplist: OpList) -> None:
    topk = oplist.ops["TopK"]
    assert topk.constant_inputs == (1,)
    assert topk.largest_constant == {"1": 3840}
    assert oplist.ops["Resize"].attributes["antialias"] == ("0",)
    assert oplist.ops["Resize"].attributes["mode"] == ("nearest", "linear", "cubic")
    assert oplist.ops["OneHot"].constant_inputs == (1,)
    assert oplist.ops["CumSum"].constant_inputs == (1,)
    assert oplist.ops["GridSample"].max_rank == 4


@each_list
@pytest.mark.parametrize("op", ["ScatterElements", "ScatterND"])
def test_scatter_takes_no_reduction(oplist: OpList, op: str) -> None:
    rule = oplist.ops[op]
    assert set(rule.attributes["reduction"]) <= {"none"}
    assert "MatMul" in rule.remedy


def test_tensorrt_10_is_held_to_the_parser_of_jetpack_6() -> None:
    ops = LISTS["tensorrt-10"].ops
    assert ops["ScatterND"].attributes["reduction"] == ()  # 10.9 is the first to take "none"
    assert "linear" not in ops["GridSample"].attributes["mode"]  # sampled as nearest, without an error
    assert {"Attention", "RMSNormalization", "RotaryEmbedding"} <= set(LISTS["tensorrt-10"].refused)


@each_list
@pytest.mark.parametrize("op", ["AffineGrid", "Compress", "DeformConv", "NonZero", "Unique"])
def test_refused_ops_have_a_way_out(oplist: OpList, op: str) -> None:
    assert oplist.refused[op].reason
    assert oplist.refused[op].remedy


@each_list
def test_nonzero_points_to_a_fixed_number(oplist: OpList) -> None:
    assert "depends on the data" in oplist.refused["NonZero"].reason
    assert "TopK" in oplist.refused["NonZero"].remedy
