"""Contract 3 for token pruning: what the originals kept, of given tokens and inside a whole vision transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from goldens import FLOORS, FP32, FP64, by_onnx, golden_files, golden_host, read_golden, relative_error
from torch import Tensor, nn

from edgecomp.backbones.inside import InsideModel
from edgecomp.compressors._base import Compressor
from edgecomp.compressors.attention_pruning import AttentionPruning, AttentionPruningParams
from edgecomp.compressors.dynamicvit import DynamicViT, DynamicViTParams
from edgecomp.compressors.evit import EViT, EViTParams
from edgecomp.compressors.fastervlm import FasterVLM
from edgecomp.compressors.prumerge import PruMerge, PruMergeParams
from edgecomp.compressors.visionzip import VisionZip, VisionZipParams
from edgecomp.compressors.vispruner import VisPruner
from edgecomp.specs import Site, TensorSpec, TokenBudget


def given(cls: type[Compressor], params: Any, tokens: Tensor, keep: int, *, prefix: int = 0, heads: int = 1) -> Any:
    """Return a pruner for tokens as large as these."""
    site = Site("after", 0, tokens.shape[1] - prefix, tokens.shape[2], prefix, num_heads=heads)
    return cls(params, site, TokenBudget(site.tokens_in, keep, prefix)).eval()


class _Shaped(nn.Module):
    """A pruner whose inputs are as wide as a golden's, whatever a host would hand over."""

    def __init__(self, pruner: Any, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.pruner, self.shapes = pruner, [tuple(value.shape) for value in inputs]

    def input_specs(self, batch: int) -> tuple[TensorSpec, ...]:
        assert all(shape[0] == batch for shape in self.shapes)
        return tuple(TensorSpec(f"in{i}", shape, "float32", "features") for i, shape in enumerate(self.shapes))

    def output_specs(self, batch: int) -> tuple[TensorSpec, ...]:
        return self.pruner.output_specs(batch)  # type: ignore[no-any-return]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.pruner(*inputs)  # type: ignore[no-any-return]


def all_forms(folder: Path, pruner: Any, *inputs: Tensor) -> list[dict[str, Tensor]]:
    """Return the outputs of the static module, of the eager original, and of ONNX Runtime."""
    names = [spec.name for spec in pruner.output_specs()]
    with torch.inference_mode():
        eager = [dict(zip(names, form(*inputs), strict=True)) for form in (pruner, pruner.reference())]
    got = by_onnx(folder, _Shaped(pruner.float(), inputs), *inputs)
    return [*eager, {name: torch.from_numpy(got[name]) for name in names}]


@pytest.mark.parametrize("path", golden_files("hpc_attention_pruning"), ids=lambda path: path.stem)
def test_hpc_attention_pruning(path: Path, tmp_path: Path) -> None:
    config, inputs, outputs, _, _ = read_golden(path)
    tokens, keep = inputs["embeddings"], int(config["M"] * config["p"])
    pruner = given(AttentionPruning, AttentionPruningParams(order="rank"), tokens, keep)
    for got in all_forms(tmp_path, pruner, tokens, inputs["attention"].unsqueeze(1)):
        assert torch.equal(got["index"].long(), outputs["index"])
        assert torch.equal(got["kept"], outputs["kept"])


@pytest.mark.parametrize(
    "path", golden_files("fastervlm", "vispruner"), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_patches_by_class_attention(path: Path, tmp_path: Path) -> None:
    config, inputs, outputs, _, _ = read_golden(path)
    cls: Any = {"fastervlm": FasterVLM, "vispruner": VisPruner}[path.parent.name]
    values = {"important_ratio": config["ratio"]} if cls is VisPruner else {}
    tokens, attention = inputs["features"], inputs["cls_attn"]
    pruner = given(cls, cls.Params(**values), tokens, config["T"], heads=config["H"])
    for got in all_forms(tmp_path, pruner, tokens, attention):
        assert torch.equal(got["index"].long(), outputs["index"])
        assert torch.equal(got["kept"], outputs["kept"])


@pytest.mark.parametrize("path", golden_files("visionzip"), ids=lambda path: path.stem)
def test_visionzip(path: Path, tmp_path: Path, default_dtype: Any) -> None:
    config, inputs, outputs, _, _ = read_golden(path)
    tokens, heads = inputs["hidden"], config["H"]
    keys = inputs["metric"].repeat(1, 1, heads)  # whose mean over heads is the metric
    params = VisionZipParams(contextual=config["contextual"])
    with default_dtype(str(tokens.dtype).removeprefix("torch.")):
        pruner = given(VisionZip, params, tokens, config["dominant"] + config["contextual"], prefix=1, heads=heads)
    assert pruner.dominant == config["dominant"]
    limits = [FP64 if tokens.dtype == torch.float64 else FP32] * 2 + [FP32]
    dominant = outputs["all_indices"].sort(1).values
    for limit, got in zip(limits, all_forms(tmp_path, pruner, tokens, inputs["cls_attn"][:, :, 1:], keys), strict=True):
        assert torch.equal(got["index"][:, : dominant.shape[1]].long(), dominant)
        assert relative_error(got["kept"], outputs["tokens"]) <= limit


@pytest.mark.parametrize("path", golden_files("prumerge"), ids=lambda path: path.stem)
def test_prumerge(path: Path, tmp_path: Path) -> None:
    config, inputs, outputs, _, floor = read_golden(path)
    tokens, count = inputs["hidden"], int(outputs["count"])
    rows = count + 1 if not config["adaptive"] else 30
    pruner = given(PruMerge, PruMergeParams(adaptive=config["adaptive"]), tokens, rows, prefix=1)
    query = inputs["q"][:, 0]
    with torch.inference_mode():
        assert relative_error(pruner.score_of(query, inputs["k"]), outputs["cls_attn"]) <= FP32
    for got in all_forms(tmp_path, pruner, tokens, query, inputs["k"]):
        assert relative_error(got["kept"][:, : count + 1], outputs["tokens"]) <= FLOORS * floor
        assert not got["kept"][:, count + 1 :].any()
        if config["adaptive"]:
            assert got["count"].tolist() == [count + 1]
            assert got["mask"].sum(1).tolist() == [count + 1]


@pytest.mark.parametrize("path", golden_files("evit", "dynamicvit"), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_whole_model(path: Path, tmp_path: Path) -> None:
    config, inputs, outputs, weights, floor = read_golden(path)
    cls: Any = {"evit": EViT, "dynamicvit": DynamicViT}[path.parent.name]
    _, of_host = cls.split_checkpoint(weights)
    host, site = golden_host(config, of_host if cls is DynamicViT else weights)
    if cls is EViT:
        blocks = tuple(block for block, rate in enumerate(config["keep"]) if rate < 1)
        params: Any = EViTParams(keep_rate=config["keep"][-1], blocks=blocks, fuse=config["fuse"])
    else:
        params = DynamicViTParams(ratios=tuple(config["ratio"]), blocks=tuple(config["loc"]))
    (left,) = cls.default_counts(params, site)
    models = {}
    for output in ("tokens", "logits"):
        compressor = cls(params, site, TokenBudget(site.tokens_in, left, 1), output)
        if cls is DynamicViT:
            assert compressor.load_original(weights) == "dynamicvit"
        models[output] = InsideModel(compressor, host, preprocess=None, input_dtype="float32").eval()
    counts = [count + 1 for count in models["tokens"].compressor.counts]
    assert counts == outputs["tokens_per_layer"].tolist()
    image = inputs["image"]
    for form in (lambda model: model, lambda model: model.reference()):
        with torch.inference_mode():
            tokens, index = form(models["tokens"])(image)
            (logits,) = form(models["logits"])(image)
        assert relative_error(tokens, outputs["features"]) <= FLOORS * floor
        assert relative_error(logits, outputs["logits"]) <= FLOORS * floor
        assert torch.equal(index, _composed(outputs, cls, site.tokens_in))
    got = by_onnx(tmp_path, models["tokens"], image)
    assert relative_error(got["kept"], outputs["features"]) <= FLOORS * floor
    assert np.array_equal(got["index"], index.numpy())
    assert relative_error(by_onnx(tmp_path, models["logits"], image)["logits"], outputs["logits"]) <= FLOORS * floor


def _composed(outputs: dict[str, Tensor], cls: Any, tokens: int) -> Tensor:
    """Return where the original's last rows came from, from what each of its layers kept."""
    steps = [outputs[name] for name in sorted(outputs) if name.startswith(("idx_layer", "keep_"))]
    batch = len(steps[0])
    rows = torch.arange(1, tokens + 1).expand(batch, -1)
    for step in steps:
        rows = rows.gather(1, step)
        if cls is EViT and outputs["tokens_per_layer"][-1] == steps[-1].shape[1] + 2:  # with a fused token
            rows = torch.cat([rows, torch.full((batch, 1), -1)], 1)
    return torch.cat([torch.zeros(batch, 1, dtype=torch.int64), rows], 1).to(torch.int32)
