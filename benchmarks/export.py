"""Wall time of `edgecomp export` over a bare `torch.onnx.export` of the same module, both as fresh processes.

    python benchmarks/export.py [--rounds 5] [--json FILE]

lookupvit at ViT-S size, one bucket. The bare process builds the same module and saves the file; edgecomp also
computes goldens, holds the static form to the original, checks every node, runs ONNX Runtime and hashes all.
Reach 1.5, aim 1.2.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import parse, publish

_BARE = """
import sys, torch
from edgecomp.compressors.lookupvit import LookupViT
from edgecomp.specs import load_recipe
module = LookupViT.from_recipe(load_recipe("lookupvit"), 25).eval()
program = torch.onnx.export(module, (torch.zeros(1, 3, 224, 224),), dynamo=True, opset_version=20, verbose=False)
program.save(sys.argv[1], external_data=True)
"""


def main() -> None:
    """Measure and print."""
    options = parse(__doc__ or "", rounds=(int, 5, "rounds"))
    times: dict[str, list[float]] = {"bare": [], "edgecomp": []}
    for _ in range(1 if options.quick else options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            times["bare"].append(_time([sys.executable, "-c", _BARE, str(Path(folder) / "bare.onnx")]))
            words = ["-m", "edgecomp", "export", "--method", "lookupvit", "--budget", "25", "--out", f"{folder}/bundle"]
            times["edgecomp"].append(_time([sys.executable, *words]))
    ratios = [ours / bare for ours, bare in zip(times["edgecomp"], times["bare"], strict=True)]
    rows: list[list[object]] = [
        [name, f"{statistics.median(seconds):.1f}", f"{min(seconds):.1f}", f"{max(seconds):.1f}"]
        for name, seconds in times.items()
    ]
    rows.append(["ratio", f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f}", f"{max(ratios):.2f}"])
    publish("export of lookupvit s16, one bucket: seconds", ["process", "median", "min", "max"], rows, options.json)


def _time(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
