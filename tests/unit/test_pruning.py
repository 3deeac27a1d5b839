"""Selection, schedules and what a host hands over: the parts that all pruners share, and the corners of each."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from edgecomp.backbones.assemble import assemble  # noqa: E402 - torch first, or skip
from edgecomp.backbones.attention import attend, attend_fused  # noqa: E402
from edgecomp.backbones.inside import InsideModel  # noqa: E402
from edgecomp.backbones.placed import PlacedModel  # noqa: E402
from edgecomp.backbones.timm import TimmHost  # noqa: E402
from edgecomp.compressors._pruning import (  # noqa: E402
    compose_index,
    geometric_counts,
    others,
    residual_token,
    scheduled_counts,
    select,
)
from edgecomp.compressors._saliency import (  # noqa: E402
    colour_variance,
    edge_density,
    object_proxy,
    text_likelihood,
)
from edgecomp.compressors.adaptive_lookupvit import AdaptiveLookupViT, AdaptiveLookupViTParams  # noqa: E402
from edgecomp.compressors.attention_pruning import AttentionPruning, AttentionPruningParams  # noqa: E402
from edgecomp.compressors.compress_to_budget import (  # noqa: E402
    CompressToBudget,
    CompressToBudgetParams,
    schedule,
)
from edgecomp.compressors.dynamicvit import DynamicViT, DynamicViTParams  # noqa: E402
from edgecomp.compressors.evit import EViT, EViTParams  # noqa: E402
from edgecomp.compressors.fastervlm import FasterVLM  # noqa: E402
from edgecomp.compressors.prumerge import PruMerge, PruMergeParams  # noqa: E402
from edgecomp.compressors.spatial_frequency_protect import SpatialFrequencyProtect  # noqa: E402
from edgecomp.compressors.visionzip import VisionZip, VisionZipParams  # noqa: E402
from edgecomp.compressors.vispruner import VisPruner, VisPrunerParams  # noqa: E402
from edgecomp.errors import InvalidSpec  # noqa: E402
from edgecomp.specs import Site, TokenBudget, load_recipe  # noqa: E402
from edgecomp.specs.order import Order  # noqa: E402

# -- selection --------------------------------------------------------------------------------------------------


def test_select_has_a_defined_order() -> None:
    """Highest first, then the lower index; NaN behind every number; minus infinity too, in its place."""
    nan, low = math.nan, -math.inf
    scores = torch.tensor([[1.0, 3.0, 3.0, nan, 2.0, low], [nan, nan, nan, nan, nan, nan], [0.5] * 6])
    assert select(scores, 4, order="rank").tolist() == [[1, 2, 4, 0], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert select(scores, 4).tolist() == [[0, 1, 2, 4], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_what_is_not_kept() -> None:
    index = torch.tensor([[0, 3]])
    assert others(index, 5).tolist() == [[False, True, True, False, True]]
    tokens = torch.arange(10.0).reshape(1, 5, 2)
    weights = torch.tensor([[9.0, 0.5, 0.25, 9.0, 1.0]])
    expected = 0.5 * tokens[:, 1] + 0.25 * tokens[:, 2] + tokens[:, 4]
    assert torch.equal(residual_token(tokens, weights, index), expected.unsqueeze(1))


def test_rows_of_two_selections() -> None:
    first, second = torch.tensor([[0, 4, 7, -1]]), torch.tensor([[2, 3, -1, 0]])
    assert compose_index(None, second) is second
    assert compose_index(first, second).tolist() == [[7, -1, -1, 0]]


# -- schedules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "exponential", "step", "cosine"])
@pytest.mark.parametrize("of", ["original", "current"])
@pytest.mark.parametrize("keep", [1, 7, 49, 98, 195, 196])
def test_schedules_fall_and_end_at_the_budget(schedule: Any, of: Any, keep: int) -> None:
    counts = scheduled_counts(schedule, tokens=196, depth=12, keep=keep, of=of)
    assert len(counts) == 12
    assert counts[-1] == keep
    assert list(counts) == sorted(counts, reverse=True)
    assert max(counts) <= 196


def test_schedules_are_the_notes_formulas() -> None:
    """Half removed of 100 tokens over 4 blocks, of the original length: f = 0.5."""
    words: dict[str, Any] = {"tokens": 100, "depth": 4, "keep": 50}
    assert scheduled_counts("linear", **words) == (88, 75, 63, 50)  # 12.5, 25, 37.5 and 50 removed, rounded down
    assert scheduled_counts("step", **words) == (100, 100, 50, 50)
    assert scheduled_counts("cosine", **words) == (93, 76, 58, 50)
    assert scheduled_counts("exponential", **words) == (91, 80, 66, 50)
    compounded = scheduled_counts("linear", **words, of="current")
    assert compounded[0] > 88
    assert scheduled_counts("constant", **words, blocks=(1, 3)) == (100, 71, 71, 50)


def test_tables_and_lines() -> None:
    words: dict[str, Any] = {"tokens": 100, "depth": 6, "keep": 0}
    assert scheduled_counts("table", **words, table=[(1, 0.7), (4, 0.35)]) == (100, 70, 70, 70, 35, 35)
    assert scheduled_counts("table", **words, table=[(1, 0.7), (4, 0.5)], of="current") == (100, 70, 70, 70, 35, 35)
    assert scheduled_counts("piecewise", **words, table=[(5, 0.5), (1, 1.0)]) == (100, 100, 88, 75, 63, 50)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"schedule": "table", "table": []}, "params.table is empty"),
        ({"schedule": "table", "table": [(12, 0.5)]}, "names block 12"),
        ({"schedule": "table", "table": [(3, 1.5)]}, "holds 1.5"),
        ({"schedule": "piecewise", "table": [(3, 0.0)]}, "holds 0.0"),
        ({"schedule": "table", "table": [(3, 0.7), (3, 0.5)]}, "names block 3"),
        ({"schedule": "table", "table": [(3, 0.5)]}, "leaves 98 of 196 tokens and the budget says 49"),
        ({"schedule": "constant", "blocks": (3, 3)}, r"params.blocks=\[3, 3\]: name blocks from 0 to 11"),
        ({"schedule": "constant", "blocks": (12,)}, r"params.blocks=\[12\]"),
        ({"schedule": "constant", "blocks": ()}, r"params.blocks=\[\]"),
    ],
)
def test_schedules_that_cannot_be(words: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSpec, match=message):
        scheduled_counts(words.pop("schedule"), tokens=196, depth=12, keep=49, **words)


def test_factors_of_the_papers() -> None:
    """EViT's and DynamicViT's 0.7 at blocks 3, 6 and 9 of 12."""
    site = Site("inside", 224, 196, 384, 1, 12, 1000, has_class_token=True)
    assert EViT.default_counts(EViTParams(), site) == (71,)
    assert EViT(EViTParams(), site, TokenBudget(196, 71, 1)).counts[::3] == (196, 139, 99, 71)
    assert EViT.default_counts(EViTParams(fuse=False), site) == (68,)
    one_goes = EViT(EViTParams(keep_rate=0.99), site, TokenBudget(196, 196, 1))  # and the fused token comes: 196 stay
    assert [block for block in range(12) if one_goes.acts_in(block)] == [3, 6, 9]
    assert DynamicViT.default_counts(DynamicViTParams(), site) == (67,)
    assert DynamicViT(DynamicViTParams(), site, TokenBudget(196, 67, 1)).counts[::3] == (196, 137, 96, 67)
    assert EViT(EViTParams(), site, TokenBudget(196, 49, 1)).counts == geometric_counts(
        (3, 6, 9), tokens=196, depth=12, keep=49
    )


# -- what a host hands over -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def host() -> TimmHost:
    torch.manual_seed(0)
    return TimmHost(timm.create_model("test_vit", img_size=64).double().eval(), name="test_vit", feature_layer=-2)


@pytest.fixture(scope="module")
def image() -> Any:
    return torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("form", [attend, attend_fused])
def test_a_host_hands_over_what_its_attention_saw(host: TimmHost, image: Any, form: Any) -> None:
    """Against weights computed by hand from the blocks' own inputs."""
    names = ("class_attention", "received_attention", "cumulative_attention", "attention_output", "class_query", "keys")
    with torch.inference_mode():
        tokens, found = host.look(image, names, form)
        assert torch.allclose(tokens[:, 1:], host(image), atol=1e-12)
        x, total = host.embed(image), 0.0
        for block in host.model.blocks:
            normed, attention = block.norm1(x), block.attn
            qkv = attention.qkv(normed).reshape(2, 17, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
            weights = (qkv[0] @ qkv[1].mT / qkv.shape[-1] ** 0.5).softmax(-1)
            total = total + weights.mean(2)[:, :, 1:]
            out = attention(normed)
            x = block(x)
    expected = {
        "class_attention": weights[:, :, 0, 1:],
        "received_attention": weights.mean(2)[:, :, 1:],
        "cumulative_attention": total,
        "attention_output": out[:, 1:],
        "class_query": qkv[0][:, :, 0].flatten(1),
        "keys": qkv[1].transpose(1, 2).flatten(2),
    }
    for name in names:
        assert torch.allclose(found[name], expected[name], atol=1e-12), name


def test_a_host_without_class_token_is_refused() -> None:
    vit = timm.create_model("test_vit", img_size=64, class_token=False, global_pool="avg")
    bare = TimmHost(vit, name="bare", feature_layer=-1)
    pruner = FasterVLM(FasterVLM.Params(), bare.site, TokenBudget(16, 4))
    with pytest.raises(InvalidSpec, match="FasterVLM reads class_attention, and bare has no class token"):
        PlacedModel(pruner, bare, preprocess=None)
    inside = Site("inside", 64, 16, 64, 0, 6)
    with pytest.raises(InvalidSpec, match="this host has no class token"):
        EViT(EViTParams(), inside, TokenBudget(16, 4))
    with pytest.raises(InvalidSpec, match=r"params\.score=cls-attention reads the class token"):
        AttentionPruning(AttentionPruningParams(), inside, TokenBudget(16, 4))


@pytest.mark.parametrize(
    "score", ["cls-attention", "received-attention", "cumulative-attention", "norm", "hybrid", "multimodal", "random"]
)
@pytest.mark.parametrize("dropped", ["nothing", "residual", "merge"])
def test_every_score_inside_a_host(score: Any, dropped: Any, image: Any) -> None:
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", img_size=64).double().eval()
    inside = TimmHost(vit, name="test_vit", feature_layer=-1)
    site = Site("inside", 64, 16, 64, 1, 6, has_class_token=True, num_heads=inside.site.num_heads)
    torch.set_default_dtype(torch.float64)
    try:
        pruner = AttentionPruning(AttentionPruningParams(score=score, dropped=dropped), site, TokenBudget(16, 5, 1))
    finally:
        torch.set_default_dtype(torch.float32)
    model = InsideModel(pruner, inside, preprocess=None, input_dtype="float32").eval()
    with torch.inference_mode():
        kept, index = model(image)
        expected, places = model.reference()(image)
    assert kept.shape == (2, 6, 64)
    assert torch.allclose(kept, expected, atol=1e-11)
    assert torch.equal(index, places)
    assert (index[:, 0] == 0).all()
    real = index[index >= 0]
    assert int(real.max()) <= 16
    assert bool((index < 0).any()) == (dropped == "residual")


@pytest.mark.parametrize("score", ["cls-attention", "cumulative-attention", "hybrid", "multimodal", "text-likelihood"])
def test_every_score_after_a_host(score: Any, host: TimmHost, image: Any) -> None:
    pruner = AttentionPruning(AttentionPruningParams(score=score, order="rank"), host.site, TokenBudget(16, 5))
    from edgecomp.specs import Preprocess

    preprocess = Preprocess(64, 1.0, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    model = PlacedModel(pruner, host, preprocess=preprocess).double().eval()
    assert [spec.name for spec in model.input_specs()] == ["image"]
    with torch.inference_mode():
        kept, index = model(image)
        expected, places = model.reference()(image)
    assert torch.equal(index, places)
    assert torch.allclose(kept, expected, atol=1e-12)


# -- counts that the data decide --------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["rank", "raster"])
@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.5, 0.71, 0.99])
@pytest.mark.parametrize("ties", [False, True])
def test_quantile_keeps_what_torch_says(quantile: float, ties: bool, order: Any) -> None:
    """With ties fewer tokens stay than without; the rows behind the count are zero."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(4, 30, 8, dtype=torch.float64, generator=generator)
    attention = torch.rand(4, 1, 30, dtype=torch.float64, generator=generator)
    if ties:
        attention = (attention * 5).floor() / 5
    params = AttentionPruningParams(quantile=quantile, order=order)
    site = Site("after", 0, 30, 8, num_heads=1)
    (rows,) = AttentionPruning.default_counts(params, site)
    assert rows == max(1, 29 - int(quantile * 29))
    kept, index, count, mask = AttentionPruning(params, site, TokenBudget(30, rows)).double()(tokens, attention)
    bound = torch.quantile(attention[:, 0], quantile, dim=1)
    for sample in range(4):
        above = (attention[sample, 0] > bound[sample]).nonzero()[:, 0]
        if order == "rank":
            above = above[torch.argsort(attention[sample, 0, above], descending=True, stable=True)]
        assert int(count[sample]) == len(above)
        assert ties or len(above) == rows
        assert index[sample].tolist() == above.tolist() + [-1] * (rows - len(above))
        assert torch.equal(kept[sample, : len(above)], tokens[sample, above])
        assert not kept[sample, len(above) :].any()
        assert mask[sample].tolist() == [place < len(above) for place in range(rows)]


def test_a_threshold_above_all_scores_keeps_nothing() -> None:
    params = AttentionPruningParams(threshold=2.0)
    pruner = AttentionPruning(params, Site("after", 0, 9, 4, num_heads=1), TokenBudget(9, 9))
    kept, index, count, mask = pruner(torch.randn(1, 9, 4), torch.rand(1, 1, 9))
    assert not kept.any()
    assert index.tolist() == [[-1] * 9]
    assert count.tolist() == [0]
    assert not mask.any()


def test_prumerge_rounds_as_the_published_code() -> None:
    """int(N * (count / N)) is one less than the count for some counts, and so is what is kept."""
    pruner = PruMerge(PruMergeParams(), Site("after", 0, 49, 8, 1, num_heads=1), TokenBudget(49, 20, 1))
    assert pruner.kept_counts[:10].tolist() == [0, 0, 1, 3, 3, 5, 6, 7, 7, 9]


# -- corners ----------------------------------------------------------------------------------------------------


def test_vispruner_takes_odd_counts() -> None:
    """The published code fails there; 31 tokens, 3 important: 28 left, then 20, 12, 6, 3."""
    pruner = VisPruner(VisPrunerParams(), Site("after", 0, 31, 8, num_heads=2), TokenBudget(31, 6))
    assert pruner.rounds() == (8, 8, 6, 3)
    tokens, attention = torch.randn(2, 31, 8), torch.rand(2, 2, 31)
    for got, expected in zip(pruner(tokens, attention), pruner.reference()(tokens, attention), strict=True):
        assert torch.equal(got, expected)


def test_visionzip_shares_the_budget_as_the_paper() -> None:
    site = Site("after", 0, 576, 16, 1, num_heads=2)
    shares = [VisionZip(VisionZipParams(), site, TokenBudget(576, keep, 1)) for keep in (64, 128, 192)]
    assert [(one.dominant, one.contextual) for one in shares] == [(54, 10), (108, 20), (162, 30)]
    with pytest.raises(InvalidSpec, match="leaves 0 dominant ones"):
        VisionZip(VisionZipParams(contextual=4), site, TokenBudget(576, 4, 1))


@pytest.mark.parametrize(
    ("params", "budget", "message"),
    [
        ({"threshold": 0.1, "quantile": 0.5}, 4, "give one"),
        ({"threshold": float("nan")}, 4, "params.threshold=nan is no finite number"),
        ({"threshold": 0.1, "dropped": "merge"}, 4, "needs a fixed count"),
        ({"dropped": "residual"}, 1, "no row left for a kept token"),
    ],
)
def test_parameters_that_exclude_each_other(params: dict[str, Any], budget: int, message: str) -> None:
    with pytest.raises(InvalidSpec, match=message):
        AttentionPruning(AttentionPruningParams(**params), Site("after", 0, 9, 4), TokenBudget(9, budget))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"score": "text-likelihood"}, "is not known inside a host"),
        ({"quantile": 0.5}, "take a fixed one"),
    ],
)
def test_parameters_that_stand_after_a_host_alone(params: dict[str, Any], message: str) -> None:
    site = Site("inside", 64, 16, 64, 1, 6, has_class_token=True)
    with pytest.raises(InvalidSpec, match=message):
        AttentionPruning(AttentionPruningParams(**params), site, TokenBudget(16, 4, 1))


# -- nested tables, and the schedule to a budget ----------------------------------------------------------------


def test_a_prefix_of_a_larger_table_is_the_smaller_one() -> None:
    """Row by row, bit by bit in fp64 up to the order of sums: entries never read each other."""
    params = AdaptiveLookupViTParams(tokens=50, context_dim=32, latents=128, num_heads=2, head_dim=16)
    site = Site("after", 0, 50, 32)
    torch.manual_seed(0)
    whole = AdaptiveLookupViT(params, site, TokenBudget(50, 50)).double()
    torch.nn.init.normal_(whole.latents)
    tokens = torch.randn(2, 50, 32, dtype=torch.float64)
    with torch.inference_mode():
        (expected,) = whole(tokens)
        for count in (1, 7, 32, 49):
            part = AdaptiveLookupViT(params, site, TokenBudget(50, count)).double()
            part.load_state_dict(whole.state_dict())
            (got,) = part(tokens)
            assert torch.allclose(got, expected[:, :count], rtol=0, atol=1e-13)
    with pytest.raises(InvalidSpec, match="have no nested budgets"):
        AdaptiveLookupViT(AdaptiveLookupViTParams(family="flamingo"), site, TokenBudget(50, 32))


@pytest.mark.parametrize("tokens", [2, 7, 64, 196, 576, 577])
def test_schedule_ends_exactly_at_the_budget(tokens: int) -> None:
    """For every budget: each step removes something, a merge at most half, and the last ends there."""
    params = CompressToBudgetParams()
    for budget in range(1, tokens + 1):
        left = tokens
        for step in schedule(tokens, budget, params):
            assert budget <= step.keep < left
            assert step.kind != "merge" or step.keep >= left - left // 2
            left = step.keep
        assert left == budget
    assert schedule(576, 400, params) == (("drop", 400),)
    assert [step.kind for step in schedule(576, 64, params)][:3] == ["merge"] * 3


def test_near_duplicates_go_and_the_first_of_them_stays() -> None:
    x = torch.eye(6, 8, dtype=torch.float64)
    tokens = torch.cat([x[:3], x[1:2] * 2, x[3:5], x[0:1], x[5:]]).unsqueeze(0)  # 3 repeats 1, and 6 repeats 0
    module = CompressToBudget(CompressToBudgetParams(), Site("after", 0, 8, 8), TokenBudget(8, 6)).double()
    merged, size, source_map = module(tokens)
    assert source_map.tolist() == [[0, 1, 2, -1, 3, 4, -1, 5]]
    assert torch.equal(merged, x.unsqueeze(0))
    assert size.flatten().tolist() == [1.0] * 6


# -- what pixels tell -------------------------------------------------------------------------------------------


def test_proxies_on_images_of_known_content() -> None:
    """Numbers in [0, 1]; nothing on a plain image; text where text is."""
    plain = torch.full((1, 3, 64, 64), 0.5)
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    text = torch.ones(1, 3, 64, 64)
    text[:, :, 16:32, 16:32] = (torch.arange(16) // 2 % 2).to(torch.float32)  # strokes of two pixels
    for proxy in (edge_density, colour_variance, object_proxy):
        values = [float(proxy(image)) for image in (plain, text, noise)]
        assert values[0] == 0.0, proxy.__name__
        assert 0.0 < values[1] <= 1.0
        assert 0.0 < values[2] <= 1.0
    assert float(colour_variance((torch.arange(64) % 2).to(torch.float32).expand(1, 3, 64, 64))) == pytest.approx(1.0)
    likelihood = text_likelihood(text, 16)
    assert likelihood.shape == (1, 16)
    assert int(likelihood.argmax()) == 5  # second row, second column
    assert float(likelihood[0, 5]) > 0.9
    assert float(likelihood.sum() - likelihood[0, 5]) < 0.5
    assert not text_likelihood(plain, 16).any()
    ramp = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
    assert float(text_likelihood(ramp, 16).max()) < 0.1
    assert torch.isfinite(text_likelihood(noise, 16)).all()


@pytest.mark.parametrize("preset", ["norm", "class-attention"])
def test_protected_tokens_stand_in_front_and_the_others_by_score(preset: str) -> None:
    recipe = load_recipe("spatial-frequency-protect")
    module = SpatialFrequencyProtect.from_recipe(recipe, 12, preset=preset, tokens=16, embed_dim=8, score="norm")
    tokens = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(0))
    kept, index = module(tokens)
    norms, protected = kept[0].norm(dim=-1), module.protected
    assert index[0, :protected].tolist() == sorted(index[0, :protected].tolist())
    assert norms[protected:].tolist() == sorted(norms[protected:].tolist(), reverse=True)


# -- spatial-frequency-protect ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "height", "words"),
    [
        (23, 4, "23 tokens are no 4 equal rows on a grid of at least 2 x 2; no number of rows fits; give others"),
        (20, 0, "20 tokens are no square grid; set params.grid_height to 2 or 4 or 5 or 10"),
    ],
)
def test_a_grid_is_refused_with_what_fits(tokens: int, height: int, words: str) -> None:
    with pytest.raises(InvalidSpec, match=words):
        SpatialFrequencyProtect.from_recipe(
            load_recipe("spatial-frequency-protect"), 9, preset="smoke", tokens=tokens, grid_height=height
        )


def test_a_count_that_nobody_asked_for_is_said_to_be_the_methods() -> None:
    """A preset for 20 tokens, and a host that hands over 16 of another grid: no budget was typed."""
    recipe = load_recipe("spatial-frequency-protect")
    rule = msgspec.structs.replace(recipe.rule("smoke"), default=(9,), maximum=10)
    preset = msgspec.structs.replace(recipe.presets["smoke"], budgets=rule)
    recipe = msgspec.structs.replace(recipe, presets={**recipe.presets, "smoke": preset})
    words = (
        r"keeps 11 of 16 tokens where nothing is said, and preset smoke declares from 6 to 10; .* --budget, or give "
    )
    with pytest.raises(InvalidSpec, match=words + "--preset norm or class-attention$"):
        assemble(Order(recipe=recipe, preset="smoke", backbone="test_vit", image_size=64))
