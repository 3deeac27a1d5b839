"""Opening a bundle, and parity, at ViT-B size: seconds and peak memory, each in a fresh process.

python benchmarks/bundles.py [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import parse, publish

_CASES = {
    "read every byte": "pathlib.Path(f'{path}/weights.data').read_bytes()",
    "open_bundle": "from edgecomp.bundle import open_bundle; open_bundle(pathlib.Path(path))",
    "load in ONNX Runtime": (
        "import glob; from edgecomp.runners import open_runner; "
        "open_runner('onnxruntime', pathlib.Path(glob.glob(f'{path}/model*.onnx')[0]), threads=2)"
    ),
    "api.parity, 2 threads": "from edgecomp import api; assert api.parity(path, threads=2)",
}
_FRAME = """
import pathlib, resource, sys, time
path = sys.argv[1]
started = time.perf_counter()
{body}
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def main() -> None:
    """Measure and print."""
    options = parse(__doc__ or "", rounds=(int, 3, "rounds"))
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as folder:
        bundle = str(Path(folder) / "bundle")
        export = [
            sys.executable,
            "-m",
            "edgecomp",
            "export",
            "--method",
            "lookupvit",
            "--preset",
            "b16",
            "--out",
            bundle,
        ]
        subprocess.run(export, check=True, capture_output=True)
        size = (Path(bundle) / "weights.data").stat().st_size / 2**20
        for name, body in _CASES.items():
            seen = []
            for _ in range(1 if options.quick else options.rounds):
                done = subprocess.run(
                    [sys.executable, "-c", _FRAME.format(body=body), bundle], check=True, capture_output=True, text=True
                )
                seconds, mib = map(float, done.stdout.split())
                seen.append((seconds, mib))
            rows.append([name, f"{statistics.median(s for s, _ in seen):.2f}", f"{max(m for _, m in seen):.0f}"])
    publish(f"lookupvit b16, weights {size:.0f} MiB", ["what", "seconds", "peak MiB"], rows, options.json)


if __name__ == "__main__":
    main()
