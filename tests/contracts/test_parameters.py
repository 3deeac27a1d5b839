"""Contract 4: every parameter is read and has an effect, or stands under `unread` in the recipe."""

from __future__ import annotations

import fnmatch

import torch

_DRAWS = 4  # of a parameter that only ranks: one alone may choose the same tokens by chance
_LEAST = 1e-9  # gradients of what has an effect are above 1e-4; rounding leaves about 1e-16 of what cancels


def test_every_parameter_is_read(smoke, make_assembly, outputs_of, make_inputs):
    """NaN in a parameter of the compressor reaches some output: nothing that is read can stop it."""
    silent = None
    for output in outputs_of(smoke):
        assembly = make_assembly(smoke, output=output, dtype="float64")
        model = assembly.models[-1]  # the largest budget
        inputs = make_inputs(assembly, dtype="float64")["seeded"]
        unmoved = set()
        for name, parameter in model.compressor.named_parameters():
            if _only_ranks(model.compressor, name):
                continue
            before = parameter.detach().clone()
            with torch.inference_mode():
                parameter.fill_(float("nan"))
                if all(torch.isfinite(value).all() for value in model(*inputs)):
                    unmoved.add(name)
                parameter.copy_(before)
        silent = unmoved if silent is None else silent & unmoved
    assert _unstated(smoke, silent) == []


def test_every_parameter_has_an_effect(smoke, make_assembly, outputs_of, make_inputs, monkeypatch):
    """The gradient of a random projection of the outputs is not zero.

    Softmax cancels whatever it adds to all scores of a query, a bias of the keys for example, exactly. A parameter
    without gradient is therefore tried again with a sigmoid in its place, which cancels nothing.
    """
    without = _without_gradient(smoke, make_assembly, outputs_of, make_inputs)
    if without:
        monkeypatch.setattr(torch.Tensor, "softmax", lambda scores, dim: scores.sigmoid())
        without &= _without_gradient(smoke, make_assembly, outputs_of, make_inputs)
    assert _unstated(smoke, without) == []


def test_parameters_that_only_rank_change_the_selection(smoke, make_assembly, make_inputs):
    """Neither NaN nor a gradient passes a choice, so each parameter behind one is replaced: other tokens are chosen."""
    assembly = make_assembly(smoke, dtype="float64")
    model = assembly.models[0]
    inputs = make_inputs(assembly, dtype="float64")["seeded"]
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        expected = model(*inputs)
        for name, parameter in model.compressor.named_parameters():
            if not _only_ranks(model.compressor, name) or not _unstated(smoke, [name]):
                continue
            before = parameter.detach().clone()
            changes = 0
            for _ in range(_DRAWS):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
                changes += any(not torch.equal(*pair) for pair in zip(model(*inputs), expected, strict=True))
            parameter.copy_(before)
            assert changes, name


def _only_ranks(compressor, name):
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in compressor.ranking_params)


def _without_gradient(smoke, make_assembly, outputs_of, make_inputs):
    largest = {}
    for output in outputs_of(smoke):
        assembly = make_assembly(smoke, output=output, dtype="float64")
        model = assembly.models[-1]
        inputs = make_inputs(assembly, dtype="float64")["seeded"]
        generator = torch.Generator().manual_seed(1)
        values = [value for value in model(*inputs) if value.is_floating_point() and value.requires_grad]
        total = sum((value * torch.randn(value.shape, generator=generator)).sum() for value in values)
        named = {
            name: parameter
            for name, parameter in model.named_parameters()
            if not _only_ranks(model.compressor, name.removeprefix("compressor."))
        }
        if not named:
            continue
        names, parameters = zip(*named.items(), strict=True)
        for name, gradient in zip(names, torch.autograd.grad(total, parameters, allow_unused=True), strict=True):
            size = 0.0 if gradient is None else float(gradient.abs().max())
            largest[name] = max(size, largest.get(name, 0.0))
    return {name for name, size in largest.items() if size < _LEAST}


def _unstated(smoke, names):
    stated = smoke.recipe.unread
    own = [name.removeprefix("compressor.") for name in sorted(names)]
    return [name for name in own if not any(fnmatch.fnmatchcase(name, pattern) for pattern in stated)]
