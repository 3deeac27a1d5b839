"""Token maths: what must hold for any tokens, and the op's function body against it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
import onnx_ir as ir  # noqa: E402

from edgecomp.compressors._tokens import (  # noqa: E402
    compose_maps,
    group_matrix,
    kth_pairing,
    largest_r,
    merge_pairs,
    pair_tokens,
    source_map,
    top_k,
    top_k_merge,
    unmerge,
)
from edgecomp.export.merge_body import merge_body  # noqa: E402

MODES = ("wavg", "mean", "sum", "prune", "tofu")
PARTITIONS = ("alternate", "by_score")
ORDERS = ("ascending", "rank")
KINDS = ("random", "equal", "clusters", "zeros")


def tokens_of(kind: str, batch: int, tokens: int, seed: int) -> tuple[Any, ...]:
    """Return metric, x, size and scores.

    `equal` and `clusters` are full of ties, along axes, where cosines are exact: others may differ in the last bit from
    one place of a product to the next.
    """
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(batch, tokens, 5, generator=generator, dtype=torch.float64)
    if kind == "equal":
        metric = torch.eye(5, dtype=torch.float64)[0].expand_as(metric) * 2
    elif kind == "clusters":
        metric = torch.eye(5, dtype=torch.float64)[torch.randint(0, 3, (batch, tokens), generator=generator)] * 3
    elif kind == "zeros":
        metric[:, ::3] = 0
    x = torch.randn(batch, tokens, 4, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 9, (batch, tokens, 1), generator=generator).double()
    scores = torch.randint(0, 7, (batch, tokens), generator=generator).double()
    return metric, x, size, scores


@st.composite
def merges(draw: Any) -> dict[str, Any]:
    tokens = draw(st.one_of(st.integers(2, 70), st.integers(2, 1100)))
    prefix = draw(st.integers(0, min(5, tokens - 2)))
    return {
        "tokens": tokens,
        "num_prefix_tokens": prefix,
        "r": draw(st.integers(1, max(1, largest_r(tokens, prefix)))),
        "kind": draw(st.sampled_from(KINDS)),
        "mode": draw(st.sampled_from(MODES)),
        "partition": draw(st.sampled_from(PARTITIONS)),
        "order": draw(st.sampled_from(ORDERS)),
        "seed": draw(st.integers(0, 1000)),
    }


def run(case: dict[str, Any], batch: int = 2) -> tuple[Any, ...]:
    metric, x, size, scores = tokens_of(case["kind"], batch, case["tokens"], case["seed"])
    words = {key: case[key] for key in ("num_prefix_tokens", "r", "partition", "order")}
    given_scores = scores if case["partition"] == "by_score" else None
    pairing = pair_tokens(metric, given_scores, **words)
    return (pairing, x, size, *merge_pairs(pairing, x, size, mode=case["mode"]), source_map(pairing, case["tokens"]))


@given(merges())
@settings(max_examples=150, deadline=None)
def test_what_holds_for_any_tokens(case: dict[str, Any]) -> None:
    _, x, size, y, sizes, rows = run(case)
    left, prefix = case["tokens"] - case["r"], case["num_prefix_tokens"]
    assert y.shape == (2, left, 4)
    assert torch.isfinite(y).all()
    assert torch.equal(sizes.sum(1), size.sum(1))  # small whole numbers: exact
    groups = group_matrix(rows, left)
    assert torch.equal(groups.sum(1), torch.ones_like(rows))  # each input is in one output
    assert bool((groups.sum(2) >= 1).all())
    assert torch.equal(rows[:, :prefix], torch.arange(prefix, dtype=torch.int32).expand(2, -1))
    assert torch.equal(y[:, :prefix], x[:, :prefix])
    weights = {"wavg": size, "mean": torch.ones_like(size), "sum": torch.ones_like(size)}.get(case["mode"])
    if weights is not None:
        total = groups.double() @ (x * weights)
        expected = total if case["mode"] == "sum" else total / (groups.double() @ weights)
        assert torch.allclose(y, expected, rtol=0, atol=1e-12)
    alone = groups.sum(2) == 1
    assert torch.equal(y[alone], (groups.double() @ x)[alone])  # handed on bit by bit


@given(merges())
@settings(max_examples=40, deadline=None)
def test_unmerging_keeps_the_mean_of_each_group(case: dict[str, Any]) -> None:
    _, x, size, y, sizes, rows = run({**case, "mode": "wavg"})
    spread = unmerge(y, rows)
    assert spread.shape == x.shape
    assert torch.allclose((spread * size).sum(1), (x * size).sum(1), atol=1e-9)
    again, _ = spread, sizes
    groups = group_matrix(rows, y.shape[1]).double()
    assert torch.allclose(groups @ (again * size) / (groups @ size), y, atol=1e-12)


@given(merges())
@settings(max_examples=40, deadline=None)
def test_samples_do_not_mix(case: dict[str, Any]) -> None:
    metric, x, size, scores = tokens_of(case["kind"], 3, case["tokens"], case["seed"])
    words = {key: case[key] for key in ("num_prefix_tokens", "r", "partition", "order", "mode")}
    optional = [scores] if case["partition"] == "by_score" else []
    order = torch.tensor([2, 0, 1])
    straight = top_k_merge(metric, x, size, *optional, **words)
    permuted = top_k_merge(*(value[order] for value in (metric, x, size, *optional)), **words)
    for one, other in zip(straight, permuted, strict=True):
        assert torch.equal(one[order], other)


@given(st.integers(2, 60), st.integers(1, 60), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_ties_go_to_the_lower_index(count: int, k: int, seed: int) -> None:
    values = torch.randint(0, 4, (2, count), generator=torch.Generator().manual_seed(seed))
    k = min(k, count)
    expected = [sorted(range(count), key=lambda i, row=row: (-row[i], i))[:k] for row in values.tolist()]
    assert top_k(values, k).tolist() == expected


def test_the_maps_of_two_merges_compose() -> None:
    metric, x, size, _ = tokens_of("random", 2, 41, 0)
    first = top_k_merge(metric, x, size, r=9, num_prefix_tokens=1)
    second = top_k_merge(first[0], first[0], first[1], r=12, num_prefix_tokens=1)
    rows = compose_maps(first[2], second[2])
    groups = group_matrix(rows, 20).double()
    assert torch.allclose(groups @ (x * size) / (groups @ size), second[0], atol=1e-12)


@pytest.mark.parametrize(("tokens", "k", "prefix"), [(12, 3, 0), (14, 3, 1), (9, 2, 2), (50, 4, 1)])
def test_every_kth_token_receives_the_others(tokens: int, k: int, prefix: int) -> None:
    metric, x, size, _ = tokens_of("random", 2, tokens, 1)
    pairing = kth_pairing(metric, k=k, num_prefix_tokens=prefix)
    y, sizes = merge_pairs(pairing, x, size)
    rows = source_map(pairing, tokens)
    count = (tokens - prefix) // k
    assert y.shape[1] == prefix + count
    used = prefix + count * k
    assert bool((rows[:, used:] == -1).all())  # the tail is dropped
    assert bool((rows[:, :used] >= 0).all())
    assert torch.equal(sizes.sum(1), size[:, :used].sum(1))
    unit = metric / metric.norm(dim=-1, keepdim=True)
    for sample in range(2):
        ends = [prefix + k * (group + 1) - 1 for group in range(count)]
        for token in set(range(prefix, used)) - set(ends):
            similarity = [float(unit[sample, token] @ unit[sample, end]) for end in ends]
            assert int(rows[sample, token]) == prefix + similarity.index(max(similarity))


def test_nan_in_the_metric_keeps_every_index_in_range() -> None:
    metric, x, size, scores = tokens_of("random", 2, 30, 0)
    metric[0, 3:9] = float("nan")
    for partition in PARTITIONS:
        optional = [scores] if partition == "by_score" else []
        y, sizes, rows = top_k_merge(metric, x, size, *optional, r=10, num_prefix_tokens=1, partition=partition)
        assert torch.isfinite(y).all()
        assert torch.equal(sizes.sum(1), size.sum(1))
        assert bool(((rows >= 0) & (rows < 20)).all())


# -- the function body ------------------------------------------------------------------------------------------

SHAPES = [  # tokens, r, prefix, batch
    (197, 16, 1, 1), (197, 98, 1, 2), (50, 25, 0, 2), (51, 22, 5, 2), (6, 2, 2, 3), (3, 1, 0, 1), (2, 1, 0, 2),
    (300, 149, 2, 2), (300, 150, 0, 1), (145, 65, 3, 1),
]  # fmt: skip
_FLOATS = {"float32": onnx.TensorProto.FLOAT, "float16": onnx.TensorProto.FLOAT16}


def merge_model(
    inputs: dict[str, Any], *, r: int, num_prefix_tokens: int, mode: str, partition: str, order: str,
    dtype: str = "float32", opset: int = 20, largest_r: int = 0, with_map: bool = True,
) -> Any:  # fmt: skip
    """Return an ONNX model that is one merge node and its body."""
    from onnx import helper

    batch, tokens, width = inputs["x"].shape
    attributes = {"r": r, "num_prefix_tokens": num_prefix_tokens, "mode": mode, "partition": partition, "order": order}
    body = merge_body(
        mode=mode,
        partition=partition,
        order=order,
        largest_r=largest_r or r,
        with_map=with_map,
        dtype=dtype,
        opset=opset,  # type: ignore[arg-type]
    )
    made: dict[str, tuple[int, list[int]]] = {
        "y": (_FLOATS[dtype], [batch, tokens - r, width]),
        "merged_size": (onnx.TensorProto.FLOAT, [batch, tokens - r, 1]),
    }
    if with_map:
        made["src_map"] = (onnx.TensorProto.INT32, [batch, tokens])
    node = helper.make_node(
        "TopKMerge", list(inputs), list(made), domain="edgecomp",
        with_map=int(with_map), plugin_version="1", plugin_namespace="edgecomp", **attributes,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "merge",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
            for n, v in inputs.items()
        ],
        [helper.make_tensor_value_info(name, *place) for name, place in made.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("edgecomp", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[ir.to_proto(body)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def run_onnx(model: Any, inputs: dict[str, Any], threads: int = 2) -> list[Any]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: list[Any] = session.run(None, inputs)
    return found


def arrays_of(kind: str, shape: tuple[int, int, int, int], partition: str, dtype: Any = np.float32) -> dict[str, Any]:
    tokens, _, _, batch = shape
    metric, x, size, scores = (value.numpy() for value in tokens_of(kind, batch, tokens, 3))
    inputs = {"metric": metric.astype(dtype), "x": x.astype(dtype), "size": size.astype(np.float32)}
    return {**inputs, "scores": scores.astype(np.float32)} if partition == "by_score" else inputs


def expect(inputs: dict[str, Any], **words: Any) -> tuple[Any, ...]:
    """Return what the token maths gives in fp64 on the same numbers."""
    return top_k_merge(*(torch.from_numpy(value.astype(np.float64)) for value in inputs.values()), **words)


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mode", MODES)
def test_body_equals_the_token_maths(mode: str, order: str, partition: str) -> None:
    for shape, kind in itertools.product(SHAPES, KINDS):
        tokens, r, prefix, _ = shape
        inputs = arrays_of(kind, shape, partition)
        words = {"r": r, "num_prefix_tokens": prefix, "mode": mode, "partition": partition, "order": order}
        y, sizes, rows = run_onnx(merge_model(inputs, **words), inputs)  # type: ignore[arg-type]
        expected = expect(inputs, **words)
        where = f"{tokens} tokens, r={r}, prefix {prefix}, {kind}"
        assert np.array_equal(rows, expected[2].numpy()), where
        assert np.array_equal(sizes, expected[1].numpy()), where
        assert np.abs(y - expected[0].numpy()).max() <= 2e-6 * np.abs(expected[0].numpy()).max(), where


@pytest.mark.parametrize("opset", [18, 19])
@pytest.mark.parametrize("partition", PARTITIONS)
def test_body_at_older_opsets(opset: int, partition: str) -> None:
    for shape in ((50, 25, 1, 2), (300, 140, 1, 1)):
        inputs = arrays_of("random", (shape[0], shape[1] - 1, *shape[2:]), partition)
        words = {
            "r": shape[1] - 1,
            "num_prefix_tokens": 1,
            "mode": "wavg",
            "partition": partition,
            "order": "ascending",
        }
        y, _, rows = run_onnx(merge_model(inputs, opset=opset, **words), inputs)  # type: ignore[arg-type]
        expected = expect(inputs, **words)
        assert np.array_equal(rows, expected[2].numpy())
        assert np.abs(y - expected[0].numpy()).max() <= 1e-5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(197, 16, 1, 2), (300, 140, 1, 1)], ids=["at once", "in chunks"])
def test_body_in_half_precision_rounds_once(shape: tuple[int, int, int, int], mode: str) -> None:
    """Scores and sums are float32: the only error is that of rounding the result."""
    _, r, prefix, _ = shape
    inputs = arrays_of("random", shape, "alternate", np.float16)
    words = {"r": r, "num_prefix_tokens": prefix, "mode": mode, "partition": "alternate", "order": "ascending"}
    y, sizes, rows = run_onnx(merge_model(inputs, dtype="float16", **words), inputs)  # type: ignore[arg-type]
    expected = expect(inputs, **words)
    assert y.dtype == np.float16
    assert sizes.dtype == np.float32
    assert np.array_equal(rows, expected[2].numpy())
    assert np.array_equal(sizes, expected[1].numpy())
    exact = expected[0].numpy()
    assert (np.abs(y - exact) <= np.abs(exact) * 2**-11 * 1.01 + 1e-6).all()


@pytest.mark.parametrize("shape", [(197, 16, 1, 2), (300, 149, 1, 2)], ids=["at once", "in chunks"])
@pytest.mark.parametrize(
    "kind", [kind if kind == "equal" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_body_gives_the_same_bits_on_any_number_of_threads(shape: tuple[int, int, int, int], kind: str) -> None:
    inputs = arrays_of(kind, shape, "alternate")
    model = merge_model(
        inputs, r=shape[1], num_prefix_tokens=shape[2], mode="wavg", partition="alternate", order="ascending"
    )
    first = run_onnx(model, inputs, threads=1)
    for threads in (2, 3, 4, 8, 16):
        for _ in range(3):
            for one, other in zip(first, run_onnx(model, inputs, threads), strict=True):
                assert np.array_equal(one, other)


def test_one_body_serves_nodes_of_different_r() -> None:
    """A body in chunks also merges few pairs, and a single one."""
    for tokens, r in ((197, 1), (197, 16), (197, 17), (20, 9)):
        inputs = arrays_of("random", (tokens, r, 1, 2), "alternate")
        words = {"r": r, "num_prefix_tokens": 1, "mode": "wavg", "partition": "alternate", "order": "ascending"}
        y, _, rows = run_onnx(merge_model(inputs, largest_r=500, **words), inputs)  # type: ignore[arg-type]
        expected = expect(inputs, **words)
        assert np.array_equal(rows, expected[2].numpy())
        assert np.abs(y - expected[0].numpy()).max() <= 1e-5


def test_a_body_without_the_map_holds_none_of_it() -> None:
    inputs = arrays_of("random", (197, 16, 1, 1), "alternate")
    words = {"r": 16, "num_prefix_tokens": 1, "mode": "wavg", "partition": "alternate", "order": "ascending"}
    whole, short = (merge_model(inputs, with_map=with_map, **words) for with_map in (True, False))  # type: ignore[arg-type]
    for one, other in zip(run_onnx(whole, inputs)[:2], run_onnx(short, inputs), strict=True):
        assert np.array_equal(one, other)
    assert len(short.functions[0].node) < len(whole.functions[0].node)
    assert "src_map" not in {name for node in short.functions[0].node for name in node.output}
