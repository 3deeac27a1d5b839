"""Contract 3 for token merging: the original's numbers, of one step and of a whole vision transformer with it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from goldens import FLOORS, FP32, FP64, by_onnx, golden_files, golden_host, read_golden, relative_error
from safetensors.torch import save_file

from edgecomp.backbones.assemble import assemble
from edgecomp.backbones.inside import InsideModel
from edgecomp.compressors._inside import BlockState
from edgecomp.compressors._merging import parse_r
from edgecomp.compressors._tokens import (
    group_matrix,
    merge_pairs,
    pair_tokens,
    source_map,
    top_k_merge,
    unmerge,
)
from edgecomp.compressors.dtem import DTEM, DTEMParams
from edgecomp.compressors.pitome import PiToMe, PiToMeParams
from edgecomp.compressors.tocom import ToCom, ToComParams
from edgecomp.compressors.tofu import ToFu, ToFuParams
from edgecomp.compressors.tome import ToMe, ToMeParams, bipartite_soft_matching
from edgecomp.export.lower import lower
from edgecomp.export.passes import add_merge_body
from edgecomp.runners import open_runner
from edgecomp.specs import Site, TensorSpec, TokenBudget, load_recipe
from edgecomp.specs.order import Order


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


@pytest.mark.parametrize("path", golden_files("tome"), ids=lambda path: path.stem)
def test_step_of_tome(path, tmp_path):
    config, inputs, outputs, _, _ = read_golden(path)
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
    assert relative_error(merged, outputs["merged"]) <= limit
    for mode in ("sum", "mean"):
        assert relative_error(merge_pairs(pairing, x, size, mode=mode)[0], outputs[f"merged_{mode}"]) <= limit
    assert relative_error(unmerge(merged, rows), outputs["unmerged"]) <= limit
    if "source" in outputs:
        assert torch.equal(group_matrix(rows, merged.shape[1]), outputs["source"].bool())
    original = bipartite_soft_matching(metric, x, size, config["r"], config["cls"], bool(config["cls"]))
    assert torch.equal(original.rows.long(), outputs["src_map"])
    assert relative_error(original.tokens, outputs["merged"]) <= limit
    for mode, key in (("wavg", "merged"), ("sum", "merged_sum"), ("mean", "merged_mean")):
        y, merged_size, src_map = _onnx_step(tmp_path, (metric, x, size), mode=mode, **attributes)
        assert np.array_equal(src_map, outputs["src_map"].numpy())
        assert np.array_equal(merged_size, outputs["merged_size"].float().numpy())
        assert relative_error(y, outputs[key]) <= FP32


def _reduce(module, metric, x, size):
    """Run one step of a compressor in the first block of a host that hands over a metric."""
    with torch.inference_mode():
        return module.reduce(0, BlockState(x, x, metric.unsqueeze(1), size))


def _merged_by_onnx(folder, compressor, metric, x, size):
    """Run one step of a compressor as ONNX with its function body."""

    class Step(torch.nn.Module):
        def forward(self, metric, x, size):
            return tuple(compressor.reduce(0, BlockState(x, x, metric.unsqueeze(1), size)))

    values = {"metric": metric, "x": x, "size": size}
    specs = [TensorSpec(name, tuple(value.shape), "float32", "features") for name, value in values.items()]
    batch, tokens, width = x.shape
    left = tokens - compressor.steps[0]
    outputs = [
        TensorSpec("y", (batch, left, width), "float32", "tokens"),
        TensorSpec("sizes", (batch, left, 1), "float32", "features"),
        TensorSpec("rows", (batch, tokens), "int32", "indices"),
    ]
    model = lower(Step(), inputs=specs, outputs=outputs, opset=20)
    add_merge_body(model)
    ir.save(model, folder / "step.onnx")
    with open_runner("onnxruntime", folder / "step.onnx", threads=2) as runner:
        got = runner.infer({name: np.ascontiguousarray(value.numpy()) for name, value in values.items()})
    return tuple(torch.from_numpy(got[spec.name]) for spec in outputs)


def _step_of(cls, params, x, prefix):
    """Make a compressor for a host of one block that hands over these tokens."""
    tokens = x.shape[1] - prefix
    site = Site("inside", 0, tokens, x.shape[2], prefix, 1)
    (left,) = cls.default_counts(params, site)
    return cls(params, site, TokenBudget(tokens, left, prefix))


@pytest.mark.parametrize("path", golden_files("pitome"), ids=lambda path: path.stem)
def test_step_of_pitome(path, tmp_path):
    config, inputs, outputs, _, _ = read_golden(path)
    metric, x = inputs["metric"], inputs["x"]
    size = inputs.get("size", torch.ones_like(x[..., :1]))
    variant = {"vision": "score", "bsm": "bsm"}[config["kind"]]
    params = PiToMeParams(keep_ratio=config["ratio"], margin=config["margin"], variant=variant)
    compressor = _step_of(PiToMe, params, x, config["cls"])
    for module in (compressor, compressor.reference()):
        for merged in (_reduce(module, metric, x, size), _reduce(module, *(v.double() for v in (metric, x, size)))):
            assert relative_error(merged.tokens, outputs["merged"]) <= FP32
            assert torch.equal(merged.size.float(), outputs["merged_size"])
            assert torch.equal(group_matrix(merged.rows, merged.size.shape[1]), outputs["source"].bool())
    mean = _reduce(compressor, metric, x, torch.ones_like(size))
    assert relative_error(mean.tokens, outputs["merged_mean"]) <= FP32
    y, sizes, rows = _merged_by_onnx(tmp_path, compressor, metric, x, size)
    assert relative_error(y, outputs["merged"]) <= FP32
    assert torch.equal(sizes, outputs["merged_size"])
    assert torch.equal(group_matrix(rows, y.shape[1]), outputs["source"].bool())


# The files hold `merged_amax` too, the largest of each group by element. The code that was run has it as a mode of its
# reduction; neither paper merges by it, and the op has no such mode.
@pytest.mark.parametrize("path", golden_files("tofu"), ids=lambda path: path.stem)
def test_step_of_tofu(path, tmp_path):
    config, inputs, outputs, _, _ = read_golden(path)
    metric, x = inputs["metric"], inputs["x"]
    size, prefix = torch.ones_like(x[..., :1]), config["cls"]
    merging = _step_of(ToFu, ToFuParams(keep_ratio=config["ratio"]), x, prefix)
    assert x.shape[1] - merging.steps[0] == outputs["merged_tofu"].shape[1]
    for module in (merging, merging.reference()):
        assert relative_error(_reduce(module, metric, x, size).tokens, outputs["merged_tofu"]) <= FP32
    y, _, _ = _merged_by_onnx(tmp_path, merging, metric, x, size)
    assert relative_error(y, outputs["merged_tofu"]) <= FP32
    attributes = {"r": merging.steps[0], "num_prefix_tokens": prefix, "order": merging.order}
    mean, _, _ = top_k_merge(metric, x, size, mode="mean", **attributes)
    assert relative_error(mean, outputs["merged_mean"]) <= FP32
    mean, _, _ = _onnx_step(tmp_path, (metric, x, size), mode="mean", **attributes)
    assert relative_error(mean, outputs["merged_mean"]) <= FP32


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_pruned_tofu_is_the_ops_own_pruning(prefix, tmp_path):
    """The rows of the targets are put in by hand where a block prunes, since a graph holds one mode."""
    metric, x = torch.randn(2, 2, 31, 8, generator=torch.Generator().manual_seed(prefix)).unbind()
    size = torch.ones_like(x[..., :1])
    pruning = _step_of(ToFu, ToFuParams(r=9, prune_blocks=1), x, prefix)
    attributes = {"r": 9, "num_prefix_tokens": prefix, "order": pruning.order}
    expected = top_k_merge(metric, x, size, mode="prune", **attributes)
    for got in (_reduce(pruning, metric, x, size), _merged_by_onnx(tmp_path, pruning, metric, x, size)):
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


# -- a whole model ----------------------------------------------------------------------------------------------


def _inside(cls, params, output, host, site):
    (left,) = cls.default_counts(params, site)
    compressor = cls(params, site, TokenBudget(site.tokens_in, left, 1), output)
    return InsideModel(compressor, host, preprocess=None, input_dtype="float32").eval()


def _whole_model(config, weights, output):
    r, inflect = config["r"] if isinstance(config["r"], list) else (config["r"], 0.0)
    return _inside(ToMe, ToMeParams(r=r, inflect=inflect), output, *golden_host(config, weights))


@pytest.mark.parametrize("path", golden_files("tome_vit"), ids=lambda path: path.stem)
def test_whole_model_of_tome(path, tmp_path, default_dtype):
    config, inputs, outputs, weights, floor = read_golden(path)
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
        assert relative_error(tokens, outputs["features"]) <= limit
        assert relative_error(logits, outputs["logits"]) <= limit
        assert torch.equal(size, outputs["size"])
        assert torch.equal(group_matrix(rows, tokens.shape[1]), outputs["source"].bool())

    got = by_onnx(tmp_path, models["tokens"].float(), image)
    assert relative_error(got["merged"], outputs["features"]) <= FLOORS * floor
    assert np.array_equal(got["size"], outputs["size"].float().numpy())
    assert torch.equal(group_matrix(torch.from_numpy(got["source_map"]), tokens.shape[1]), outputs["source"].bool())


@pytest.mark.parametrize("path", golden_files("dtem"), ids=lambda path: path.stem)
def test_whole_model_of_dtem(path, tmp_path):
    config, inputs, outputs, weights, floor = read_golden(path)
    image, unread = inputs["image"], tuple(load_recipe("dtem").unread)
    own, of_host = DTEM.split_checkpoint(weights)
    assert len(own) + len(of_host) == len(weights)
    host, site = golden_host(config, of_host)
    params = DTEMParams(r=config["r"], **DTEM.infer_params(own, DTEMParams()))
    models = {output: _inside(DTEM, params, output, host, site) for output in ("tokens", "logits")}
    for model in models.values():
        for state in (own, weights):
            assert model.compressor.load_original(state, unread=unread) == DTEM.layout_of(state) == "dtem"
    compressor = models["tokens"].compressor
    assert (50 - np.cumsum(compressor.steps)).tolist() == outputs["tokens_per_layer"].tolist()
    vit = host.model
    with torch.inference_mode():
        metric = compressor.heads[0](vit.blocks[0].norm1(vit._pos_embed(vit.patch_embed(image))))
    assert relative_error(metric, outputs["metric0"]) <= FLOORS * floor
    for form in (lambda model: model, lambda model: model.reference()):
        with torch.inference_mode():
            tokens, _, _ = form(models["tokens"])(image)
            (logits,) = form(models["logits"])(image)
        assert relative_error(tokens, outputs["features"]) <= FLOORS * floor
        assert relative_error(logits, outputs["logits"]) <= FLOORS * floor
    assert relative_error(by_onnx(tmp_path, models["tokens"], image)["merged"], outputs["features"]) <= FLOORS * floor
    assert relative_error(by_onnx(tmp_path, models["logits"], image)["logits"], outputs["logits"]) <= FLOORS * floor


@pytest.mark.parametrize("path", golden_files("tocom"), ids=lambda path: path.stem)
def test_whole_model_of_tocom(path, tmp_path):
    config, inputs, outputs, weights, floor = read_golden(path)
    own, of_host = ToCom.split_checkpoint(weights)
    host, site = golden_host(config, of_host)
    params = ToComParams(
        r=config["r_tgt"], r_source=config["r_src"], scale=config["scale"], adapter_dim=16 * config["tocom_dim"]
    )
    assert ToCom.infer_params(own, params) == {"adapter_dim": params.adapter_dim, "embed_dim": config["dim"]}
    models = {output: _inside(ToCom, params, output, host, site) for output in ("tokens", "logits")}
    for model in models.values():
        assert model.compressor.load_original(weights) == "tocom"
    compressor, image = models["tokens"].compressor, inputs["image"]
    assert (site.tokens_in + 1 - np.cumsum(compressor.steps)).tolist() == outputs["tokens_per_layer"].tolist()
    with torch.inference_mode():
        normed = host.model.blocks[0].norm1(host.embed(image))
        for low, name in zip(compressor.shift(0), ("block0_q_delta", "block0_v_delta"), strict=True):
            delta = (normed @ low.down.T * low.weights) @ low.up.T
            assert relative_error(delta, outputs[name]) <= FLOORS * floor
    for form in (lambda model: model, lambda model: model.reference()):
        with torch.inference_mode():
            tokens, _, _ = form(models["tokens"])(image)
            (logits,) = form(models["logits"])(image)
        assert relative_error(tokens, outputs["features"]) <= FLOORS * floor
        assert relative_error(logits, outputs["logits"]) <= FLOORS * floor
    with models["tokens"].as_exported(), models["logits"].as_exported():
        assert len(dict(models["tokens"].named_buffers())) >= 2 * config["depth"]
        assert (
            relative_error(by_onnx(tmp_path, models["tokens"], image)["merged"], outputs["features"]) <= FLOORS * floor
        )
        assert relative_error(by_onnx(tmp_path, models["logits"], image)["logits"], outputs["logits"]) <= FLOORS * floor


def test_tocom_folded_equals_unfolded():
    """In fp64 within 1e-12: the reference adds to what queries and values are, the static form to their matrices."""
    config, inputs, _, weights, _ = read_golden(golden_files("tocom")[0])
    own, of_host = ToCom.split_checkpoint(weights)
    host, site = golden_host(config, of_host)
    model = _inside(ToCom, ToComParams(r=8, adapter_dim=16 * config["tocom_dim"]), "tokens", host, site)
    model.compressor.load_original(own)
    model, image = model.double(), inputs["image"].double()
    with torch.inference_mode():
        folded, _, _ = model(image)
        unfolded, _, _ = model.reference()(image)
        model.compressor.params = ToComParams(r=8, r_source=8, adapter_dim=16 * config["tocom_dim"])
        uncorrected, _, _ = model(image)
    assert relative_error(folded, unfolded) <= 1e-12
    assert relative_error(uncorrected, unfolded) > 1e-4


def test_a_checkpoint_of_dtem_serves_for_host_and_heads(tmp_path):
    from timm import create_model

    torch.manual_seed(3)
    state = {}
    for key, value in create_model("test_vit").state_dict().items():
        if ".attn.qkv." in key:
            head = torch.randn(8, *value.shape[1:])
            state[key.replace(".qkv.", ".qkv.qkv_layer.")] = value
            state[key.replace(".qkv.", ".qkv.metric_layer.")] = head
            value = torch.cat([value, head])
        state[key] = value
    path = tmp_path / "dtem.safetensors"
    save_file(state, path)
    recipe = load_recipe("dtem")
    assembly = assemble(Order(recipe=recipe, backbone="test_vit", image_size=160, budgets=("40",), weights=str(path)))
    assert (assembly.preset, assembly.params["metric_dim"], assembly.weights.layout) == ("vit", 8, "dtem")
    assert assembly.backbone_weights.name == assembly.weights.name
    loaded = assembly.models[0]
    for key, value in loaded.backbone.model.state_dict().items():
        assert torch.equal(value, state[key.replace(".qkv.", ".qkv.qkv_layer.")]), key
    for key, value in loaded.compressor.state_dict().items():
        _, block, name = key.split(".")
        assert torch.equal(value, state[f"blocks.{block}.attn.qkv.metric_layer.{name}"]), key
