"""The Perceiver resampler alone: ONNX Runtime over torch eager.

    python benchmarks/resampler.py [--rounds 15] [--json FILE]

2 layers, 64 latents, width 1024, 576 tokens, 16 heads of 64, batch 1, 1 and 2 threads, interleaved. Eager is the static
module itself; "original" is the reference written as the paper's code does it. Reach: 1.0 at 1 thread, 0.85 at 2.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import interleave, parse, publish, ratio

from edgecomp import api
from edgecomp.backbones.assemble import assemble
from edgecomp.bundle import open_bundle
from edgecomp.runners import open_runner
from edgecomp.specs import load_recipe
from edgecomp.specs.order import Order

_PARAMS = {"depth": 2, "context_dim": 1024, "tokens": 576, "num_heads": 16, "head_dim": 64}


def main() -> None:
    """Measure and print."""
    options = parse(__doc__ or "", rounds=(int, 15, "rounds"))
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bundle"
        report = api.export("perceiver", backbone="none", params=_PARAMS, out=out)
        graph = out / open_bundle(out).manifest.buckets[0].model
        module = assemble(Order(recipe=load_recipe("perceiver"), backbone="none", params=_PARAMS)).models[0]
        original = module.reference()
        tokens = np.random.default_rng(0).standard_normal((1, 576, 1024), dtype=np.float32)
        tensor = torch.from_numpy(tokens)

        def eager(model: torch.nn.Module) -> Callable[[], object]:
            def run() -> None:
                with torch.inference_mode():
                    model(tensor)

            return run

        for threads in (1, 2):
            torch.set_num_threads(threads)
            with open_runner("onnxruntime", graph, threads=threads) as runner:
                runs: dict[str, Callable[[], object]] = {
                    "ONNX Runtime": lambda runner=runner: runner.infer({"tokens": tokens}),
                    "eager": eager(module),
                    "eager original": eager(original),
                }
                samples = interleave(runs, rounds=3 if options.quick else options.rounds)
            for name in runs:
                median = statistics.median(samples[name])
                rows.append([threads, name, f"{median:.1f}", f"{ratio(samples, name, 'eager'):.2f}"])
    flops = report.manifest.buckets[0].flops
    publish(f"resampler, {flops / 1e9:.2f} GFLOP", ["threads", "what", "ms", "over eager"], rows, options.json)


if __name__ == "__main__":
    main()
