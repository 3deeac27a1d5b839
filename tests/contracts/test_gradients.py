"""The static module can be trained: its gradients are the original's, for parameters and for what goes in."""

from __future__ import annotations

import fnmatch

import pytest
import torch

import edgecomp
from edgecomp.errors import InvalidSpec

_REL = 1e-8  # of the largest gradient of its tensor's kind, in fp64


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # an original that decides in Python
def test_gradients_are_those_of_the_original(smoke, make_assembly, make_inputs):
    """A random projection of the outputs has the same gradients through the static form and through the original."""
    assembly = make_assembly(smoke, dtype="float64")
    model = assembly.models[0].train()
    compressor = model.compressor
    inputs = make_inputs(assembly, dtype="float64")["seeded"]
    parameters = {name: value for name, value in compressor.named_parameters() if value.requires_grad}
    assert len(parameters) == len(list(compressor.parameters()))
    found = []
    for module in (model, model.reference()):
        given = [value.clone().requires_grad_(value.is_floating_point()) for value in inputs]
        generator = torch.Generator().manual_seed(2)
        values = [value for value in module(*given) if value.is_floating_point()]
        total = sum((value * torch.randn(value.shape, generator=generator)).sum() for value in values)
        wanted = [*parameters.values(), *(value for value in given if value.requires_grad)]
        found.append(torch.autograd.grad(total, wanted, allow_unused=True) if total.requires_grad else [])
    largest = max((float(value.abs().max()) for value in found[1] if value is not None), default=0.0)
    assert largest > 0 or not found[1]
    for name, got, expected in zip([*parameters, "input", *["input"] * 9], *found, strict=False):
        got, expected = (torch.zeros(1) if value is None else value for value in (got, expected))
        assert float((got - expected).abs().max()) <= _REL * largest, name


def test_the_module_that_python_gives_can_be_trained(smoke, assembled, outputs_of):
    """Each weight of `edgecomp.compressor` gets a gradient by some output; where it can give no module, it says why."""
    preset = smoke.recipe.preset(smoke.preset)
    if preset.placement == "inside":
        with pytest.raises(InvalidSpec, match=f"{smoke.method}: its preset .* between the blocks of an encoder"):
            edgecomp.compressor(smoke.method, preset=smoke.preset)
        return
    words = {"preset": smoke.preset}  # of several budgets the largest
    if preset.placement == "after" and preset.backbone != "none":  # of the host that the preset names
        words["tokens"] = assembled(smoke).models[0].compressor.site.tokens_in
    without, ranking = None, set()
    for output in outputs_of(smoke):
        module = edgecomp.compressor(smoke.method, output=output, **words)
        assert module.training
        parameters = dict(module.named_parameters())
        if not parameters:
            return
        ranking |= {name for pattern in module.ranking_params for name in fnmatch.filter(parameters, pattern)}
        generator = torch.Generator().manual_seed(3)
        inputs = [
            torch.randn(spec.shape, generator=generator)
            if spec.dtype.startswith("float")
            else torch.ones(spec.shape, dtype=getattr(torch, spec.dtype))
            for spec in module.input_specs(2)
        ]
        sum(value.square().sum() for value in module(*inputs) if value.is_floating_point()).backward()
        left = {name for name, value in parameters.items() if value.grad is None}
        without = left if without is None else without & left
    assert without <= ranking
