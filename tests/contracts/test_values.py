"""Contract 2: the static module gives what the eager original gives on the same parameters."""

from __future__ import annotations

import pytest
import torch

# In fp64 only the order of sums differs, which is about 1e-14 on outputs of order one.
LIMITS = {"float64": 1e-10, "float32": 1e-5}


@pytest.mark.parametrize("dtype", LIMITS)
def test_static_equals_the_original(smoke, dtype, assembled, outputs_of, make_inputs):
    for output in outputs_of(smoke):
        assembly = assembled(smoke, output=output, dtype=dtype)
        assert {parameter.dtype for parameter in assembly.models[0].parameters()} <= {getattr(torch, dtype)}
        for case, inputs in make_inputs(assembly, dtype=dtype).items():
            for model in assembly.models:
                error = _error(model, inputs)
                assert error <= LIMITS[dtype], f"{case}, {output}, budget {model.compressor.budget.tokens_out}"


def test_static_equals_the_original_on_raw_pixels(smoke, assembled, make_inputs):
    if assembled(smoke).models[0].input_specs()[0].kind != "image":
        pytest.skip("it takes tokens: there are no pixels")
    raw, normalised = (assembled(smoke, dtype="float64", input_dtype=kind) for kind in ("uint8", "float32"))
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (raw.preprocess.mean, raw.preprocess.std))
    for inputs in make_inputs(raw, dtype="float64").values():
        assert inputs[0].dtype == torch.uint8
        prepared = [((inputs[0].to(torch.float64) / 255 - mean) / std).movedim(-1, -3), *inputs[1:]]
        for model, other in zip(raw.models, normalised.models, strict=True):
            assert _error(model, inputs) <= LIMITS["float64"]
            with torch.inference_mode():
                for got, expected in zip(model(*inputs), other(*prepared), strict=True):
                    assert _difference(got, expected) <= LIMITS["float64"]


def test_the_original_shares_the_parameters(smoke, assembled):
    for model in assembled(smoke).models:
        own = {id(parameter) for parameter in model.parameters()}
        assert {id(parameter) for parameter in model.reference().parameters()} == own


def test_outputs_depend_on_the_input(smoke, assembled, make_inputs):
    """A module that gives the same for any input would pass every comparison."""
    assembly = assembled(smoke, dtype="float64")
    seeded, photo = make_inputs(assembly, dtype="float64").values()
    for model in assembly.models:
        with torch.inference_mode():
            for one, other in zip(model(*seeded), model(*photo), strict=True):
                assert _difference(one, other) > 100 * smoke.tolerance.max_rel
                assert _difference(one[0], one[1]) > 100 * smoke.tolerance.max_rel


def _error(model, inputs):
    with torch.inference_mode():
        pairs = zip(model(*inputs), model.reference()(*inputs), strict=True)
    return max(_difference(got, expected) for got, expected in pairs)


def _difference(got, expected):
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    return float((got.double() - expected.double()).abs().max())
