"""Checkpoints of the originals are told by their keys, also where they are a small part of a whole model in shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgecomp.compressors import compressor_class
from edgecomp.compressors._base import Compressor
from edgecomp.compressors._checkpoint import Checkpoint
from edgecomp.compressors._recognise import fitting, recognise
from edgecomp.errors import EdgecompError
from edgecomp.specs import load_recipe, method_names
from edgecomp.specs.layout import best_match

ROOT = Path(__file__).parents[1] / "golden"
#: Folders whose weights are a host's alone: the method has none.
HOSTS = {"evit", "tome_vit"}
WHOLE = "whole.model."
FILES = [
    path
    for path in sorted(ROOT.glob("*/*.safetensors"))
    if path.parent.name not in HOSTS and b'"weight.' in path.read_bytes()[: 1 << 16]
]


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(path)
    return {key.removeprefix("weight."): value for key, value in tensors.items() if key.startswith("weight.")}


def fitting_methods(weights: dict[str, torch.Tensor]) -> list[str]:
    found = [(name, best_match(list(weights), load_recipe(name).layouts)) for name in method_names()]
    return [name for name, match in found if match is not None and match.fits and not match.unknown]


def write_whole_model(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write three shards: the compressor's tensors among 600 of a language model and a vision tower."""
    state = {f"{WHOLE}{name}": value.contiguous() for name, value in weights.items()}
    for part, count in (("language_model.model", 300), ("vision_tower.vision_model", 300)):
        names = ("self_attn.q_proj.weight", "mlp.fc1.weight", "layer_norm1.bias")
        state |= {f"{part}.layers.{n // 3}.{names[n % 3]}": torch.zeros(1) for n in range(count)}
    shards: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for number, (name, value) in enumerate(sorted(state.items())):
        shards[number % 3][name] = value
    index = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-00003.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        index |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_keys_tell_the_layout(path: Path, tmp_path: Path) -> None:
    """Spine and method agree on the layout, and a whole model in shards gives the same tensors as the file alone."""
    weights = weights_of(path)
    methods = fitting_methods(weights)
    assert methods, f"no recipe declares this layout under [[layouts]]; keys: {', '.join(list(weights)[:8])}"
    write_whole_model(tmp_path, weights)
    checkpoint = Checkpoint(tmp_path)
    assert {name for name, _ in fitting(checkpoint.stored)} >= set(methods)
    for method in methods:
        recipe, cls = load_recipe(method), compressor_class(method)
        alone = best_match(list(weights), recipe.layouts)
        match = recognise(recipe, cls, checkpoint.stored)
        assert alone is not None
        assert match is not None
        assert match.layout.name == alone.layout.name
        assert match.prefix == WHOLE + alone.prefix
        assert sorted(match.names.values()) == sorted(f"{WHOLE}{name}" for name in weights)
        assert len(match.foreign) == 600
        read = checkpoint.read(match.names)
        for name, value in read.items():
            assert torch.equal(value.double(), weights[alone.names[name]].float().double()), name
        assert cls.layout_of(read) == match.layout.name == cls.layout_of(weights)
        assert _inferred(cls, read) == _inferred(cls, weights) == _inferred(cls, checkpoint.outline(match.names))


def _inferred(cls: type[Compressor], state: dict[str, torch.Tensor]) -> object:
    own, _ = cls.split_checkpoint(state)
    try:
        return cls.infer_params(own, cls.Params())
    except EdgecompError as error:  # what no checkpoint stores, for example a head width
        return str(error)


def test_layouts_are_declared(method: str) -> None:
    """Who tells a layout by its keys declares it, so that it is found in a whole model, and by `inspect --weights`."""
    cls, recipe = compressor_class(method), load_recipe(method)
    declared = {layout.name for layout in recipe.layouts}
    tells = cls.layout_of.__func__ is not Compressor.layout_of.__func__  # type: ignore[attr-defined]
    if not declared and (recipe.level == "E4" or not tells):
        return
    assert tells, f"the recipe of {method} declares {declared}, and its class tells no layout"
    assert declared, f"{method} recognises layouts, and its recipe has no [[layouts]]"
    named = {preset.layout for preset in recipe.presets.values() if preset.layout}
    assert named <= declared, f"presets name {named - declared}, which no [[layouts]] declares"
