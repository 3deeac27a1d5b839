"""Measures the noise that parity's thresholds stand on: ONNX Runtime against the original, fp32 against fp64.

    python benchmarks/noise.py [--seeds 3] [--method evit,tocom] [--json FILE]

For every preset that is not a test size, with random weights of several seeds: the largest error over the largest
magnitude expected, of (a) the static graph in ONNX Runtime against the eager original, both fp32, and (b) the eager
original in fp32 against itself in fp64. A recipe's threshold is ten times the largest of all, rounded up.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from common import parse, publish

from edgecomp import api
from edgecomp.backbones.assemble import assemble
from edgecomp.export.golden import golden_inputs, run_module
from edgecomp.parity import compare
from edgecomp.specs import load_recipe, method_names
from edgecomp.specs.order import Order


def main() -> None:
    """Measure and print."""
    options = parse(
        __doc__ or "",
        seeds=(int, 3, "seeds of random weights"),
        method=(str, "", "which, with commas; all if left out"),
    )
    rows: list[list[object]] = []
    for method in options.method.split(",") if options.method else method_names():
        recipe = load_recipe(method)
        for preset in recipe.presets:
            if preset.startswith("smoke"):
                continue
            for seed in range(1 if options.quick else options.seeds):
                rows.append([method, preset, seed, *_noise(method, preset, seed)])
                print(*rows[-1], flush=True)
    header = [
        "method",
        "preset",
        "seed",
        "ORT vs original, max rel",
        "cosine min",
        "fp32 vs fp64, max rel",
        "cosine min 64",
    ]
    publish("noise of fp32", header, rows, options.json)


def _noise(method: str, preset: str, seed: int) -> tuple[str, str, str, str]:
    with tempfile.TemporaryDirectory() as folder:
        report = api.export(method, preset=preset, seed=seed, out=Path(folder) / "bundle")
    assert report.parity is not None
    seen = [row.difference for row in report.parity.outputs]
    order = Order(recipe=load_recipe(method), preset=preset, seed=seed)
    small = assemble(order)
    torch.set_default_dtype(torch.float64)
    try:
        wide = assemble(order)
        wide.models[0].load_state_dict({k: v.double() for k, v in small.models[0].state_dict().items()})
    finally:
        torch.set_default_dtype(torch.float32)
    specs = small.models[0].input_specs()
    exact = []
    for inputs in golden_inputs(specs, seed=seed, preprocess=small.preprocess).values():
        arrays = [inputs[spec.name] for spec in specs]
        narrow = run_module(small.models[0].reference(), arrays)
        wide_arrays = [a.astype("float64") if a.dtype == "float32" else a for a in arrays]
        wider = run_module(wide.models[0].reference(), wide_arrays)
        # where another token was chosen there are other rows, and nothing to compare
        same = all(np.array_equal(a, b) for a, b in zip(narrow, wider, strict=True) if a.dtype.kind != "f")
        exact += [compare(a, b) for a, b in zip(narrow, wider, strict=True) if a.dtype.kind == "f" and same]
    return (
        f"{max(d.max_rel for d in seen):.2e}",
        f"{min(d.cosine_min for d in seen):.9f}",
        f"{max(d.max_rel for d in exact):.2e}" if exact else "other tokens",
        f"{min(d.cosine_min for d in exact):.9f}" if exact else "",
    )


if __name__ == "__main__":
    main()
