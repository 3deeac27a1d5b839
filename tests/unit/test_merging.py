"""Mergers: schedules, what hosts they stand in, and what a graph must hold for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
ir = pytest.importorskip("onnx_ir")

from timm.models.vision_transformer import (  # noqa: E402
    ParallelScalingBlock,
    ResPostBlock,
    VisionTransformer,
)

from edgecomp.backbones.inside import InsideModel  # noqa: E402
from edgecomp.backbones.timm import TimmHost  # noqa: E402
from edgecomp.compressors._merging import merge_steps, parse_r  # noqa: E402
from edgecomp.compressors.tome import ToMe, ToMeParams  # noqa: E402
from edgecomp.errors import ExportError, InvalidSpec  # noqa: E402
from edgecomp.export.lower import lower  # noqa: E402
from edgecomp.export.passes import add_merge_body, inline_functions  # noqa: E402
from edgecomp.specs import Site, TokenBudget, load_recipe  # noqa: E402

# -- schedules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "r", "inflect", "expected"),
    [
        (4, 6, 0.0, (6, 6, 6, 6)),
        (4, 5, -1.0, (10, 6, 3, 0)),
        (4, 5, 1.0, (0, 3, 6, 10)),
        (1, 7, -1.0, (14,)),
        (3, 5, 0.5, (2, 5, 8)),
    ],
)
def test_schedule_of_r(depth: int, r: int, inflect: float, expected: tuple[int, ...]) -> None:
    assert parse_r(depth, r, inflect) == expected


def steps(*, tokens: int = 196, prefix: int = 1, depth: int = 12, keep: int = 0, **params: Any) -> tuple[int, ...]:
    return merge_steps(ToMeParams(**params), tokens=tokens, num_prefix_tokens=prefix, depth=depth, keep=keep)


def test_r_is_clipped_where_few_tokens_are_left() -> None:
    """ViT with r = 16: 197 tokens become 11, since the last block has only 21 to halve."""
    assert steps(r=16) == (*[16] * 11, 10)
    assert 197 - sum(steps(r=16)) == 11


@pytest.mark.parametrize("keep", [196, 195, 150, 98, 41, 40, 11, 2, 1])
def test_a_budget_is_met_exactly_with_a_constant_r(keep: int) -> None:
    found = steps(keep=keep)
    assert 196 - sum(found) == keep
    left = 196
    for r in found:
        assert 0 <= r <= left // 2
        left -= r
    constant = max(found)
    whole = [r for r in found if r == constant]
    assert list(found[: len(whole)]) == whole or keep < 11  # clipped by halving near the end


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"r": 150}, "r=150 is above 98, the most that one merge of 196 tokens can remove"),
        ({"schedule": (16, 16)}, "params.schedule has 2 entries and the host 12 blocks"),
        ({"schedule": (120, *[0] * 11)}, "r=120 is above 98"),
        ({"schedule": (1,) * 12, "r": 3}, "params.r=3 and params.schedule="),
        ({"r": 13, "keep": 50}, "leaves 40 of 196 tokens and the budget says 50"),
        ({"keep": 1, "depth": 3}, "budget 1 is below 25, the fewest that 3 merges leave of 196 tokens"),
    ],
)
def test_what_no_schedule_can_do(words: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        steps(**words)
    assert text in str(caught.value)


# -- hosts ------------------------------------------------------------------------------------------------------

HOSTS: dict[str, dict[str, Any]] = {
    "class token": {},
    "no class token, mean": {"class_token": False, "global_pool": "avg"},
    "no class token, attention pool": {"class_token": False, "global_pool": "map"},
    "class token, mean": {"global_pool": "avg"},
    "class and registers": {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-1},
    "LayerScale": {"init_values": 0.5, "no_embed_class": True},
    "norms of queries and keys": {"qk_norm": True},
    "norm in front": {"pre_norm": True},
    "dropouts": {"drop_rate": 0.3, "attn_drop_rate": 0.3, "drop_path_rate": 0.3, "proj_drop_rate": 0.3},
}


def make_host(name: str, words: dict[str, Any], *, keep_head: bool = True, distilled: bool = False) -> TimmHost:
    from timm.models.deit import VisionTransformerDistilled

    torch.manual_seed(0)
    kind = VisionTransformerDistilled if distilled else VisionTransformer
    vit = kind(img_size=48, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=7, **words).double().eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return TimmHost(vit, name=name, feature_layer=-1, keep_head=keep_head)


def place(host: TimmHost, output: str, **params: Any) -> InsideModel:
    site = Site("inside", 48, 36, 24, host.num_prefix_tokens, 3, host.num_classes)
    given = ToMeParams(**params)
    (left,) = ToMe.default_counts(given, site) or (36,)
    compressor = ToMe(given, site, TokenBudget(36, left, host.num_prefix_tokens), output)  # type: ignore[arg-type]
    return InsideModel(compressor, host, preprocess=None, input_dtype="float32").eval()


@pytest.fixture
def image() -> Any:
    return torch.randn(2, 3, 48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", [*HOSTS, "distilled"])
def test_host_with_a_merger_inside(name: str, image: Any) -> None:
    distilled = name == "distilled"
    host = make_host(name, HOSTS.get(name, {}), distilled=distilled)
    prefix = {"class and registers": 5, "distilled": 2}.get(name, 0 if "no class" in name else 1)
    assert host.num_prefix_tokens == prefix
    with torch.inference_mode():
        nothing = place(host, "logits", schedule=(0, 0, 0))
        assert torch.allclose(nothing(image)[0], host.model(image), atol=1e-12)  # the host as it is
        tokens, size, rows = place(host, "tokens", schedule=(0, 0, 0))(image)
        assert torch.allclose(tokens, host.model.forward_features(image), atol=1e-12)
        assert bool((size == 1).all())
        assert torch.equal(rows, torch.arange(36 + prefix, dtype=torch.int32).expand(2, -1))
        for output in ("tokens", "logits"):
            model = place(host, output, r=7)
            for got, expected in zip(model(image), model.reference()(image), strict=True):
                assert got.shape == expected.shape
                assert float((got.double() - expected.double()).abs().max()) <= 1e-10
        tokens, size, rows = place(host, "tokens", r=7)(image)
        assert tokens.shape == (2, prefix + 36 - 21, 24)
        assert torch.equal(size.sum(1), torch.full((2, 1), 36.0 + prefix, dtype=torch.float64))
        assert torch.equal(rows[:, :prefix], torch.arange(prefix, dtype=torch.int32).expand(2, -1))
        counts = torch.zeros(2, tokens.shape[1], dtype=torch.float64)
        assert torch.equal(counts.scatter_add(1, rows.long(), torch.ones_like(rows).double()), size.squeeze(-1))


@pytest.mark.parametrize("metric", ["k", "x"])
@pytest.mark.parametrize("prop_attn", [True, False])
@pytest.mark.parametrize("order", ["ascending", "rank"])
def test_options_equal_the_original(metric: str, prop_attn: bool, order: str, image: Any) -> None:
    host = make_host("host", {"reg_tokens": 2})
    model = place(host, "tokens", r=6, metric=metric, prop_attn=prop_attn, order=order)
    with torch.inference_mode():
        for got, expected in zip(model(image), model.reference()(image), strict=True):
            assert float((got.double() - expected.double()).abs().max()) <= 1e-10


def test_every_kth_token_stays_in_two_blocks(image: Any) -> None:
    """What fills no group of k is dropped, in the first block and in the second, and has no row."""
    host = make_host("host", {})
    site = Site("inside", 48, 36, 24, 1, 3, host.num_classes)
    params = ToMeParams(matching="kth", k=5, kth_blocks=(0, 2))
    assert ToMe.default_counts(params, site) == (1,)
    model = InsideModel(
        ToMe(params, site, TokenBudget(36, 1, 1)), host, preprocess=None, input_dtype="float32"
    ).eval()  # 36 -> 7 -> 1
    with torch.inference_mode():
        found, expected = model(image), model.reference()(image)
    for got, wanted in zip(found, expected, strict=True):
        assert float((got.double() - wanted.double()).abs().max()) <= 1e-10
    rows = found[2]
    assert bool((rows[:, 36] == -1).all())  # the tail of the first block: 36 = 7 * 5 + 1
    assert int((rows == -1).sum(1).max()) > 1
    assert set(rows.flatten().tolist()) == {-1, 0, 1}


@pytest.mark.parametrize("block", [ParallelScalingBlock, ResPostBlock])
def test_blocks_that_it_does_not_know_are_refused(block: Any) -> None:
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, block_fn=block)
    host = TimmHost(vit, name="odd", feature_layer=-1)
    site = Site("inside", 32, 16, 24, 1, 2)
    with pytest.raises(InvalidSpec, match=f"block 0 of odd is a {block.__name__}"):
        InsideModel(ToMe(ToMeParams(r=2), site, TokenBudget(16, 12, 1)), host, preprocess=None, input_dtype="float32")


def test_rotary_positions_are_refused() -> None:
    eva = timm.create_model("eva02_tiny_patch14_224", pretrained=False, img_size=28, depth=1)
    with pytest.raises(InvalidSpec, match=r"is of class Eva with rotary positions, .*; hosts that work are vit, deit"):
        TimmHost(eva, name="eva02", feature_layer=-1)


def test_logits_need_a_classifier() -> None:
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=0)
    with pytest.raises(InvalidSpec, match="has no classifier"):
        TimmHost(vit, name="headless", feature_layer=-1, keep_head=True)
    with pytest.raises(InvalidSpec, match="output logits comes from a host's classifier"):
        ToMe(ToMeParams(), Site("after", tokens_in=16, embed_dim=8), TokenBudget(16, 8), "logits")


# -- graphs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merged() -> Any:
    """Return a graph with a merger inside a tiny host, as it is lowered."""
    model = place(make_host("host", {}).float(), "tokens", r=6)
    return lower(model, inputs=model.input_specs(), outputs=model.output_specs(), opset=20)


def test_the_body_is_added_once_and_inlined(merged: Any) -> None:
    model = merged.clone()
    assert len([node for node in model.graph if node.op_type == "TopKMerge"]) == 3
    add_merge_body(model)
    assert [key[:2] for key in model.functions] == [("edgecomp", "TopKMerge")]
    assert model.opset_imports["edgecomp"] == 1
    flat = model
    inline_functions(flat)
    assert not flat.functions
    assert {node.domain for node in flat.graph} == {""}
    ops = [node.op_type for node in flat.graph]
    assert ops.count("TopK") == 3
    for node in flat.graph:
        assert "reduction" not in node.attributes
        if node.op_type == "TopK":
            assert ir.convenience.get_const_tensor(node.inputs[1]).numpy().tolist() == [6]


def test_a_graph_without_merges_is_left_alone() -> None:
    model = place(make_host("host", {}).float(), "tokens", schedule=(0, 0, 0))
    graph = lower(model, inputs=model.input_specs(), outputs=model.output_specs(), opset=20)
    before = ir.to_proto(graph)
    add_merge_body(graph)
    inline_functions(graph)
    assert ir.to_proto(graph) == before


@pytest.mark.parametrize("name", ["r", "plugin_version", "plugin_namespace"])
def test_a_node_that_lost_an_attribute_is_refused(merged: Any, name: str) -> None:
    model = merged.clone()
    node = next(node for node in model.graph if node.op_type == "TopKMerge")
    del node.attributes[name]
    with pytest.raises(ExportError, match=rf"has no attribute {name}"):
        add_merge_body(model)


def test_nodes_of_two_kinds_are_refused(merged: Any) -> None:
    model = merged.clone()
    node = next(node for node in model.graph if node.op_type == "TopKMerge")
    node.attributes["mode"] = ir.AttrString("mode", "mean")
    with pytest.raises(ExportError, match="share mode, partition, order and type"):
        add_merge_body(model)


def test_inspect_tells_what_a_merge_holds(merged: Any, tmp_path: Path) -> None:
    from edgecomp import api
    from edgecomp.report.contents import describe_contents

    model = merged.clone()
    add_merge_body(model)
    ir.save(model, tmp_path / "merged.onnx")
    found: Any = api.inspect(tmp_path / "merged.onnx")
    assert found.ops["edgecomp::TopKMerge"] == 3
    assert found.functions["edgecomp::TopKMerge"]["ScatterND"] == 2
    assert found.topk == ("r (in edgecomp::TopKMerge)",)
    assert found.reducing_scatters == ()
    assert "scatters   with a reduction: none" in describe_contents(found)
    body = next(iter(model.functions.values()))
    scatter = next(node for node in body if node.op_type == "ScatterND")
    scatter.attributes["reduction"] = ir.AttrString("reduction", "add")
    scatter.name = "planted"
    ir.save(model, tmp_path / "planted.onnx")
    planted: Any = api.inspect(tmp_path / "planted.onnx")
    assert planted.reducing_scatters == ("edgecomp::TopKMerge: ScatterND 'planted'",)
    flattened = merged_with_body(merged)
    inline_functions(flattened)
    ir.save(flattened, tmp_path / "flat.onnx")
    flat: Any = api.inspect(tmp_path / "flat.onnx")
    assert flat.topk == ("6", "6", "6")


def merged_with_body(model: Any) -> Any:
    whole = model.clone()
    add_merge_body(whole)
    return whole


def test_given_prefix_tokens_pass_untouched() -> None:
    """Those in front of given tokens come out first, as they went in, whoever merges behind them."""
    merger = ToMe.from_recipe(load_recipe("tome"), 5, preset="smoke-kth").eval()
    tokens = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        merged, size, source_map = merger(tokens)
    assert torch.equal(merged[:, :2], tokens[:, :2])
    assert torch.equal(size[:, :2], torch.ones(2, 2, 1))
    assert source_map[:, :2].tolist() == [[0, 1], [0, 1]]
    behind = source_map[:, 2:]
    assert bool(((behind >= 2) | (behind == -1)).all())  # -1: what "kth" drops at the end
