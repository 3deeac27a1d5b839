"""What `save` writes in an original's layout is read back as it was, and known for what it is by its keys alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import edgecomp
from edgecomp import api
from edgecomp.backbones.assemble import assemble
from edgecomp.compressors import compressor_class
from edgecomp.compressors._base import Compressor, initialise
from edgecomp.errors import InvalidSpec, WeightsError
from edgecomp.specs import load_recipe, method_names
from edgecomp.specs.order import Order

#: Layout -> the preset whose form has it, and what else that takes.
CASES: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {
    ("c-abstractor", "honeybee"): ("smoke", {}),
    ("d-abstractor", "honeybee-d"): ("smoke", {}),
    ("deepseek-ocr", "deepseek"): ("smoke", {}),
    ("deepseek-ocr", "transformers"): ("smoke-tiles", {}),
    ("fastvlm", "apple"): ("smoke", {}),
    ("fastvlm", "timm"): ("smoke", {"projector_dim": 0}),
    ("llava-uhd", "llava-uhd"): ("smoke", {}),
    ("matryoshka", "llava"): ("smoke-llava", {}),
    ("matryoshka", "llava-hf"): ("smoke-llava", {}),
    ("perceiver", "flamingo"): ("smoke", {}),
    ("perceiver", "open-flamingo"): ("smoke-frames", {}),
    ("perceiver", "idefics1"): ("smoke-idefics1", {}),
    ("perceiver", "idefics2"): ("smoke-idefics2", {}),
    ("pixel-shuffle", "internvl"): ("smoke", {}),
    ("pixel-shuffle", "internvl-mlp1"): ("smoke", {}),
    ("pixel-shuffle", "idefics3"): ("smoke-idefics3", {}),
    ("pixel-shuffle", "qwen2-vl"): ("smoke-qwen2", {}),
    ("pixel-shuffle", "qwen2.5-vl"): ("smoke-qwen2-5", {}),
    ("q-former", "blip-2"): ("smoke", {}),
    ("q-former", "instructblip"): ("smoke-text", {"tokens": 16, "context_dim": 24}),
    ("resampler-2d", "qwen-vl"): ("smoke", {}),
    ("resampler-2d", "omnilmm"): ("smoke-absolute", {}),
    ("resampler-2d", "minicpm-v"): ("smoke-sizes", {}),
    ("tokenpacker", "tokenpacker"): ("smoke", {}),
}
#: The same layouts in a form of their own.
FORMS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("c-abstractor", "honeybee", "smoke-oblong", {}),
    ("d-abstractor", "honeybee-d", "smoke-tables", {}),
    ("d-abstractor", "honeybee-d", "smoke-tokens", {}),
    ("fastvlm", "apple", "smoke", {"projector_dim": 0}),
    ("fastvlm", "timm", "smoke", {}),
]
#: Whole encoders, and methods inside one: what they share with their host is the host's to save.
NOT_SAVED = {"dtem", "dynamicvit", "lookupvit", "tocom"}


def make(method: str, preset: str, params: dict[str, Any], seed: int) -> Compressor:
    recipe = load_recipe(method)
    module = compressor_class(method).from_recipe(recipe, recipe.rule(preset).default[-1], preset=preset, **params)
    initialise(module, torch.Generator().manual_seed(seed))
    return module


def test_every_layout_can_be_saved() -> None:
    """Whoever reads a layout writes it, too."""
    declared = {(name, layout.name) for name in method_names() for layout in load_recipe(name).layouts}
    assert {name for name, _ in declared - set(CASES)} == NOT_SAVED
    assert set(CASES) <= declared


@pytest.mark.parametrize(
    ("method", "layout", "preset", "params"),
    [*((*key, *value) for key, value in CASES.items()), *FORMS],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_saved_is_read_back(
    method: str, layout: str, preset: str, params: dict[str, Any], tmp_path: Path
) -> None:
    module, other = (make(method, preset, params, seed) for seed in (1, 2))
    expected = module.state_dict()
    assert not all(torch.equal(value, expected[key]) for key, value in other.state_dict().items())
    path = module.save(tmp_path / "saved.safetensors", layout=layout)
    assert other.load_original(load_file(path), unread=tuple(load_recipe(method).unread)) == layout
    assert_same(other, expected)
    assert_same(edgecomp.compressor(method, weights=path, preset=preset, **params), expected)
    contents: Any = api.inspect(weights=path, params=params)
    assert (method, layout) in {(fit.method, fit.layout) for fit in contents.fits if not fit.unknown}


def assert_same(module: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    state = module.state_dict()
    assert state.keys() == expected.keys()
    for key, value in state.items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize(
    ("method", "preset", "params", "layout", "words"),
    [
        ("multi-scale", "smoke", {}, "llava", "this module is saved in edgecomp's own layout, not in 'llava'"),
        ("perceiver", "smoke", {}, "idefics1", "saved in flamingo and edgecomp's own layout, not in 'idefics1'"),
        ("perceiver", "smoke", {"images": 1, "media_embeds": 0}, "flamingo", "has not what a file in the layout"),
        ("perceiver", "smoke", {"qk_norm": True}, "flamingo", "has no name for 8 of .* layers.0.q_norm.weight"),
        ("deepseek-ocr", "smoke-compressor", {}, "deepseek", "has not what a file in the layout 'deepseek' holds"),
        ("matryoshka", "smoke", {}, "llava", "has not what a file in the layout 'llava' holds"),
        ("resampler-2d", "smoke-sizes", {}, "omnilmm", "saved in minicpm-v and edgecomp's own layout"),
    ],
)  # fmt: skip
def test_what_a_layout_cannot_hold_is_refused(
    method: str, preset: str, params: dict[str, Any], layout: str, words: str, tmp_path: Path
) -> None:
    module = make(method, preset, params, 1)
    with pytest.raises(InvalidSpec, match=words):
        module.save(tmp_path / "saved.safetensors", layout=layout)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("method", "layout", "param"),
    [
        ("d-abstractor", "honeybee-d", "num_heads"),
        ("perceiver", "flamingo", "head_dim"),
        ("fastvlm", "apple", "head_dim"),
    ],
)
def test_heads_that_no_file_stores_are_asked_for_by_their_parameter(
    method: str, layout: str, param: str, tmp_path: Path
) -> None:
    preset, params = CASES[method, layout]
    path = make(method, preset, params, 1).save(tmp_path / "x.safetensors", layout=layout)
    with pytest.raises(WeightsError, match=rf"give (it with )?--set params\.{param}=N"):
        edgecomp.compressor(method, weights=path)


@pytest.mark.parametrize(
    ("told", "is_said"), [({"vision_feature_layer": -3}, True), ({"mm_vision_select_layer": -2}, False)]
)
def test_a_model_that_read_another_layer_of_its_tower_is_noted(
    told: dict[str, int], is_said: bool, tmp_path: Path
) -> None:
    module = edgecomp.compressor("matryoshka", grid=4, embed_dim=64, output_dim=20)
    module.save(tmp_path / "model.safetensors", layout="llava-hf")
    (tmp_path / "config.json").write_text(json.dumps(told), encoding="utf-8")
    order = Order(
        recipe=load_recipe("matryoshka"), weights=str(tmp_path), backbone="test_vit", image_size=64, budgets=("4",)
    )
    said = [note for note in assemble(order).notes if "hidden state" in note]
    assert bool(said) == is_said
    assert not said or ("read hidden state -3 of its tower" in said[0] and "layer -2 of test_vit is read" in said[0])
