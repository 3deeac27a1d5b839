"""Contract 3: numbers that the original's own code gave, loaded with the original's own weights.

The files in `tests/golden` were made by running the upstream code; each folder's README says which, at which commit.
"""

from __future__ import annotations

import fnmatch
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from edgecomp.compressors import compressor_class
from edgecomp.export.lower import lower
from edgecomp.runners import open_runner
from edgecomp.specs import Site, TokenBudget, load_recipe, method_names

ROOT = Path(__file__).parents[1] / "golden"
FP64 = 1e-12  # relative to the largest magnitude of the output
BF16 = 2.0**-8  # its rounding: such an original rounds after each step
FLOORS = 4.0  # how many times the README's precision floor: both sides round, and ONNX Runtime orders sums anew


@dataclass(frozen=True)
class Folder:
    """How the files of a folder are read.

    Attributes:
        method: whose original made them.
        params: parameters that no weight's shape tells, and where the file's configuration has them.
        rounds_to_fp32: why the original rounds to fp32 within fp64, where it does; its fp64 files are then held to
            the README's floor.
        given: parameters that neither tells.
    """

    method: str
    params: dict[str, str] = field(default_factory=dict)
    rounds_to_fp32: str = ""
    given: dict[str, Any] = field(default_factory=dict)


FOLDERS = {
    "deepseek_ocr_encoder": Folder(
        "deepseek-ocr", {"clip_heads": "clip.heads", "global_blocks": "sam.global", "window": "sam.window"}
    ),
    "deepseek_ocr_hf": Folder(
        "deepseek-ocr",
        {
            "clip_heads": "enc.num_attention_heads",
            "global_blocks": "sam.global_attn_indexes",
            "window": "sam.window_size",
        },
    ),
    "fastvithd": Folder("fastvlm"),
    "lookup_vit": Folder("lookupvit", {"head_dim": "args.dim_head", "lookup_head_dim": "args.cross_attn_dim_head"}),
    "perceiver_flamingo": Folder("perceiver", {"head_dim": "args.dim_head"}),
    "perceiver_open_flamingo": Folder("perceiver", {"head_dim": "args.dim_head"}),
    "perceiver_idefics1": Folder("perceiver", {"head_dim": "head_dim"}),
    "perceiver_idefics2": Folder(
        "perceiver",
        {"head_dim": "config.resampler_head_dim"},
        rounds_to_fp32="transformers computes Idefics2's RMSNorm and softmax in fp32 whatever the input's type",
    ),
    "minicpm_resampler": Folder(
        "resampler-2d",
        {"num_heads": "heads"},
        rounds_to_fp32="the original resizes its position table in fp32 whatever its type",
    ),
    "uhd_resampler": Folder("resampler-2d", {"num_heads": "heads"}, given={"query_places": False}),
    "uhd_adapt_spatial_resampler": Folder("llava-uhd", {"num_heads": "heads"}),
}
#: Folders that `test_golden_merging.py`, `..._pruning.py` and `..._projectors.py` read, and their methods.
ELSEWHERE = {"tocom": "tocom", "tome": "tome", "tome_vit": "tome", "pitome": "pitome", "tofu": "tofu", "dtem": "dtem"}
ELSEWHERE |= {name: name for name in ("evit", "dynamicvit", "visionzip", "fastervlm", "vispruner", "prumerge")}
ELSEWHERE |= {"hpc_attention_pruning": "attention-pruning", "qformer": "q-former"}
ELSEWHERE |= {name: name.replace("_", "-") for name in ("c_abstractor", "pixel_shuffle", "matryoshka", "tokenpacker")}
#: The original's word for an output -> edgecomp's; whatever else a file holds is an intermediate value.
OUTPUTS = {"tokens": "tokens", "latents": "tokens", "last_hidden_state": "tokens", "y": "tokens", "logits": "logits"}

