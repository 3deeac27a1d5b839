"""Several layers of one host, side by side, for methods that read them."""

from __future__ import annotations

from typing import Any, Literal

import pytest

pytest.importorskip("torch")
pytest.importorskip("timm")

import timm
import torch

from edgecomp.backbones.placed import PlacedModel
from edgecomp.backbones.timm import TimmHost
from edgecomp.compressors._base import Compressor, Params
from edgecomp.errors import InvalidSpec
from edgecomp.specs import Site, TensorSpec, TokenBudget


class FirstOfLevels(Compressor):
    """Hands on what it is handed."""

    Params = Params

    @property
    def host_features(self) -> tuple[Literal["levels"], ...]:
        return ("levels",)

    @classmethod
    def levels_of(cls, params: Any) -> tuple[int, ...]:
        return (-5, -2, -1)

    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        count, width = self.budget.tokens_in, self.site.embed_dim
        return (
            TensorSpec("tokens", (batch, count, width), "float32", "tokens"),
            TensorSpec("levels", (batch, count, 3 * width), "float32", "tokens"),
        )

    def forward(self, tokens: torch.Tensor, levels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tokens, levels


@pytest.mark.parametrize("feature_layer", [-1, -2, -6])
def test_levels_are_hidden_states_side_by_side(feature_layer: int) -> None:
    vit: Any = timm.create_model("test_vit", img_size=64).double().eval()
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens, states = vit._pos_embed(vit.patch_embed(image)), []
        for block in vit.blocks:
            tokens = block(tokens)
            states.append(tokens[:, 1:])
        states[-1] = vit.norm(tokens)[:, 1:]
        levels = FirstOfLevels.levels_of(None)
        host = TimmHost(vit, name="test_vit", feature_layer=feature_layer, levels=levels)
        compressor = FirstOfLevels(Params(), Site("after", 64, 16, 64), TokenBudget(16, 16))
        model = PlacedModel(compressor, host, preprocess=None)
        assert [spec.name for spec in model.input_specs()] == ["image"]
        assert [spec.name for spec in model.seam_specs()] == ["tokens", "levels"]
        got, joined = model(image)
        assert torch.allclose(got, states[feature_layer], atol=1e-12)
        assert torch.allclose(host(image), states[feature_layer], atol=1e-12)
        assert torch.allclose(joined, torch.cat([states[level] for level in levels], -1), atol=1e-12)


def test_blocks_that_nothing_reads_are_removed() -> None:
    host = TimmHost(timm.create_model("test_vit", img_size=64), name="vit", feature_layer=-4, levels=(-6, -3))
    assert (host.depth, host.total_depth) == (4, 6)


@pytest.mark.parametrize("level", [-7, 0, 3])
def test_a_level_that_there_is_not_is_refused(level: int) -> None:
    with pytest.raises(InvalidSpec, match=rf"level {level} of \[-2, {level}\] is no layer of vit: .* from -6 to -1"):
        TimmHost(timm.create_model("test_vit", img_size=64), name="vit", feature_layer=-1, levels=(-2, level))


# -- prefix tokens of a host, for methods after it --------------------------------------------------------------


def assembly_of(method: str, prefix: str, **words: Any) -> Any:
    from edgecomp.backbones.assemble import assemble
    from edgecomp.specs import load_recipe
    from edgecomp.specs.order import Order

    given = {"backbone": "test_vit", "image_size": 64, "budgets": ("4",), **words}
    return assemble(Order(recipe=load_recipe(method), prefix=prefix, **given))  # type: ignore[arg-type]


def test_prefix_tokens_that_are_kept_go_in_like_patches() -> None:
    words = {"params": {"head_dim": 16, "depth": 1}, "budgets": ("16",)}
    plain, kept = assembly_of("perceiver", "", **words), assembly_of("perceiver", "keep", **words)
    dropped = assembly_of("perceiver", "drop", **words)
    assert [one.models[0].compressor.site.tokens_in for one in (plain, dropped, kept)] == [16, 16, 17]
    assert "1 prefix token(s) of test_vit go in like patches" in kept.notes
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        first, *_ = kept.models[0].embed(image)
        assert torch.equal(first[:, 1:], plain.models[0].embed(image)[0])
        assert not torch.allclose(kept.models[0](image)[0], plain.models[0](image)[0])
        assert torch.equal(dropped.models[0](image)[0], plain.models[0](image)[0])


@pytest.mark.parametrize(
    ("method", "prefix", "words", "told"),
    [
        ("tome", "keep", {}, r"--keep-prefix: inside test_vit its 1 prefix token\(s\) stay"),
        ("fastervlm", "keep", {}, r"--keep-prefix: FasterVLM reads class_attention of each patch, which the 1 prefix"),
        ("prumerge", "drop", {}, r"--drop-prefix: prumerge reads the 1 prefix token\(s\) of test_vit"),
        ("perceiver", "drop", {"backbone": "none", "image_size": 0}, "--drop-prefix: perceiver stands without a host"),
        ("lookupvit", "drop", {"backbone": ""}, "--drop-prefix: lookupvit stands without a host"),
    ],
)
def test_prefix_tokens_that_nobody_has_are_refused(method: str, prefix: str, words: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidSpec, match=told):
        assembly_of(method, prefix, **words)
