"""Wall time of `edgecomp parity` over its bare inference, and of `edgecomp check`, each as fresh processes.

    python benchmarks/verbs.py [--rounds 5] [--json FILE]

A ViT-B/16 with ToMe and its plain model, 224 pixels, batch 1, fp32, random weights, ONNX Runtime on 2 threads. The bare
process loads the same two graphs and runs the same two goldens, without reading a manifest, a hash or an expected
output. Reach: `parity` 3 times the bare process; `check` of the ViT-B 2 seconds.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import parse, publish

_HOST = "vit_base_patch16_224"
_BARE = """
import sys
from pathlib import Path
import onnxruntime as ort
from safetensors.numpy import load_file
bundle = Path(sys.argv[1])
options = ort.SessionOptions()
options.intra_op_num_threads = 2
goldens = load_file(bundle / "golden.safetensors")
images = [value for key, value in goldens.items() if key.startswith("input.")]
for path in (bundle / name for name in sys.argv[2:]):
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for image in images:
        session.run(None, {session.get_inputs()[0].name: image})
"""


def main() -> None:
    """Measure and print."""
    options = parse(__doc__ or "", rounds=(int, 5, "rounds"))
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        host = "vit_small_patch16_224" if options.quick else _HOST
        words = _words("export", "--method", "tome", "--backbone", host, "--with-plain", "--out", str(bundle))
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        models = [path.name for path in bundle.glob("*.onnx") if path.name != "stem.onnx"]
        runs = {
            "bare inference": [sys.executable, "-c", _BARE, str(bundle), *models],
            "edgecomp parity": _words("parity", str(bundle), "--threads", "2"),
            "edgecomp check": _words("check", str(bundle / "plain.onnx"), "--target", "orin-nano"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(1 + (1 if options.quick else options.rounds)):
            for name, command in runs.items():
                started = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                if turn:  # the first round fills the system's cache of files
                    seconds[name].append(time.perf_counter() - started)
    bare = seconds["bare inference"]
    rows = [
        [name, *_spread(taken), *_spread([a / b for a, b in zip(taken, bare, strict=True)])]
        for name, taken in seconds.items()
    ]
    header = ["process", "median s", "min", "max", "over bare", "min", "max"]
    publish(f"{host}: verbs as processes", header, rows, options.json)


def _words(*words: str) -> list[str]:
    return [sys.executable, "-m", "edgecomp", *words]


def _spread(values: list[float]) -> list[object]:
    return [f"{statistics.median(values):.2f}", f"{min(values):.2f}", f"{max(values):.2f}"]


if __name__ == "__main__":
    main()
