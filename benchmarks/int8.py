"""int8 in ONNX Runtime: ViT-B with ToMe r = 16 over the plain fp32 ViT-B, and what each half of that gives alone.

    python benchmarks/int8.py [--rounds 9] [--host vit_base_patch16_224] [--json FILE]

224 pixels, batch 1, logits, random weights, 1 and 2 threads, all interleaved. The rest of an int8 graph is fp32, since
the CPU has no fp16 kernels. "exact" sums int8 products without loss; "saturating" is ONNX Runtime's default, which on
x86 without VNNI cuts sums of two products at 16 bits and is wrong by more than quantisation is: never use it. Beside
the time stands the cosine of the logits with those of the same model in fp32.
"""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from common import interleave, parse, publish, ratio

from edgecomp import api
from edgecomp.bundle import open_bundle
from edgecomp.export.passes.insert_qdq import insert_qdq, tensors_to_calibrate
from edgecomp.export.ranges import collect_ranges

_R = 16
_PLAIN = "plain fp32"
_CALIBRATED_WITH = 4  # random images; the benchmark looks at time


def main() -> None:
    """Measure and print."""
    options = parse(__doc__ or "", rounds=(int, 9, "rounds"), host=(str, "", "timm's name; default ViT-B, ViT-S quick"))
    host = options.host or ("vit_small_patch16_224" if options.quick else "vit_base_patch16_224")
    print(f"{host}; {_vnni()}\n")
    with tempfile.TemporaryDirectory() as folder:
        rows = _time(Path(folder), host, rounds=2 if options.quick else options.rounds)
    header = ["threads", "model", "ms", "over plain fp32", "over itself in fp32", "cosine"]
    publish(f"{host}, {_vnni()}: latency, batch 1, medians of interleaved rounds", header, rows, options.json)


def _time(folder: Path, host: str, *, rounds: int) -> list[list[object]]:
    bundle = folder / "bundle"
    words: dict[str, Any] = {"backbone": host, "params": {"r": _R}, "output": "logits", "with_plain": True}
    api.export("tome", preset="vit", out=bundle, **words)
    manifest = open_bundle(bundle).manifest
    merged = f"r={_R} fp32"
    graphs = {_PLAIN: bundle / manifest.plain[0].model, merged: bundle / manifest.buckets[0].model}
    sessions: dict[str, tuple[Path, str, bool]] = {name: (path, name, True) for name, path in graphs.items()}
    for name, path in graphs.items():
        quantised = _quantise(path, folder / name.replace(" ", "-"))
        word = name.replace("fp32", "int8")
        sessions[f"{word}, exact"] = (quantised, name, True)
        sessions[f"{word}, saturating"] = (quantised, name, False)
    image = np.random.default_rng(99).standard_normal((1, 3, 224, 224), dtype=np.float32)
    rows: list[list[object]] = []
    for threads in (1, 2):
        loaded = {label: _session(path, threads, exact=exact) for label, (path, _, exact) in sessions.items()}
        logits = {label: np.ravel(session.run(None, {"image": image})[0]) for label, session in loaded.items()}
        samples = interleave(
            {label: partial(session.run, None, {"image": image}) for label, session in loaded.items()}, rounds=rounds
        )
        for label, (_, base, _) in sessions.items():
            a, b = logits[label], logits[base]
            cosine = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
            over = f"{ratio(samples, label, _PLAIN):.2f}", f"{ratio(samples, label, base):.2f}"
            rows.append([threads, label, f"{statistics.median(samples[label]):.1f}", *over, f"{cosine:.5f}"])
    return rows


def _quantise(path: Path, out: Path) -> Path:
    model = ir.load(path)
    rng = np.random.default_rng(0)
    images = [{"image": rng.standard_normal((1, 3, 224, 224), dtype=np.float32)} for _ in range(_CALIBRATED_WITH)]
    ranges = collect_ranges(model, images, tensors=tensors_to_calibrate(model), threads=2)
    insert_qdq(model, ranges, kind="int8")
    out.mkdir()
    ir.save(model, out / "model.onnx", external_data="weights.data")
    return out / "model.onnx"


def _session(path: Path, threads: int, *, exact: bool) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.x64quantprecision", "1" if exact else "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _vnni() -> str:
    """Say whether this CPU has instructions that sum int8 products, without which int8 gains little."""
    words = Path("/proc/cpuinfo").read_text(encoding="utf-8").split() if Path("/proc/cpuinfo").exists() else []
    found = sorted({word for word in words if "vnni" in word or word in ("amx_int8", "i8mm", "asimddp")})
    return f"CPU with {', '.join(found)}" if found else "CPU without VNNI"


if __name__ == "__main__":
    main()
