"""Resamplers: what they refuse, and checkpoints of the models that they stand in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402 - torch first, or skip

from edgecomp import api  # noqa: E402
from edgecomp.compressors import compressor_class  # noqa: E402
from edgecomp.errors import InvalidSpec, WeightsError  # noqa: E402
from edgecomp.specs import load_recipe  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = {"tokens": 16, "context_dim": 8, "embed_dim": 32, "num_heads": 2}


def make(method: str, budget: int, preset: str, **params: Any) -> Any:
    return compressor_class(method).from_recipe(load_recipe(method), budget, preset=preset, **params)


@pytest.mark.parametrize(
    ("method", "preset", "budget", "params", "words"),
    [
        ("resampler-2d", "qwen-vl", 9, {"tokens": 18}, "18 tokens are no square grid; 16 = 4 x 4 and 25 = 5 x 5 are"),
        ("llava-uhd", "uhd", 9, {"tokens": 18}, "llava-uhd: 18 tokens are no square grid"),
        ("llava-uhd", "uhd", 9, {"tokens": 20, "rows": 7}, "20 tokens do not fill 7 rows (params.rows=7)"),
        ("resampler-2d", "qwen-vl", 10, {}, "10 queries make no square grid; the nearest that do are 9 and 16"),
        ("resampler-2d", "qwen-vl", 9, {"queries": 16}, "budget 9 is not the 16 queries of the table"),
        ("resampler-2d", "qwen-vl", 9, {"embed_dim": 30}, "embed_dim=30 must be a multiple of 4 and of num_heads=2"),
        ("resampler-2d", "qwen-vl", 9, {"target_sizes": True}, "goes with key_places=absolute, not resized"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(
    method: str, preset: str, budget: int, params: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidSpec) as caught:
        make(method, budget, preset, **{**TINY, **params})
    assert words in str(caught.value)


def weights_of(folder: str, name: str) -> dict[str, Any]:
    tensors = load_file(GOLDEN / folder / f"{name}.safetensors")
    return {k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")}


def as_qwen_vl(weights: dict[str, Any]) -> dict[str, Any]:
    """Return weights as a whole Qwen-VL names them, among tensors of its tower and language model."""
    outer = ("ln_post.weight", "ln_post.bias", "proj")
    visual = "transformer.visual."
    state = {f"{visual}{'' if key in outer else 'attn_pool.'}{key}": value for key, value in weights.items()}
    for layer in range(40):
        state[f"{visual}transformer.resblocks.{layer}.attn.in_proj.weight"] = torch.zeros(2, 2)
        state[f"transformer.h.{layer}.attn.c_attn.weight"] = torch.zeros(2, 2)
    return {**state, f"{visual}conv1.weight": torch.zeros(2, 3, 2, 2), f"{visual}ln_pre.weight": torch.zeros(2)}


def test_a_whole_qwen_vl_is_read(tmp_path: Path) -> None:
    weights = weights_of("minicpm_resampler", "q16_n64")
    save_file(as_qwen_vl(weights), tmp_path / "qwen.safetensors")
    report = api.export(
        "resampler-2d",
        weights=tmp_path / "qwen.safetensors",
        params={"tokens": 64, "num_heads": 4},
        out=tmp_path / "out",
    )
    manifest = report.manifest
    assert manifest.weights.layout == "qwen-vl"
    assert manifest.params["queries"] == 16
    assert manifest.params["context_dim"] == 40
    assert any("left out" in note and "transformer.h" in note for note in manifest.notes), manifest.notes
    assert report.parity


@pytest.mark.parametrize(("keep", "layout"), [(True, "omnilmm"), (False, "minicpm-v")])
def test_the_position_table_tells_the_layout(keep: bool, layout: str) -> None:
    weights = {f"resampler.{key}": value for key, value in weights_of("minicpm_resampler", "q16_n64").items()}
    if not keep:
        del weights["resampler.pos_embed"]
    assert compressor_class("resampler-2d").layout_of(weights) == layout


def test_siblings_are_refused_by_name() -> None:
    weights = as_qwen_vl(weights_of("minicpm_resampler", "q16_n64"))
    with pytest.raises(WeightsError, match="layout qwen-vl, whose queries read the whole image; use resampler-2d"):
        compressor_class("llava-uhd").layout_of(weights)
    with pytest.raises(WeightsError, match=r"0 resamplers .* first keys: latents"):
        compressor_class("resampler-2d").layout_of({"latents": torch.zeros(2, 2)})


def test_target_sizes_beyond_the_table_stay_finite() -> None:
    """A graph cannot refuse a number: places behind the last one are the last."""
    module = make("resampler-2d", 4, "smoke-sizes", most_side=2, images=1)
    with torch.inference_mode():
        (latents,) = module(torch.ones(2, 20, 32), torch.tensor([[4, 5], [300, -1]], dtype=torch.int32))
    assert torch.isfinite(latents).all()


@pytest.mark.parametrize(
    ("method", "preset", "layout"),
    [
        ("resampler-2d", "smoke", "qwen-vl"),
        ("resampler-2d", "smoke", "omnilmm"),
        ("resampler-2d", "smoke-sizes", "minicpm-v"),
        ("llava-uhd", "smoke", "llava-uhd"),
    ],
)
def test_what_is_saved_as_an_original_is_read_back(method: str, preset: str, layout: str) -> None:
    module, other = (make(method, 4, preset) for _ in range(2))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    state = module.original_state(layout)
    assert type(other).layout_of(state) == layout
    assert other.load_original(state) == layout
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in other.state_dict().items())
    with pytest.raises(InvalidSpec, match="not in 'flamingo'"):
        module.original_state("flamingo")
