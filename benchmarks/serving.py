"""What `edgecomp.load`'s object itself costs a request, measured around a runner that does nothing.

    python benchmarks/serving.py [--rounds 9] [--json FILE]

Checks of the input, choice of a bucket, look-up of its graph, counting; routed: the words, what the router is handed
and what it says as well. Each request asks for another bucket than the
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
    """A runner that answers at once: of a stem tokens, of a router a bucket."""

    version = "nothing"

    def __init__(self, name: str, model: Path, **more: object) -> None:  # noqa: ARG002 - as `open_runner` has it
        self.name = name
        self.input_names = ("image", "words", "thresholds") if model.name.startswith("router") else ("image",)
        one = np.zeros((1, 1), np.float32)
        self._outputs: dict[str, Any] = {"tokens": one, "class_query": one, "keys": one}
        self._outputs |= {"bucket": np.ones(1, np.int64), "need": one.repeat(2, 1), "signals": one.repeat(6, 1)}

    def infer(self, inputs: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002 - nothing is done with them
        """Return what never changes."""
        return self._outputs


def main() -> None:
    """Measure and print."""
    options = parse(__doc__ or "", rounds=(int, 9, "rounds"))
    image = np.random.default_rng(0).standard_normal((3, 224, 224), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        api.export("fastervlm", budget=_BUDGETS, router="difficulty", out=Path(folder) / "bundle")
        serving.open_runner = _Nothing  # type: ignore[assignment, return-value]
        loaded = edgecomp.load(Path(folder) / "bundle")
        budgets = iter(_BUDGETS * 1_000_000)
        named = {"image": image[None]}
        runs = {
            "pixels": lambda: loaded(image, budget=next(budgets)),
            "inputs by name": lambda: loaded(named, budget=next(budgets)),
            "pixels, routed": lambda: loaded(image, "How many birds are not on the wire?"),
        }
        samples = interleave(runs, rounds=2 if options.quick else options.rounds, repeats=200)
    rows: list[list[object]] = [[name, f"{statistics.median(times) * 1e3:.0f}"] for name, times in samples.items()]
    publish("the object's own cost, 224 pixels, three buckets in turn", ["request", "us"], rows, options.json)


if __name__ == "__main__":
    main()
