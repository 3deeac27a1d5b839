"""Measures the noise that parity's thresholds stand on: ONNX Runtime against the original, fp32 against fp64.

    python benchmarks/noise.py [--seeds 3] [--method evit,tocom] [--precision fp16] [--json FILE]

For every preset that is not a test size, with random weights of several seeds: the largest error over the largest
magnitude expected, of (a) the static graph in ONNX Runtime against the eager original, both fp32, and (b) the eager
original in fp32 against itself in fp64. A recipe's threshold is ten times the largest of all, rounded up.

With another precision it is (a) alone, of that precision (bf16 and fp8 by twins); where rounding decides a choice of
tokens, of the values with the original's choices forced, and the last column counts such outputs. These are what
`export/tolerances.toml` stands on.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from common import parse, publish

from edgecomp import api
from edgecomp.backbones.assemble import assemble
from edgecomp.errors import EdgecompError
from edgecomp.export.golden import golden_inputs, run_module
from edgecomp.parity import compare
from edgecomp.specs import load_recipe, method_names
from edgecomp.specs.order import Order

_WHOLE = ("index", "count", "mask", "source_map", "source")  # outputs of whole numbers: equal, or wrong


def main() -> None:
    """Measure and print."""
    options = parse(
        __doc__ or "",
        seeds=(int, 3, "seeds of random weights"),
        method=(str, "", "which, with commas; all if left out"),
        precision=(str, "fp32", "of the graphs"),
    )
    rows: list[list[object]] = []
    for method in options.method.split(",") if options.method else method_names():
        recipe = load_recipe(method)
        for preset in recipe.presets:
            if preset.startswith("smoke"):
                continue
            for seed in range(1 if options.quick else options.seeds):
                if options.precision == "fp32":
                    rows.append([method, preset, seed, *_noise(method, preset, seed)])
                else:
                    rows.append([method, preset, seed, *_noise_of(options.precision, method, preset, seed)])
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
    if options.precision != "fp32":
        header[4:] = ["cosine min", "outputs", "of them forced"]
    publish(f"noise of {options.precision}", header, rows, options.json)


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


def _noise_of(precision: str, method: str, preset: str, seed: int) -> tuple[str, str, int, int]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = api.export(method, preset=preset, precision=precision, seed=seed, out=Path(folder) / "bundle")
        except EdgecompError as error:  # a threshold that is missed, or nothing to quantise: it stands in the table
            return "-", str(error)[:160], 0, 0
    assert report.parity is not None
    ties = report.parity.ties
    rows = [row for row in report.parity.outputs if row not in ties]
    rows += [row for part in report.parity.selection for row in part.forced] if ties else []
    seen = [row.difference for row in rows if row.output not in _WHOLE]
    largest, least = max(d.max_rel for d in seen), min(d.cosine_min for d in seen)
    return f"{largest:.2e}", f"{least:.9f}", len(report.parity.outputs), len(ties)


if __name__ == "__main__":
    main()
