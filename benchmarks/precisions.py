"""Each precision of four methods: bytes, error against the original, and what TensorRT for RTX makes of it.

    python benchmarks/precisions.py [--method tome,lookupvit] [--precision fp16,int8] [--json FILE]

Errors are the largest over the largest value expected, of both goldens, in ONNX Runtime (bf16 and fp8 by twins); where
rounding decides a choice of tokens, of the values with the original's choices forced. Engines are built for SM86 and
SM120; a share is of the weights of all matrix products. Hosts are ViT-S/16 with random weights.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import parse, publish

from edgecomp import api
from edgecomp.bundle import WEIGHTS, open_bundle
from edgecomp.errors import EdgecompError
from edgecomp.report.text import size
from edgecomp.specs.precision import PRECISIONS

HOST = "vit_small_patch16_224"
METHODS: dict[str, dict[str, Any]] = {
    "lookupvit": {},
    "perceiver": {"backbone": HOST, "budget": [64]},
    "tome": {"backbone": HOST, "params": {"r": 13}},
    "attention-pruning": {"backbone": HOST, "budget": [98]},
}
TARGETS = {"a10": "SM86", "rtx-5090": "SM120"}


def main() -> None:
    """Export, build and print."""
    options = parse(
        __doc__ or "",
        method=(str, ",".join(METHODS), "which, with commas"),
        precision=(str, ",".join(PRECISIONS), "which, with commas"),
    )
    rows: list[list[object]] = []
    for method in options.method.split(","):
        for precision in options.precision.split(","):
            words = METHODS[method] | ({"preset": "smoke", "backbone": ""} if options.quick else {})
            rows.append([method, precision, *_row(method, precision, words)])
            print(*rows[-1], flush=True)
    header = ["method", "precision", "weights", "max rel", "least cosine", "outputs, forced", *TARGETS.values()]
    publish("bytes, parity and proof of each precision", header, rows, options.json)


def _row(method: str, precision: str, words: dict[str, Any]) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        report = api.export(method, precision=precision, out=Path(folder) / "bundle", **words)
        assert report.parity is not None
        worst, ties = report.parity.worst.difference, len(report.parity.ties)
        least = min(row.difference.cosine_min for row in report.parity.judged)
        weights = open_bundle(report.bundle).file(WEIGHTS).size
        judged = f"{len(report.parity.outputs)}, {ties}" + (" (emulated)" if report.parity.emulated else "")
        built = [_built(report.bundle, target) for target in TARGETS]
    return [size(weights), f"{worst.max_rel:.1e}", f"{least:.6f}", judged, *built]


def _built(bundle: Path, target: str) -> str:
    """Return what share of the weights runs in which type, or the refusal."""
    try:
        engines = api.build(bundle, target=target, runtime="rtx", plugin="off").engines
    except EdgecompError as error:
        return str(error).partition(";")[0]
    proofs = [engine.record.proof for engine in engines if engine.record.proof is not None]
    counts: dict[str, int] = {}
    for proof in proofs:
        for dtype, count in proof.weights.items():
            counts[dtype] = counts.get(dtype, 0) + count
    total = sum(counts.values()) or 1
    shares = ", ".join(f"{dtype} {100 * count / total:.1f} %" for dtype, count in counts.items() if count)
    megabytes = sum(engine.record.size_bytes for engine in engines) / 2**20
    return f"{shares or 'no weights'}; {megabytes:.0f} MiB"


if __name__ == "__main__":
    main()
