"""Contract 11: inputs and budgets at the edge give finite numbers, and what the original gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgecomp.bundle import golden_key
from edgecomp.errors import InvalidSpec
from edgecomp.parity import read_goldens
from edgecomp.runners import open_runner

HOSTILE = {
    "zeros": torch.zeros_like,
    "all-equal": lambda x: torch.full_like(x, 0.7),
    "equal-rows": lambda x: x[..., :1, :].expand_as(x).contiguous(),
    "huge": lambda x: x * 1e4,
    "tiny": lambda x: x * 1e-30,
}
_FINITE_FP64 = 1e-8  # relative: huge inputs saturate softmax, where the order of sums shows most


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_values_stay_finite(smoke, kind, assembled, make_inputs, bundle_of):
    exact = assembled(smoke, dtype="float64")
    inputs = _changed(make_inputs(exact, dtype="float64")["photo"], HOSTILE[kind])  # its masks are full
    for model in exact.models:
        with torch.inference_mode():
            for got, expected in _values(model, model(*inputs), model.reference()(*inputs)):
                assert torch.isfinite(got).all()
                assert (got - expected).abs().max() <= _FINITE_FP64 * max(1.0, float(expected.abs().max()))
    ragged = _changed(make_inputs(exact)["seeded"], HOSTILE[kind])
    for values in (inputs, ragged):
        for model, outputs in _run_fp32(smoke, assembled, bundle_of, values):
            for name, (eager, onnx) in outputs.items():
                assert np.isfinite(eager).all(), f"eager {name} of {model}"
                assert np.isfinite(onnx).all(), f"ONNX {name} of {model}"


@pytest.mark.parametrize("kind", ["zeros", "all-equal"])
def test_hostile_values_give_the_same_in_onnx(smoke, kind, assembled, make_inputs, bundle_of):
    inputs = _changed(make_inputs(assembled(smoke))["seeded"], HOSTILE[kind])
    values = {spec.name for model in assembled(smoke).models for spec in model.output_specs() if spec.kind == "tokens"}
    for _, outputs in _run_fp32(smoke, assembled, bundle_of, inputs):
        for eager, onnx in (outputs[name] for name in values):
            assert np.abs(eager - onnx).max() <= smoke.tolerance.max_rel * np.abs(eager).max()


@pytest.mark.parametrize("row", [0, 1])
def test_nan_stays_in_its_sample(smoke, row, assembled, make_inputs, bundle_of):
    clean = make_inputs(assembled(smoke))["seeded"]
    broken = [value.clone() for value in clean]
    broken[0][row].view(-1)[::7] = float("nan")
    other = 1 - row
    pairs = zip(
        _run_fp32(smoke, assembled, bundle_of, clean), _run_fp32(smoke, assembled, bundle_of, broken), strict=True
    )
    for (_, before), (_, after) in pairs:
        shown = []
        for name in before:
            for untouched, hit in zip(before[name], after[name], strict=True):
                assert np.isfinite(hit[other]).all()
                assert np.abs(hit[other].astype(np.float64) - untouched[other]).max() <= 1e-5
                shown.append(bool(np.isnan(hit[row]).any()))
        assert sum(shown) >= 2, "NaN in a sample must show in its own output, eager and ONNX"


def test_padded_rows_are_finite_and_equal_the_original(smoke, assembled, make_inputs, bundle_of):
    """No real token at all in one sample, a single one in the other."""
    exact = assembled(smoke, dtype="float64")
    inputs = make_inputs(exact, dtype="float64")["seeded"]
    kinds = [spec.kind for spec in exact.models[0].input_specs(2)]
    masks = [index for index, kind in enumerate(kinds) if kind in ("mask", "sizes")]
    if not masks:
        pytest.skip("it takes no mask")
    for index in masks:
        inputs[index] = torch.zeros_like(inputs[index])
        inputs[index][1, ..., (-1 if kinds[index] == "mask" else slice(None))] = 1
    for model in exact.models:
        with torch.inference_mode():
            for got, expected in zip(model(*inputs), model.reference()(*inputs), strict=True):
                assert torch.isfinite(got).all()
                assert float((got.double() - expected.double()).abs().max()) <= 1e-10
    for _, outputs in _run_fp32(smoke, assembled, bundle_of, inputs):
        for eager, onnx in outputs.values():
            assert np.isfinite(onnx).all()
            assert np.abs(eager - onnx).max() <= smoke.tolerance.max_rel * np.abs(eager).max()


def test_what_the_mask_hides_cannot_change_the_output(smoke, assembled, make_inputs):
    exact = assembled(smoke, dtype="float64")
    tokens, *rest = make_inputs(exact, dtype="float64")["seeded"]
    if not rest or rest[0].dtype != torch.bool:
        pytest.skip("it takes no mask")
    if exact.models[0].input_specs()[0].kind == "image":
        pytest.skip("its mask is of an encoder's tokens, each of which has read all pixels")
    assert not rest[0].all()
    hidden = torch.where(rest[0].unsqueeze(-1), tokens, tokens * 100 + 3)
    for model in exact.models:
        with torch.inference_mode():
            for one, other in zip(model(tokens, *rest), model(hidden, *rest), strict=True):
                assert float((one - other).abs().max()) <= 1e-10


def test_smallest_and_largest_budget(smoke, assembled, make_inputs, outputs_of):
    rule = smoke.recipe.rule(smoke.preset)
    tokens_in = assembled(smoke).models[0].compressor.budget.tokens_in
    possible = [count for count in range(1, tokens_in + 1) if rule.allows(count)]
    for output in outputs_of(smoke):
        for count in (possible[0], possible[-1]):
            assembly = assembled(smoke, output=output, dtype="float64", budgets=(count,))
            (model,) = assembly.models
            assert model.compressor.budget.tokens_out == count
            for inputs in make_inputs(assembly, dtype="float64").values():
                with torch.inference_mode():
                    for got, expected in zip(model(*inputs), model.reference()(*inputs), strict=True):
                        assert torch.isfinite(got).all()
                        assert float((got.double() - expected.double()).abs().max()) <= 1e-10


def test_budgets_beyond_the_rule_are_refused(smoke, make_assembly):
    rule = smoke.recipe.rule(smoke.preset)
    above = 1 + (max(rule.choices) if rule.choices else rule.maximum)
    for count in (0, -1, above):
        with pytest.raises(InvalidSpec, match=f"budget {count} "):
            make_assembly(smoke, budgets=(count,))


def _values(model, got, expected):
    """Pair the outputs; of a method that selects, the tokens alone: which of equal ones it takes is arbitrary."""
    specs = model.output_specs()
    selects = any(spec.kind == "indices" for spec in specs)
    pairs = zip(specs, got, expected, strict=True)
    return [(g, e) for spec, g, e in pairs if spec.kind == "tokens" or not selects]


def _changed(inputs, change):
    return [change(value) if value.is_floating_point() else value for value in inputs]


def _run_fp32(smoke, assembled, bundle_of, inputs):
    """Yield each bucket of batch 2 with its outputs by name: eager, ONNX Runtime."""
    bundle = bundle_of(smoke)
    _require_same_weights(bundle, smoke, assembled)
    inputs = [value.float() if value.is_floating_point() else value for value in inputs]
    models = {model.compressor.budget.tokens_out: model for model in assembled(smoke).models}
    for bucket in bundle.select(batch=2):
        with torch.inference_mode():
            eager = models[bucket.budget.tokens_out](*inputs)
        with open_runner("onnxruntime", bundle.path / bucket.model, threads=1) as runner:
            onnx = runner.infer({s.name: v.numpy() for s, v in zip(bucket.inputs, inputs, strict=True)})
        names = [spec.name for spec in bucket.outputs]
        yield bucket.model, {name: (value.numpy(), onnx[name]) for name, value in zip(names, eager, strict=True)}


def _require_same_weights(bundle, smoke, assembled):
    """The bundle and the module have the same seed, so that the bundle's goldens are the module's."""
    goldens = read_goldens(bundle.path)
    model = assembled(smoke).models[0]
    bucket = bundle.select(budget=model.compressor.budget.tokens_out, batch=2)[0]
    inputs = [torch.from_numpy(goldens[golden_key("input", "seeded", spec.name)].copy()) for spec in bucket.inputs]
    with torch.inference_mode():
        outputs = model(*inputs)
    for spec, value in zip(bucket.outputs, outputs, strict=True):
        key = golden_key("output", "seeded", spec.name, part=bucket.golden_part)
        assert np.abs(value.double().numpy() - goldens[key]).max() <= 1e-5
