"""Contract 4: every parameter is read and has an effect, or stands under `unread` in the recipe."""

from __future__ import annotations

import fnmatch

import torch


def test_every_parameter_is_read(smoke, make_assembly, outputs_of, make_inputs):
    """NaN in a parameter reaches some output: nothing that is read can stop it."""
    silent = None
    for output in outputs_of(smoke):
        assembly = make_assembly(smoke, output=output, dtype="float64")
        model = assembly.models[-1]  # the largest budget
        inputs = make_inputs(assembly, dtype="float64")["seeded"]
        unmoved = set()
        for name, parameter in model.named_parameters():
            before = parameter.detach().clone()
            with torch.inference_mode():
                parameter.fill_(float("nan"))
                if all(torch.isfinite(value).all() for value in model(*inputs)):
                    unmoved.add(name)
                parameter.copy_(before)
        silent = unmoved if silent is None else silent & unmoved
    assert _unstated(smoke, silent) == []


def test_every_parameter_has_an_effect(smoke, make_assembly, outputs_of, make_inputs):
    """The gradient of a random projection of the outputs is not zero, but for what softmax cancels exactly."""
    largest = {}
    for output in outputs_of(smoke):
        assembly = make_assembly(smoke, output=output, dtype="float64")
        model = assembly.models[-1]
        inputs = make_inputs(assembly, dtype="float64")["seeded"]
        generator = torch.Generator().manual_seed(1)
        total = sum((value * torch.randn(value.shape, generator=generator)).sum() for value in model(*inputs))
        names, parameters = zip(*model.named_parameters(), strict=True)
        for name, gradient in zip(names, torch.autograd.grad(total, parameters, allow_unused=True), strict=True):
            size = 0.0 if gradient is None else float(gradient.abs().max())
            largest[name] = max(size, largest.get(name, 0.0))
    without = {name for name, size in largest.items() if size < 1e-9}
    assert _unstated(smoke, without) == []


def _unstated(smoke, names):
    stated = smoke.recipe.unread
    own = [name.removeprefix("compressor.") for name in sorted(names)]
    return [name for name in own if not any(fnmatch.fnmatchcase(name, pattern) for pattern in stated)]
