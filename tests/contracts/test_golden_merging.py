"""Contract 3 for token merging: the original's numbers, of one step and of a whole vision transformer with it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file

from edgecomp.backbones.inside import InsideModel
from edgecomp.backbones.timm import TimmHost
from edgecomp.compressors._merging import parse_r
from edgecomp.compressors._tokens import (
    group_matrix,
    merge_pairs,
    pair_tokens,
    source_map,
    top_k_merge,
    unmerge,
)
from edgecomp.compressors.tome import ToMe, ToMeParams, bipartite_soft_matching
from edgecomp.export.lower import lower
from edgecomp.export.passes import add_merge_body
from edgecomp.runners import open_runner
from edgecomp.specs import Site, TensorSpec, TokenBudget

ROOT = Path(__file__).parents[1] / "golden"
FP64, FP32 = 1e-14, 4e-7  # relative to the largest magnitude of the output
FLOORS = 4.0  # times the README's precision floor, for whole models


def _files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).glob("*.safetensors"))]


def _read(path: Path):
    """Return a file's configuration, inputs, outputs and weights."""
    text = (path.parent / "README.md").read_text()
    (config,) = re.findall(rf"^### {path.stem}\n\n\* config: `(.*)`$", text, re.MULTILINE)
    (floor,) = re.findall(rf"^\| `{path.name}` .*\| ([0-9.e-]+) \(.* re-run\) \|$", text, re.MULTILINE)
    tensors = load_file(path)
    roles = [{k.removeprefix(f"{role}."): v for k, v in tensors.items() if k.startswith(f"{role}.")}
             for role in ("input", "output", "weight")]  # fmt: skip
    return json.loads(config), *roles, float(floor)


def _error(got, expected):
    got, expected = torch.as_tensor(got).double(), expected.double()
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


