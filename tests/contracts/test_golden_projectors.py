"""Contract 3, of the methods that map a grid of tokens to another: the numbers that the originals' own code gave."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from goldens import FLOORS, ROOT, by_onnx, golden_files, read_golden, relative_error
from safetensors import safe_open

from edgecomp.compressors import compressor_class
from edgecomp.specs import Site, TokenBudget

FP64 = 1e-12  # relative to the largest magnitude of the output
METHODS = {name: name.replace("_", "-") for name in ("c_abstractor", "pixel_shuffle", "matryoshka", "tokenpacker")}
FILES = golden_files(*METHODS)
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")


def _params_of(folder: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters that no weight's shape tells."""
    if folder == "pixel_shuffle":
        order = "grouped" if config["kind"].startswith("qwen") else "raster"
        return {"factor": config["s"], "order": order}
    return {"num_heads": config["heads"]} if folder == "tokenpacker" else {}


def _cases(path, config, outputs):
    """Return the outputs by the number of tokens kept."""
    if path.parent.name == "matryoshka":
        return {int(name.removeprefix("scale")): value for name, value in outputs.items()}
    return {outputs["y"].shape[-2]: outputs["y"]}


def _modules(path):
    """Yield each golden output with the module that must give it, its inputs and the README's floor."""
    config, inputs, outputs, weights, floor = read_golden(path)
    method = METHODS[path.parent.name]
    cls = compressor_class(method)
    tokens = inputs["x"]
    if path.parent.name == "pixel_shuffle":  # (B, h, w, C), (B, N, C) or (N, C)
        tokens = tokens.flatten(-3, -2) if tokens.ndim == 4 else tokens.reshape(-1, *tokens.shape[-2:])
    given = [tokens, *([inputs["x_multi"]] if "x_multi" in inputs else [])]
    values = _params_of(path.parent.name, config)
    found = cls.infer_params(weights, cls.parse_params(values, method=method)) if weights else {}
    site = Site("after", tokens_in=tokens.shape[1], embed_dim=tokens.shape[2])
    sizes = {"tokens": tokens.shape[1], "embed_dim": tokens.shape[2]}
    params = cls.parse_params({**sizes, **values, **found}, method=method)
    with safe_open(path, "pt") as file:
        dtype = file.metadata()["dtype"]
    for kept, expected in _cases(path, config, outputs).items():
        module = cls(params, site, TokenBudget(tokens.shape[1], kept)).eval()
        if weights:
            assert module.load_original(weights) == cls.layout_of(weights) != ""
        yield module, given, expected.reshape(len(tokens), kept, -1), FP64 if dtype == "float64" else FLOORS * floor


@each_file
def test_static_and_original_equal_the_golden_file(path, default_dtype):
    with safe_open(path, "pt") as file:
        dtype = file.metadata()["dtype"]
    with default_dtype(dtype):
        for module, inputs, expected, tolerance in _modules(path):
            for model in (module, module.reference()):
                with torch.inference_mode():
                    (got,) = model(*inputs)
                assert got.dtype == getattr(torch, dtype)
                assert relative_error(got, expected) <= tolerance, f"{type(model).__name__}, {len(expected[0])} kept"


@each_file
def test_onnx_equals_the_golden_file(path, tmp_path):
    floor = read_golden(path)[-1]
    for module, inputs, expected, _ in itertools.islice(_modules(path), 2):  # a graph each; eager has all
        (spec,) = module.output_specs()
        (tmp_path / spec.name).mkdir(exist_ok=True)
        got = by_onnx(tmp_path / spec.name, module, *inputs)[spec.name]
        assert relative_error(got, expected) <= FLOORS * floor, f"{len(expected[0])} kept"


@each_file
def test_every_weight_of_the_original_counts(path):
    """A changed tensor of the checkpoint changes the output."""
    weights = read_golden(path)[3]
    module, inputs, _, _ = next(_modules(path))
    silent = []
    for name, tensor in weights.items():
        module.load_original({**weights, name: torch.full_like(tensor, float("nan"))})
        with torch.inference_mode():
            if all(torch.isfinite(value).all() for value in module(*(x.float() for x in inputs))):
                silent.append(name)
    assert silent == []


def test_every_file_is_read():
    assert sorted(path for name in METHODS for path in (ROOT / name).rglob("*.safetensors")) == sorted(FILES)
    assert len(FILES) == 11
