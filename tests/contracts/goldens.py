"""The numbers of the originals in `tests/golden`, and the hosts that they were made with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from safetensors.torch import load_file
from torch import Tensor

from edgecomp.backbones.timm import TimmHost
from edgecomp.export.lower import lower
from edgecomp.export.passes import add_merge_body
from edgecomp.runners import open_runner
from edgecomp.specs import Site

ROOT = Path(__file__).parents[1] / "golden"
FP64, FP32 = 1e-14, 4e-7  # relative to the largest magnitude of the output
FLOORS = 4.0  # times the README's precision floor, for whole models: both sides round


def golden_files(*folders: str) -> list[Path]:
    """Return the files of some folders."""
    return [path for folder in folders for path in sorted((ROOT / folder).glob("*.safetensors"))]


def read_golden(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], float]:
    """Return a file's configuration, inputs, outputs and weights."""
    text = (path.parent / "README.md").read_text()
    (config,) = re.findall(rf"^### {path.stem}\n\n\* config: `(.*)`$", text, re.MULTILINE)
    (floor,) = re.findall(rf"^\| `{path.name}` .*\| ([0-9.e+-]+) \(.* re-run\) \|$", text, re.MULTILINE)
    tensors = load_file(path)
    roles = [{k.removeprefix(f"{role}."): v for k, v in tensors.items() if k.startswith(f"{role}.")}
             for role in ("input", "output", "weight")]  # fmt: skip
    return json.loads(config), *roles, float(floor)


def relative_error(got: Any, expected: Tensor) -> float:
    """Return the largest error over the largest magnitude."""
    got, expected = torch.as_tensor(got).double(), expected.double()
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


def golden_host(config: dict[str, Any], weights: dict[str, Tensor]) -> tuple[TimmHost, Site]:
    """Return the ViT of the goldens, with its weights, and where a compressor stands in it."""
    from timm.models.vision_transformer import VisionTransformer

    image, depth = config.get("img", 56), config.get("depth", len(config.get("keep", ())))
    vit = VisionTransformer(
        img_size=image, patch_size=config["patch"], embed_dim=config["dim"], depth=depth, num_heads=config["heads"],
        num_classes=config["classes"], mlp_ratio=2,
    )  # fmt: skip
    vit.load_state_dict(weights)
    host = TimmHost(vit, name="golden", feature_layer=-1, keep_head=True)
    tokens = (image // config["patch"]) ** 2
    return host, Site("inside", image, tokens, config["dim"], 1, depth, config["classes"], has_class_token=True)


def by_onnx(folder: Path, module: Any, *inputs: Tensor) -> dict[str, Any]:
    """Export a model for these inputs, and run it in ONNX Runtime on two threads."""
    batch = len(inputs[0])
    specs = module.input_specs(batch)
    model = lower(module, inputs=specs, outputs=module.output_specs(batch), opset=20)
    add_merge_body(model)
    ir.save(model, folder / "model.onnx")
    with open_runner("onnxruntime", folder / "model.onnx", threads=2) as runner:
        plain = [value.float() if value.is_floating_point() else value for value in inputs]
        return runner.infer({spec.name: value.numpy() for spec, value in zip(specs, plain, strict=True)})
