"""Contract 5: a batch of two gives what two batches of one give."""

from __future__ import annotations

import numpy as np
import torch
from conftest import SEED, Smoke

from edgecomp import api
from edgecomp.bundle import golden_key, open_bundle
from edgecomp.parity import read_goldens
from edgecomp.runners import open_runner
from edgecomp.specs import load_recipe


def test_eager_batch_of_two_is_two_batches_of_one(smoke, assembled, outputs_of, make_inputs):
    for output in outputs_of(smoke):
        assembly = assembled(smoke, output=output, dtype="float64")
        for inputs in make_inputs(assembly, dtype="float64").values():
            for model in assembly.models:
                with torch.inference_mode():
                    both = model(*inputs)
                    single = [model(*(value[row : row + 1] for value in inputs)) for row in (0, 1)]
                for index, value in enumerate(both):
                    apart = torch.cat([outputs[index] for outputs in single])
                    assert float((value.double() - apart.double()).abs().max()) <= 1e-12


def test_onnx_batch_of_two_is_two_batches_of_one(sampled_method, bundle_of, tmp_path):
    smoke = Smoke(sampled_method, load_recipe(sampled_method).smoke_presets[0])
    if smoke.batches == (1, 2):
        bundle = bundle_of(smoke)
    else:
        options = {"preset": smoke.preset, "budget": smoke.budgets, "batch": (1, 2), "stem": False, "seed": SEED}
        bundle = open_bundle(api.export(smoke.method, out=tmp_path / "bundle", **options).bundle)
    goldens = read_goldens(bundle.path)
    for budget in smoke.budgets:
        (one,), (two,) = (bundle.select(budget=budget, batch=batch) for batch in (1, 2))
        with (
            open_runner("onnxruntime", bundle.path / one.model, threads=1) as single,
            open_runner("onnxruntime", bundle.path / two.model, threads=1) as double,
        ):
            for case in ("seeded", "photo"):
                inputs = {spec.name: goldens[golden_key("input", case, spec.name)] for spec in two.inputs}
                both = double.infer(inputs)
                apart = [
                    single.infer({key: np.ascontiguousarray(value[row : row + 1]) for key, value in inputs.items()})
                    for row in (0, 1)
                ]
                for name, value in both.items():
                    single_rows = np.concatenate([part[name] for part in apart])
                    assert np.abs(value.astype(np.float64) - single_rows).max() <= 1e-5
