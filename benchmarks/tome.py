"""ToMe inside ViT-S and ViT-B in ONNX Runtime: over the plain model, and over the paper's form in torch eager.

    python benchmarks/tome.py [--rounds 9] [--json FILE]

224 pixels, batch 1, logits, r = 8, 13 and 16 in each block, 1 and 2 threads; plain and merged models interleaved. Speed
is plain over merged: above 1 is a gain. Beside it stands what the FLOPs alone would give.
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
from edgecomp.runners import open_runner
from edgecomp.specs import load_recipe
from edgecomp.specs.order import Order

_HOSTS = {"ViT-S": "vit_small_patch16_224", "ViT-B": "vit_base_patch16_224"}
_STEPS = (8, 13, 16)


def main() -> None:
    """Measure and print."""
    options = parse(__doc__ or "", rounds=(int, 9, "rounds"))
    rows: list[list[object]] = []
    for name, host in _HOSTS.items():
        if not (options.quick and name != "ViT-S"):
            rows += _time_host(name, host, rounds=2 if options.quick else options.rounds)
    header = ["host", "threads", "model", "ms", "speed over plain", "by FLOPs", "over eager ToMe"]
    publish("latency, batch 1, medians of interleaved rounds", header, rows, options.json)


def _time_host(name: str, host: str, *, rounds: int) -> list[list[object]]:
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as folder:
        graphs: dict[str, Path] = {}
        ideals = {"plain": 1.0}
        eager: dict[str, Any] = {}
        for r in _STEPS:
            out = Path(folder) / str(r)
            words = {"backbone": host, "params": {"r": r}, "output": "logits"}
            api.export("tome", with_plain=r == _STEPS[0], out=out, **words)  # type: ignore[arg-type]
            manifest = open_bundle(out).manifest
            if manifest.plain:
                graphs["plain"] = out / manifest.plain[0].model
            graphs[f"tome r={r}"] = out / manifest.buckets[0].model
            ideals[f"tome r={r}"] = manifest.plain_flops / manifest.buckets[0].flops
            eager[f"tome r={r}"] = assemble(Order(recipe=load_recipe("tome"), **words)).models[0].reference().eval()  # type: ignore[arg-type]
        image = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            loaded = {graph: open_runner("onnxruntime", path, threads=threads) for graph, path in graphs.items()}
            runs: dict[str, Callable[[], object]] = {
                graph: (lambda runner=runner: runner.infer({"image": image})) for graph, runner in loaded.items()
            }
            for graph, module in eager.items():
                runs[f"eager {graph}"] = partial(_forward, module, torch.from_numpy(image))
            samples = interleave(runs, rounds=rounds)
            for graph in graphs:
                speed = ratio(samples, "plain", graph)
                over = f"{ratio(samples, graph, f'eager {graph}'):.2f}" if graph in eager else ""
                rows.append(
                    [
                        name,
                        threads,
                        graph,
                        f"{statistics.median(samples[graph]):.1f}",
                        f"{speed:.2f}",
                        f"{ideals[graph]:.2f}",
                        over,
                    ]
                )
    return rows


def _forward(module: Any, image: torch.Tensor) -> None:
    with torch.inference_mode():
        module(image)


if __name__ == "__main__":
    main()