_FILES = [path for name in FOLDERS for path in sorted((ROOT / name).glob("*.safetensors"))]
each_file = pytest.mark.parametrize("path", _FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")


@dataclass(frozen=True)
class Golden:
    """A golden file, and the modules that must give its outputs."""

    folder: Folder
    dtype: str
    floor: float
    weights: dict[str, torch.Tensor]
    inputs: list[torch.Tensor]
    outputs: dict[str, torch.Tensor]
    params: Any
    site: Site
    budget: TokenBudget

    def module(self, output, weights):
        """Make the static module and load the original's weights."""
        cls = compressor_class(self.folder.method)
        module = cls(self.params, self.site, self.budget, output).eval()
        unread = tuple(load_recipe(self.folder.method).unread)
        assert module.load_original(weights, unread=unread) == cls.layout_of(weights) != ""
        return module

    @property
    def tolerance(self):
        exact = self.dtype == "float64" and not self.folder.rounds_to_fp32
        return FP64 if exact else FLOORS * self.floor


@pytest.fixture(scope="module")
def read():
    from safetensors import safe_open

    def load(path):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        folder, config = FOLDERS[path.parent.name], json.loads(metadata["config"])
        parts = {role: _with_role(tensors, role) for role in ("input", "weight", "output")}
        outputs = {OUTPUTS[name]: value for name, value in parts["output"].items() if name in OUTPUTS}
        values = {**folder.given, **{name: _find(config, where) for name, where in folder.params.items()}}
        cls = compressor_class(folder.method)
        inputs, site, values = _arrange(parts["input"], values)
        params = cls.parse_params(values, method=folder.method)
        found = cls.infer_params(parts["weight"], params)
        params = cls.parse_params({**values, **found}, method=folder.method)
        kept = outputs["tokens"].shape[-2]
        budget = TokenBudget(cls.count_tokens(params, site), kept)
        return Golden(folder, metadata["dtype"], _floor(path), parts["weight"], inputs, outputs, params, site, budget)

    return load


@each_file
def test_static_and_original_equal_the_golden_file(path, read, default_dtype):
    golden = read(path)
    for output, expected in golden.outputs.items():
        with default_dtype(golden.dtype):
            static = golden.module(output, golden.weights)
            inputs = _fit(golden.inputs, static.input_specs(len(golden.inputs[0])))
            for module in (static, static.reference()):
                with torch.inference_mode():
                    (got,) = module(*inputs)
                assert got.dtype == getattr(torch, golden.dtype)
                assert _error(got, expected) <= golden.tolerance, f"{output} of {type(module).__name__}"


@each_file
def test_onnx_equals_the_golden_file(path, read, tmp_path):
    import onnx_ir as ir

    golden = read(path)
    for output, expected in golden.outputs.items():
        static = golden.module(output, golden.weights)
        batch = len(golden.inputs[0])
        specs = static.input_specs(batch)
        opset = load_recipe(golden.folder.method).defaults.opset
        ir.save(lower(static, inputs=specs, outputs=static.output_specs(batch), opset=opset), tmp_path / "model.onnx")
        arrays = [_to_fp32(value).numpy() for value in _fit(golden.inputs, specs)]
        with open_runner("onnxruntime", tmp_path / "model.onnx", threads=1) as runner:
            got = runner.infer({spec.name: np.ascontiguousarray(a) for spec, a in zip(specs, arrays, strict=True)})
        (spec,) = static.output_specs(batch)
        assert _error(torch.from_numpy(got[spec.name]), expected) <= FLOORS * golden.floor, output


@each_file
def test_every_weight_of_the_original_counts(path, read):
    """A changed tensor of the checkpoint changes an output, or the recipe says that nothing reads it."""
    golden = read(path)
    stated = load_recipe(golden.folder.method).unread
    modules = [golden.module(output, golden.weights) for output in golden.outputs]
    specs = modules[0].input_specs(len(golden.inputs[0]))
    inputs = [_to_fp32(value) for value in _fit(golden.inputs, specs)]
    silent = []
    for name, tensor in golden.weights.items():
        broken = torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else tensor + 1
        weights = {**golden.weights, name: broken}
        with torch.inference_mode():
            for module in modules:
                module.load_original(weights, unread=tuple(stated))
            if all(torch.isfinite(value).all() for module in modules for value in module(*inputs)):
                silent.append(name)
    assert [name for name in silent if not any(fnmatch.fnmatchcase(name, pattern) for pattern in stated)] == []
    assert [name for name in golden.weights if name in stated] == [name for name in silent if name in stated]


def test_every_folder_is_read(note, read):
    """A folder of goldens that no line of `FOLDERS` names would be checked by nothing."""
    assert sorted({*FOLDERS, *ELSEWHERE}) == sorted(path.name for path in ROOT.iterdir() if path.is_dir())
    assert sorted(_FILES) == sorted(path for name in FOLDERS for path in (ROOT / name).rglob("*.safetensors"))
    cases = sum(len(read(path).outputs) for path in _FILES)
    assert cases >= len(_FILES) > 0
    note(f"golden: {len(_FILES)} files in {len(FOLDERS)} folders, {cases} outputs")


def test_every_unread_key_is_in_a_golden_file(read):
    """What a recipe excuses is there: a stale pattern could hide a weight that is lost."""
    for name in method_names():
        keys = [key for path in _FILES if FOLDERS[path.parent.name].method == name for key in read(path).weights]
        folders = [folder for folder, method in ELSEWHERE.items() if method == name]
        keys += [key for folder in folders for path in (ROOT / folder).glob("*.safetensors") for key in _weights(path)]
        for pattern in load_recipe(name).unread:
            assert fnmatch.filter(keys, pattern), f"{name}: no checkpoint has {pattern}"


def test_every_method_with_an_original_has_goldens(method):
    if load_recipe(method).level == "E4":
        pytest.skip("E4: there is no original that runs")
    assert method in {folder.method for folder in FOLDERS.values()} | set(ELSEWHERE.values())


# -- reading ------------------------------------------------------------------------------------------------


def _with_role(tensors, role):
    prefix = f"{role}."
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _weights(path):
    return _with_role(load_file(path), "weight")


def _find(config, where):
    for key in where.split("."):
        config = config[key]
    return config


def _floor(path):
    """Return the precision floor that the README states for a file."""
    text = (path.parent / "README.md").read_text()
    pattern = rf"^\| `{re.escape(path.name)}` .*\| (?:([0-9.e-]+) \((?:f(?:32|64) re-run|inputs perturbed.*)\)|-) \|$"
    (row,) = re.findall(pattern, text, re.MULTILINE)
    return float(row) if row else BF16  # only bf16 files state none


def _arrange(inputs, values):
    """Return the inputs in edgecomp's order, where the compressor stands, and the parameters that the axes tell."""
    if "image" in inputs:
        return [inputs["image"]], Site("encoder", image_size=inputs["image"].shape[-1]), values
    tokens = inputs["x"]
    axes = dict(zip(("images", "frames"), tokens.shape[1:-2], strict=False))
    site = Site("after", tokens_in=tokens.shape[-2], embed_dim=tokens.shape[-1])
    if "attention_mask" not in inputs:
        return [tokens], site, {**values, **axes}
    return [tokens, inputs["attention_mask"].bool()], site, {**values, **axes, "mask": True}


def _fit(inputs, specs):
    """Drop or add axes of size one, so that the shapes are those of edgecomp."""
    return [value.reshape(spec.shape) for value, spec in zip(inputs, specs, strict=True)]


def _to_fp32(value):
    return value.float() if value.is_floating_point() else value


def _error(got, expected):
    """Return the largest difference over the largest magnitude expected."""
    expected = expected.reshape(got.shape).double()
    return float((got.double() - expected).abs().max() / expected.abs().max())
