"""What `edgecomp.load`'s object itself costs a request, measured around a runner that does nothing.

    python benchmarks/serving.py [--rounds 9] [--json FILE]

Checks of the input, choice of a bucket, look-up of its graph, counting. Each request asks for another bucket than the
one before. The image is given as pixels, so that no decoding is timed.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import interleave, parse, publish

import edgecomp
from edgecomp import api
from edgecomp.serving import model as serving

_BUDGETS = (49, 98, 147)


class _Nothing:
    name = version = "nothing"

    def infer(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return what was given."""
        return inputs


def main() -> None:
    """Measure and print."""
    options = parse(__doc__ or "", rounds=(int, 9, "rounds"))
    image = np.random.default_rng(0).standard_normal((3, 224, 224), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        api.export("fastervlm", budget=_BUDGETS, out=Path(folder) / "bundle")
        serving.open_runner = lambda *words, **more: _Nothing()  # type: ignore[assignment, return-value]
        loaded = edgecomp.load(Path(folder) / "bundle")
        budgets = iter(_BUDGETS * 1_000_000)
        named = {"image": image[None]}
        runs = {
            "pixels": lambda: loaded(image, budget=next(budgets)),
            "inputs by name": lambda: loaded(named, budget=next(budgets)),
        }
        samples = interleave(runs, rounds=2 if options.quick else options.rounds, repeats=200)
    rows: list[list[object]] = [[name, f"{statistics.median(times) * 1e3:.0f}"] for name, times in samples.items()]
    publish("the object's own cost, 224 pixels, three buckets in turn", ["request", "us"], rows, options.json)


if __name__ == "__main__":
    main()
