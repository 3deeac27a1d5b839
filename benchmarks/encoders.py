"""lookupvit and the plain ViT-S over resolution: FLOPs, parameters, latency in ONNX Runtime and in torch eager.

    python benchmarks/encoders.py [--rounds 7] [--largest 896] [--json FILE]

FLOPs and parameters at 224, 448, 896 and 1792 pixels; latency at 224, 448 and 896, batch 1, 1 and 2 threads, all
graphs of one resolution interleaved. At 224 torch eager of the same modules stands in the same rounds, and so do
perceiver's resampler after ViT-S and its encoder alone.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import interleave, parse, publish, ratio

from edgecomp import api
from edgecomp.backbones.assemble import assemble
from edgecomp.bundle import open_bundle
from edgecomp.export.flops import count_module_flops
from edgecomp.runners import open_runner
from edgecomp.specs import load_recipe
from edgecomp.specs.order import Order

_GRIDS = ("9", "25", "49", "100")


def main() -> None:
    """Measure and print."""
    options = parse(__doc__ or "", rounds=(int, 7, "rounds"), largest=(int, 896, "largest image that is timed"))
    _print_costs()
    rows: list[list[object]] = []
    for size in (224, 448, 896):
        if size <= options.largest and not (options.quick and size > 224):
            rows += _time_size(size, rounds=2 if options.quick else options.rounds)
    header = ["pixels", "threads", "model", "ms", "over plain", "over its eager"]
    publish("latency, batch 1, medians of interleaved rounds", header, rows, options.json)


def _print_costs() -> None:
    rows: list[list[object]] = []
    for size in (224, 448, 896, 1792):
        assembly = assemble(Order(recipe=load_recipe("lookupvit"), preset="s16", budgets=_GRIDS, image_size=size))
        assert assembly.plain is not None
        plain = count_module_flops(assembly.plain)
        count = sum(p.numel() for p in assembly.plain.parameters())
        rows.append([size, (size // 16) ** 2, "plain ViT-S/16", f"{plain / 1e9:.2f}", "1.00", f"{count / 1e6:.1f}"])
        for model in assembly.models:
            flops = count_module_flops(model)
            count = sum(p.numel() for p in model.parameters())
            kept = model.compressor.budget.tokens_out
            rows.append(
                [
                    size,
                    (size // 16) ** 2,
                    f"lookupvit s16, M={kept}",
                    f"{flops / 1e9:.2f}",
                    f"{flops / plain:.2f}",
                    f"{count / 1e6:.1f}",
                ]
            )
    publish("cost", ["pixels", "N", "model", "GFLOP", "over plain", "M parameters"], rows, None)


def _time_size(size: int, *, rounds: int) -> list[list[object]]:
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as folder:
        lookup = Path(folder) / "lookup"
        api.export("lookupvit", budget=_GRIDS, image_size=size, with_plain=True, out=lookup)
        bundle = open_bundle(lookup)
        graphs = {"plain ViT-S/16": lookup / "plain.onnx"}
        graphs |= {f"lookupvit s16, M={b.budget.tokens_out}": lookup / b.model for b in bundle.manifest.buckets}
        if size == 224:
            resampler = Path(folder) / "resampler"
            api.export("perceiver", backbone="vit_small_patch16_224", out=resampler)
            graphs["perceiver M=64 after ViT-S"] = resampler / open_bundle(resampler).manifest.buckets[0].model
        image = np.random.default_rng(0).standard_normal((1, 3, size, size), dtype=np.float32)
        eager = _eager_modules() if size == 224 else {}
        for threads in (1, 2):
            torch.set_num_threads(threads)
            loaded = {name: open_runner("onnxruntime", path, threads=threads) for name, path in graphs.items()}
            runs: dict[str, Callable[[], object]] = {
                name: (lambda runner=runner: runner.infer({"image": image})) for name, runner in loaded.items()
            }
            tensor = torch.from_numpy(image)
            for name, module in eager.items():
                runs[f"eager {name}"] = partial(_forward, module, tensor)
            samples = interleave(runs, rounds=rounds)
            for name in graphs:
                median = statistics.median(samples[name])
                over_eager = f"{ratio(samples, name, f'eager {name}'):.2f}" if f"eager {name}" in samples else ""
                rows.append(
                    [size, threads, name, f"{median:.1f}", f"{ratio(samples, name, 'plain ViT-S/16'):.2f}", over_eager]
                )
            for name in eager:
                rows.append(
                    [size, threads, f"eager {name}", f"{statistics.median(samples[f'eager {name}']):.1f}", "", ""]
                )
    return rows


def _eager_modules() -> dict[str, Any]:
    lookup = assemble(Order(recipe=load_recipe("lookupvit"), preset="s16", budgets=_GRIDS))
    resampler = assemble(Order(recipe=load_recipe("perceiver"), backbone="vit_small_patch16_224"))
    assert lookup.plain is not None
    modules: dict[str, Any] = {"plain ViT-S/16": lookup.plain}
    modules |= {f"lookupvit s16, M={m.compressor.budget.tokens_out}": m for m in lookup.models}
    modules["perceiver M=64 after ViT-S"] = resampler.models[0]
    return modules


def _forward(module: Any, image: torch.Tensor) -> None:
    with torch.inference_mode():
        module(image)


if __name__ == "__main__":
    main()
