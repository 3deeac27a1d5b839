"""Measures the noise that parity's thresholds stand on: ONNX Runtime against the original, fp32 against fp64.

    python benchmarks/noise.py [--seeds 3] [--method evit,tocom] [--preset s16] [--backbone vit_small_patch16_224]
                               [--image-size 512] [--budget 64] [--precision fp16] [--json FILE]

For every preset that is not a test size, with random weights of several seeds: the largest error over the largest
magnitude expected, of (a) the static graph in ONNX Runtime against the eager original, both fp32, and (b) the eager
original in fp32 against itself in fp64, in every bucket. A recipe's threshold is ten times the largest of all, rounded
up to one digit; the last table holds it against the recipe's.

With another precision it is (a) alone, of that precision (bf16 and fp8 by twins); where rounding decides a choice of
tokens, of the values with the original's choices forced, and the last column counts such outputs. These are what
`export/tolerances.toml` stands on.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import parse, publish

from edgecomp import api
from edgecomp.backbones.assemble import assemble
from edgecomp.bundle import open_bundle
from edgecomp.errors import EdgecompError
from edgecomp.export.golden import golden_inputs, run_module
from edgecomp.parity import compare
from edgecomp.specs import load_recipe, method_names
from edgecomp.specs.order import Order

_WHOLE = ("index", "count", "mask", "source_map", "source")  # outputs of whole numbers: equal, or wrong
_OTHERS = "other tokens"


def main() -> None:
    """Measure and print."""
    options = parse(
        __doc__ or "",
        seeds=(int, 3, "seeds of random weights"),
        first=(int, 0, "the first of them"),
        method=(str, "", "which, with commas; all if left out"),
        preset=(str, "", "which, with commas, test sizes too; all that are not test sizes if left out"),
        backbone=(str, "", "a host in place of the preset's"),
        image_size=(int, 0, "in place of the preset's"),
        budget=(int, 0, "in place of the preset's"),
        precision=(str, "fp32", "of the graphs"),
    )
    words = {"backbone": options.backbone, "image_size": options.image_size}
    budget = [options.budget] if options.budget else []
    rows: list[list[object]] = []
    largest: dict[str, float] = {}
    for method in options.method.split(",") if options.method else method_names():
        recipe = load_recipe(method)
        for preset in recipe.presets:
            if preset not in options.preset.split(",") if options.preset else preset.startswith("smoke"):
                continue
            for seed in range(options.first, options.first + (1 if options.quick else options.seeds)):
                order: dict[str, Any] = {"preset": preset, "seed": seed, **words}
                if options.precision == "fp32":
                    figures = _noise(method, budget, order)
                    seen = [float(figures[place]) for place in (0, 2) if figures[place] != _OTHERS]
                    largest[method] = max(largest.get(method, 0.0), *seen)
                else:
                    figures = _noise_of(options.precision, method, budget, order)
                rows.append([method, preset, seed, *figures])
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
    if options.precision == "fp32":
        limits = [[m, f"{10 * one:.2e}", f"{_up(10 * one):.0e}", _limit(m)] for m, one in largest.items()]
        publish("thresholds", ["method", "ten times", "rounded up", "the recipe's"], limits, None)


def _up(value: float) -> float:
    """Round up to one digit."""
    one = 10.0 ** math.floor(math.log10(value))
    return math.ceil(round(value / one, 6)) * one  # 2.0000001 is 2


def _limit(method: str) -> str:
    return f"{load_recipe(method).tolerances['fp32'].max_rel:.0e}"


def _noise(method: str, budget: list[int], order: dict[str, Any]) -> tuple[str, str, str, str]:
    with tempfile.TemporaryDirectory() as folder:
        report = api.export(method, budget=budget, out=Path(folder) / "bundle", **order)
        routers = {graph.model for graph in open_bundle(report.bundle).manifest.routers}
    assert report.parity is not None
    seen = [row.difference for row in report.parity.judged if row.model not in routers]
    asked = Order(recipe=load_recipe(method), budgets=tuple(map(str, budget)), **order)
    small = assemble(asked)
    torch.set_default_dtype(torch.float64)
    try:
        wide = assemble(asked)
    finally:
        torch.set_default_dtype(torch.float32)
    exact = []
    for model, double in zip(small.models, wide.models, strict=True):
        double.load_state_dict(model.state_dict())
        specs = model.input_specs()
        for inputs in golden_inputs(specs, seed=order["seed"], preprocess=small.preprocess).values():
            arrays = [inputs[spec.name] for spec in specs]
            narrow = run_module(model.reference(), arrays)
            wide_arrays = [a.astype("float64") if a.dtype == "float32" else a for a in arrays]
            wider = run_module(double.reference(), wide_arrays)
            # where another token was chosen there are other rows, and nothing to compare
            same = all(np.array_equal(a, b) for a, b in zip(narrow, wider, strict=True) if a.dtype.kind != "f")
            exact += [compare(a, b) for a, b in zip(narrow, wider, strict=True) if a.dtype.kind == "f" and same]
    return (
        f"{max(d.max_rel for d in seen):.2e}",
        f"{min(d.cosine_min for d in seen):.9f}",
        f"{max(d.max_rel for d in exact):.2e}" if exact else _OTHERS,
        f"{min(d.cosine_min for d in exact):.9f}" if exact else "",
    )


def _noise_of(precision: str, method: str, budget: list[int], order: dict[str, Any]) -> tuple[str, str, int, int]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = api.export(method, budget=budget, precision=precision, out=Path(folder) / "bundle", **order)
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
