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
