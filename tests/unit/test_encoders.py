"""The notes' two methods of their chapter on FastVLM: what is refused, and the buckets behind the router `detail`."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from PIL import Image  # noqa: E402 - torch first, or skip

import edgecomp  # noqa: E402
from edgecomp import api  # noqa: E402
from edgecomp.backbones.assemble import assemble  # noqa: E402
from edgecomp.compressors.learned_merger import LearnedMerger  # noqa: E402
from edgecomp.errors import InvalidSpec  # noqa: E402
from edgecomp.specs import load_recipe  # noqa: E402
from edgecomp.specs.order import Order  # noqa: E402


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"image_size": 700}, "image size 700 is not a multiple of 96, which both paths need; the nearest is 672"),
        ({"image_size": 576}, "576 pixels give 36 tokens, or 76 with details, not a budget of 49"),
        ({"budget": 50}, "budget 50 is not possible for dual-path; it must be one of 49, 89"),
        ({"preset": "smoke", "params": {"num_heads": 3}}, "embed_dim=16 is not a multiple of its 3 heads"),
        ({"preset": "smoke", "params": {"light_heads": 3}}, r"light_widths\[3\]=16 is not a multiple of its 3 heads"),
        ({"backbone": "vit_small_patch16_224"}, "dual-path stands encoder, not after a host"),
    ],
    ids=str,
)
def test_dual_path_refuses_what_does_not_fit(words, match, tmp_path):
    with pytest.raises(InvalidSpec, match=match):
        api.export("dual-path", out=tmp_path / "bundle", **words)
    assert list(tmp_path.iterdir()) == []


def test_sequential_merges_are_bounded():
    recipe = load_recipe("learned-merger")
    match = "unrolls 132 merges for 196 -> 64 tokens, and 64 is the most; keep at least 132"
    with pytest.raises(InvalidSpec, match=match):
        LearnedMerger.from_recipe(recipe, 64, preset="sequential")


def test_one_merge_is_the_same_in_both_forms():
    """With one token to merge, its mean is itself, and nothing has changed before it."""
    recipe = load_recipe("learned-merger")
    sizes = {"tokens": 9, "embed_dim": 8, "score_dim": 4}
    both = [
        LearnedMerger.from_recipe(recipe, 8, preset="smoke", form=form, **sizes) for form in ("parallel", "sequential")
    ]
    both[1].load_state_dict(both[0].state_dict())
    tokens = torch.randn(3, 9, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for one, other in zip(*(module(tokens) for module in both), strict=True):
            assert torch.allclose(one, other, atol=1e-6)


def test_details_stand_behind_the_router(tmp_path):
    """The smaller bucket has no ViT in it, and its rows are the global ones alone."""
    report = api.export("dual-path", preset="smoke", backbone="none", out=tmp_path / "bundle")
    assert report.manifest.router.name == "detail"  # the recipe's own
    few, many = report.manifest.buckets
    assert (few.budget.tokens_out, many.budget.tokens_out) == (4, 7)
    assert few.flops < 0.7 * many.flops
    assert [spec.name for spec in few.outputs] == ["fused"]
    assert [spec.name for spec in many.outputs] == ["fused", "index"]
    (router,) = report.manifest.routers
    assert router.outputs[0].name == "bucket"
    assert report.parity
    page = Image.new("RGB", (300, 200))
    with edgecomp.load(report.bundle, threads=1) as model:  # one image of any size: the graph makes both sizes of it
        assert model(page, "what is it").budget == 4
        assert model(page, "the small words in the corner").budget == 7
    drawn = {"plain": np.full((192, 192, 3), 90, np.uint8)}
    drawn["detailed"] = np.random.default_rng(0).integers(0, 256, (192, 192, 3), dtype=np.uint8)
    for name, pixels in drawn.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    kept = {name: api.run(report.bundle, tmp_path / f"{name}.png", threads=1).tokens_out for name in drawn}
    assert kept == {"plain": 4, "detailed": 7}
    with pytest.raises(InvalidSpec, match="there is one bucket, 9, and nothing to choose"):
        api.export("dual-path", preset="smoke-details", router="detail", out=tmp_path / "other")


def test_the_recipes_router_can_be_left_out(tmp_path):
    """By the word none; and where there is one bucket, which is said."""
    recipe = load_recipe("dual-path")
    assert recipe.defaults.router == "detail"
    assert assemble(Order(recipe=recipe, preset="smoke", router="none")).router is None
    one = assemble(Order(recipe=recipe, preset="smoke-details"))
    assert one.router is None
    assert any("router detail of the recipe is left out: there is one bucket" in note for note in one.notes)
    with pytest.raises(InvalidSpec, match="parameters or weights of a router were given, and no router"):
        api.export("dual-path", preset="smoke", router="none", router_params={"p": 1}, out=tmp_path / "bundle")