class _Step(torch.nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        self.attributes = attributes

    def forward(self, *inputs):
        return top_k_merge(*inputs, **self.attributes)


def _onnx_step(folder, inputs, **attributes):
    """Run one merge step exported with its function body, on two threads."""
    names = ("metric", "x", "size", "scores")[: len(inputs)]
    specs = [TensorSpec(n, tuple(v.shape), "float32", "features") for n, v in zip(names, inputs, strict=True)]
    batch, tokens, width = inputs[1].shape
    left = tokens - attributes["r"]
    outputs = [
        TensorSpec("y", (batch, left, width), "float32", "tokens"),
        TensorSpec("merged_size", (batch, left, 1), "float32", "features"),
        TensorSpec("src_map", (batch, tokens), "int32", "indices"),
    ]
    model = lower(_Step(**attributes), inputs=specs, outputs=outputs, opset=20)
    add_merge_body(model)
    ir.save(model, folder / "step.onnx")
    with open_runner("onnxruntime", folder / "step.onnx", threads=2) as runner:
        got = runner.infer({n: np.ascontiguousarray(v.float().numpy()) for n, v in zip(names, inputs, strict=True)})
    return got["y"], got["merged_size"], got["src_map"]


# -- one step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", _files("tome"), ids=lambda path: path.stem)
def test_step_of_tome(path, tmp_path):
    config, inputs, outputs, _, _ = _read(path)
    metric, x = inputs["metric"], inputs["x"]
    size = inputs.get("size", torch.ones_like(x[..., :1]))
    attributes = {
        "r": config["r"],
        "num_prefix_tokens": config["cls"],
        "order": "ascending" if config["cls"] else "rank",
    }
    limit = FP64 if x.dtype == torch.float64 else FP32
    pairing = pair_tokens(metric, **attributes)
    merged, sizes = merge_pairs(pairing, x, size)
    rows = source_map(pairing, x.shape[1])
    assert torch.equal(rows.long(), outputs["src_map"])
    assert torch.equal(sizes, outputs["merged_size"])
    assert _error(merged, outputs["merged"]) <= limit
    for mode in ("sum", "mean"):
        assert _error(merge_pairs(pairing, x, size, mode=mode)[0], outputs[f"merged_{mode}"]) <= limit
    assert _error(unmerge(merged, rows), outputs["unmerged"]) <= limit
    if "source" in outputs:
        assert torch.equal(group_matrix(rows, merged.shape[1]), outputs["source"].bool())
    original = bipartite_soft_matching(metric, x, size, config["r"], config["cls"], bool(config["cls"]))
    assert torch.equal(original.rows.long(), outputs["src_map"])
    assert _error(original.tokens, outputs["merged"]) <= limit
    for mode, key in (("wavg", "merged"), ("sum", "merged_sum"), ("mean", "merged_mean")):
        y, merged_size, src_map = _onnx_step(tmp_path, (metric, x, size), mode=mode, **attributes)
        assert np.array_equal(src_map, outputs["src_map"].numpy())
        assert np.array_equal(merged_size, outputs["merged_size"].float().numpy())
        assert _error(y, outputs[key]) <= FP32


# -- a whole model ----------------------------------------------------------------------------------------------


def _whole_model(config, weights, output):
    from timm.models.vision_transformer import VisionTransformer

    vit = VisionTransformer(
        img_size=config["img"], patch_size=config["patch"], embed_dim=config["dim"], depth=config["depth"],
        num_heads=config["heads"], num_classes=config["classes"], mlp_ratio=2,
    )  # fmt: skip
    vit.load_state_dict(weights)
    host = TimmHost(vit, name="golden", feature_layer=-1, keep_head=True)
    r, inflect = config["r"] if isinstance(config["r"], list) else (config["r"], 0.0)
    params = ToMeParams(r=r, inflect=inflect)
    tokens = (config["img"] // config["patch"]) ** 2
    site = Site("inside", config["img"], tokens, config["dim"], 1, config["depth"], config["classes"])
    (left,) = ToMe.default_counts(params, site)
    compressor = ToMe(params, site, TokenBudget(tokens, left, 1), output)
    return InsideModel(compressor, host, preprocess=None, input_dtype="float32").eval()


@pytest.mark.parametrize("path", _files("tome_vit"), ids=lambda path: path.stem)
def test_whole_model_of_tome(path, tmp_path, default_dtype):
    config, inputs, outputs, weights, floor = _read(path)
    image = inputs["image"]
    with default_dtype(str(image.dtype).removeprefix("torch.")):
        models = {output: _whole_model(config, weights, output) for output in ("tokens", "logits")}
    limit = 1e-12 if image.dtype == torch.float64 else FLOORS * floor
    steps = models["tokens"].compressor.steps
    assert list(steps) == outputs["r_per_layer"].tolist()
    r, inflect = config["r"] if isinstance(config["r"], list) else (config["r"], 0.0)
    assert parse_r(config["depth"], r, inflect) == steps
    assert (50 - np.cumsum(steps)).tolist() == outputs["tokens_per_layer"].tolist()
    for form in (lambda model: model, lambda model: model.reference()):
        with torch.inference_mode():
            tokens, size, rows = form(models["tokens"])(image)
            (logits,) = form(models["logits"])(image)
        assert _error(tokens, outputs["features"]) <= limit
        assert _error(logits, outputs["logits"]) <= limit
        assert torch.equal(size, outputs["size"])
        assert torch.equal(group_matrix(rows, tokens.shape[1]), outputs["source"].bool())

    whole = models["tokens"].float()
    specs = whole.input_specs(len(image)), whole.output_specs(len(image))
    model = lower(whole, inputs=specs[0], outputs=specs[1], opset=20)
    add_merge_body(model)
    ir.save(model, tmp_path / "whole.onnx")
    with open_runner("onnxruntime", tmp_path / "whole.onnx", threads=2) as runner:
        got = runner.infer({"image": image.float().numpy()})
    assert _error(got["merged"], outputs["features"]) <= FLOORS * floor
    assert np.array_equal(got["size"], outputs["size"].float().numpy())
    assert torch.equal(group_matrix(torch.from_numpy(got["source_map"]), tokens.shape[1]), outputs["source"].bool())
