"""Methods at the size of their published models: export, parity, engines of TensorRT for RTX, and an estimate.

    python benchmarks/published.py [--method fastvlm,q-former] [--preset hd] [--precision fp16] [--json FILE]

Every preset of the learned compressors but those for tests, each with random weights and the budgets, batches and host
of its recipe; fastvlm's `hd` at each of its image sizes. Every step is a process of its own; a bundle is deleted before
the next is made. Rows that FILE has already are replaced, or kept where this run does not make them.

Seconds, those of the processor and peak memory are of `edgecomp export`, which holds the static form to the original
and the graphs, in ONNX Runtime, to the goldens: "max rel" is the worst error over the largest value expected. Engines
are those of all graphs of a bundle together. The estimate is of one request of the smallest batch, at the largest
budget.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common import parse, publish, run_apart

from edgecomp.specs import Recipe, load_recipe

METHODS = (
    "c-abstractor", "d-abstractor", "resampler-2d", "llava-uhd", "slice-wise", "deepseek-ocr", "fastvlm",
    "learned-merger", "dual-path", "query-decoder", "vist", "spatial-frequency-protect", "slow-fast", "multi-scale",
    "pixel-shuffle", "tokenpacker", "matryoshka", "q-former",
)  # fmt: skip
SIZES = {("fastvlm", "hd"): (256, 512, 768, 1024)}  # where one preset is published at several
TARGETS = {"SM86": "a10", "SM120": "rtx-5090"}
ESTIMATED = ("orin-nano-super", "a10")
KEY = ("method", "preset", "precision")
HEADER = [
    *KEY, "tokens", "batches", "GFLOP", "export s", "of the processor", "peak MiB", "bundle MiB", "max rel", "allowed",
    *(f"{sm} {what}" for sm in TARGETS for what in ("MiB", "s")), *(f"{name} ms" for name in ESTIMATED), "failure",
]  # fmt: skip


def main() -> None:
    """Export, build, estimate and print."""
    options = parse(
        __doc__ or "",
        method=(str, ",".join(METHODS), "which, with commas"),
        preset=(str, "", "which, with commas; all if left out"),
        precision=(str, "fp16", "of the export"),
    )
    rows = _known(options.json)
    for method in options.method.split(","):
        recipe = load_recipe(method)
        for preset, pixels in _cases(recipe, options):
            words = ["--method", method, "--preset", preset, "--precision", options.precision]
            words += ["--image-size", str(pixels)] if pixels else []
            key = (method, f"{preset}, {pixels} px" if pixels else preset, options.precision)
            row = {**dict.fromkeys(HEADER, ""), **dict(zip(KEY, key, strict=True)), **_measure(words)}
            rows[key] = row
            print(*row.values(), sep=" | ", flush=True)
    places = {method: place for place, method in enumerate(METHODS)}
    ordered = sorted(rows.values(), key=lambda row: places[row["method"]])
    table = [[row[name] for name in HEADER] for row in ordered]
    publish("methods at the size of their published models", HEADER, table, options.json)


def _known(path: Path | None) -> dict[tuple[str, ...], dict[str, Any]]:
    """Return the rows that the file has, by method, preset and precision."""
    if path is None or not path.is_file():
        return {}
    rows = json.loads(path.read_text())["rows"]
    return {tuple(row[name] for name in KEY): row for row in rows}


def _cases(recipe: Recipe, options: Namespace) -> Iterator[tuple[str, int]]:
    """Yield presets with their image sizes; 0: the recipe's own."""
    for name in recipe.presets:
        asked = name in options.preset.split(",") if options.preset else name.startswith("smoke") == options.quick
        if asked:
            for pixels in SIZES.get((recipe.method, name), (0,)):
                yield name, pixels


def _measure(words: list[str]) -> dict[str, object]:
    """Return what could be measured, and the first failure."""
    row: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        bundle = str(Path(folder) / "bundle")
        try:
            done = run_apart(_command("export", *words, "--out", bundle))
            row["export s"], row["of the processor"] = f"{done.seconds:.1f}", f"{done.processor_s:.1f}"
            row["peak MiB"] = f"{done.peak_mib:.0f}"
            row.update(_exported(json.loads(done.printed)))
            for sm, target in TARGETS.items():
                asked = _command("build", bundle, "--target", target, "--runtime", "rtx", "--plugin", "off")
                records = [engine["record"] for engine in json.loads(run_apart(asked).printed)["engines"]]
                row[f"{sm} MiB"] = f"{sum(record['size_bytes'] for record in records) / 2**20:.0f}"
                row[f"{sm} s"] = f"{sum(record['seconds'] for record in records):.1f}"
            for target in ESTIMATED:
                asked = _command("estimate", bundle, "--target", target)
                times = [graph["estimate"]["mid_us"] for graph in json.loads(run_apart(asked).printed)["graphs"]]
                row[f"{target} ms"] = f"{max(times) / 1e3:.2f}"
        except subprocess.CalledProcessError as error:
            lines = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
            said = next((line for line in lines if line.startswith("error:")), lines[-1])
            row["failure"] = f"{error.cmd[3]}: {said}"
    return row


def _command(verb: str, *words: str) -> list[str]:
    return [sys.executable, "-m", "edgecomp", verb, *words, "--json"]


def _exported(report: Mapping[str, Any]) -> dict[str, object]:
    """Return what the report of an export says of tokens, sizes and parity."""
    manifest, parity = report["manifest"], report["parity"]
    buckets = manifest["buckets"]
    free = [row for row in parity["outputs"] if not row["failures"]]
    forced = [row for part in parity["selection"] for row in part["forced"]]  # where rounding decides a choice
    worst = max(row["difference"]["max_rel"] for row in (*free, *forced))
    kept = ", ".join(str(count) for count in dict.fromkeys(bucket["budget"]["tokens_out"] for bucket in buckets))
    return {
        "tokens": f"{max(bucket['budget']['tokens_in'] for bucket in buckets)} to {kept}",
        "batches": ", ".join(str(batch) for batch in dict.fromkeys(bucket["batch"] for bucket in buckets)),
        "GFLOP": f"{max(bucket['flops'] / bucket['batch'] for bucket in buckets) / 1e9:.2f}",
        "bundle MiB": f"{sum(file['size'] for file in manifest['files']) / 2**20:.0f}",
        "max rel": f"{worst:.1e}{', choices forced' if len(free) < len(parity['outputs']) else ''}",
        "allowed": f"{parity['tolerance']['max_rel']:.1e}",
    }


if __name__ == "__main__":
    main()
