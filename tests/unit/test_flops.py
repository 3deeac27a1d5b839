"""FLOPs counted from a graph's shapes are those of torch's own counter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("torch", reason="torch is not installed; pip install 'edgecomp[cpu]' brings it")
pytest.importorskip("onnxscript", reason="onnxscript is not installed; pip install 'edgecomp[cpu]' brings it")

import onnx_ir as ir
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edgecomp.export.flops import count_flops, count_module_flops, count_ops
from edgecomp.export.lower import lower
from edgecomp.specs import TensorSpec, load_recipe

if TYPE_CHECKING:
    from edgecomp.backbones.placed import PlacedModel, PlainModel


class Tuple(nn.Module):
    """Returns a module's result as the exporter wants it, in a tuple."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.module(x),)


def by_torch(module: nn.Module, *inputs: torch.Tensor) -> int:
    module.requires_grad_(False)  # its counter hooks itself to gradients, and fails without any
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return int(counter.get_total_flops())


def lowered(module: nn.Module, shape: tuple[int, ...]) -> ir.Model:
    with torch.no_grad():
        made = tuple(module(torch.zeros(shape)).shape)
    specs = TensorSpec("x", shape, "float32", "tokens"), TensorSpec("y", made, "float32", "tokens")
    return lower(Tuple(module.eval()), inputs=specs[:1], outputs=specs[1:], opset=20)


def smoke_models(method: str, preset: str) -> Sequence[PlacedModel | PlainModel]:
    from edgecomp.backbones.assemble import assemble
    from edgecomp.specs.order import Order

    assembly = assemble(Order(recipe=load_recipe(method), preset=preset))
    return (*assembly.models, *([assembly.plain] if assembly.plain is not None else []))


def parse(body: str, inputs: str, outputs: str) -> ir.Model:
    return ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 20]> g ({inputs}) => ({outputs}) {{ {body} }}')


def test_vit_tiny_within_one_percent_of_torch() -> None:
    import timm

    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    assert count_flops(lowered(vit, (1, 3, 224, 224))) == pytest.approx(
        by_torch(vit, torch.zeros(1, 3, 224, 224)), rel=0.01
    )


@pytest.mark.parametrize("preset", load_recipe("lookupvit").smoke_presets)
def test_lookupvit_within_one_percent_of_torch(preset: str) -> None:
    batch = 2
    model = smoke_models("lookupvit", preset)[0]
    specs = model.input_specs(batch)
    graph = lower(model, inputs=specs, outputs=model.output_specs(batch), opset=20)
    inputs = [torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in specs]
    assert count_flops(graph) == pytest.approx(by_torch(model, *inputs), rel=0.01)


@pytest.mark.parametrize("preset", load_recipe("lookupvit").smoke_presets)
def test_module_flops_need_no_run_and_leave_the_weights(preset: str) -> None:
    for model in smoke_models("lookupvit", preset):
        inputs = [torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in model.input_specs(1)]
        assert count_module_flops(model) == by_torch(model, *inputs) > 0
        assert all(parameter.device.type == "cpu" for parameter in model.parameters())


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(24, 40), (2, 5, 24)),
        (nn.Linear(24, 40, bias=False), (7, 24)),
        (nn.Conv2d(4, 8, 3, stride=2, padding=1), (2, 4, 8, 8)),
        (nn.Conv2d(4, 8, 3, groups=4), (1, 4, 8, 8)),
        (nn.Conv2d(4, 4, 7, padding=3, groups=4), (1, 4, 8, 8)),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 8, 8)),
        (nn.Conv1d(4, 8, 3), (1, 4, 16)),
    ],
    ids=["linear", "gemm", "conv", "grouped", "depthwise", "transposed", "conv1d"],
)
def test_single_layers_are_exact(module: nn.Module, shape: tuple[int, ...]) -> None:
    assert count_flops(lowered(module, shape)) == by_torch(module, torch.zeros(shape))


def test_sizes_of_images_are_read_where_the_weights_are() -> None:
    (model,) = smoke_models("resampler-2d", "smoke-sizes")
    assert [spec.kind for spec in model.input_specs()] == ["tokens", "sizes"]
    assert count_module_flops(model) > 0  # on torch's device `meta`


def test_gemm_with_its_left_side_transposed() -> None:
    model = parse("y = Gemm <transA = 1> (x, w)", "float[24,7] x, float[24,40] w", "float[7,40] y")
    assert count_flops(model) == 2 * 7 * 24 * 40


def test_branches_are_counted_and_other_ops_are_not() -> None:
    one = "then_branch = a () => (float[2,4] z) { z = MatMul (x, w) }"
    other = "else_branch = b () => (float[2,4] v) { v = Neg (s) }"
    inputs = "float[2,8] x, float[8,4] w, float[2,4] t, bool c"
    model = parse(f"s = Relu (t)\n y = If (c) <{one}, {other}>", inputs, "float[2,4] y")
    assert count_flops(model) == 2 * 2 * 8 * 4
    assert count_ops(model) == {"If": 1, "MatMul": 1, "Neg": 1, "Relu": 1}


def test_ops_are_counted_most_frequent_first() -> None:
    model = parse("a = Relu (x)\n b = Neg (a)\n y = Neg (b)", "float[2] x", "float[2] y")
    assert list(count_ops(model).items()) == [("Neg", 2), ("Relu", 1)]


def test_unknown_shape_is_an_error() -> None:
    model = parse("t = MatMul (x, w)\n y = Neg (t)", "float[2,8] x, float[8,4] w", "float[2,4] y")
    with pytest.raises(ValueError, match="shapes are checked before FLOPs are counted"):
        count_flops(model)
