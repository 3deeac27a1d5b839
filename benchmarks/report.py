"""Wall time of `edgecomp report` of 20 results, as a fresh process for each form.

    python benchmarks/report.py [--rounds 5] [--samples 2000] [--json FILE]

20 results of five methods on one host: each holds the plain model and three buckets with so many samples, layers of
twelve blocks, stages and memory. They are made up from a seed; how long a report takes does not depend on the times in
it. Reach: the HTML page in 5 seconds, start-up and matplotlib's import included.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
from common import parse, publish

from edgecomp.profiles.latency import LatencyProfile, Stage, percentiles_of
from edgecomp.profiles.machine import read_machine
from edgecomp.profiles.result import LayerTime, MemoryUse, Result, Subject, write_result

_METHODS = ("tome", "evit", "dynamicvit", "attention-pruning", "pitome")
_SHARES = {"plain.onnx": 1.0, "model.m147.b1.onnx": 0.85, "model.m98.b1.onnx": 0.66, "model.m49.b1.onnx": 0.48}


def main() -> None:
    """Measure and print."""
    options = parse(__doc__ or "", rounds=(int, 5, "rounds"), samples=(int, 2000, "timed runs of each graph"))
    rounds, samples = (1, 200) if options.quick else (options.rounds, options.samples)
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        for place in range(20):
            write_result(_result(place, samples), results / f"{place:02d}.json")
        forms = {
            "text": [],
            "Markdown": ["--markdown", f"{folder}/report.md"],
            "CSV": ["--csv", f"{folder}/report.csv"],
            "HTML": ["--html", f"{folder}/report.html"],
        }
        rows: list[list[object]] = []
        taken: dict[str, list[float]] = {name: [] for name in forms}
        for turn in range(1 + rounds):
            for name, words in forms.items():
                started = time.perf_counter()
                command = [sys.executable, "-m", "edgecomp", "report", str(results), *words]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                if turn:  # the first round fills the system's cache of files
                    taken[name].append(time.perf_counter() - started)
        page = Path(folder) / "report.html"
        plots = page.read_text().count('role="img"')
        for name, seconds in taken.items():
            size = f"{page.stat().st_size / 1e6:.1f} MB, {plots} plots" if name == "HTML" else ""
            rows.append([name, *(f"{of(seconds):.2f}" for of in (statistics.median, min, max)), size])
    title = f"report of 20 results with {samples} samples of each of four graphs (reach: HTML in 5 s)"
    publish(title, ["form", "median s", "min", "max", "page"], rows, options.json)


def _result(place: int, samples: int) -> Result:
    """Return a result that is the same each time."""
    chance = random.Random(place)
    method = _METHODS[place % len(_METHODS)]
    profiles = tuple(_profile(model, share, samples, chance) for model, share in _SHARES.items())
    layers = tuple(
        LayerTime(one.model, f"/blocks.{b}/{op}", op, f"blocks.{b}", f"blocks.{b}", one.p50_us / 40, 1 / 36)
        for one in profiles
        for b in range(12)
        for op in ("MatMul", "Softmax", "Add")
    )
    machine = msgspec.structs.replace(read_machine(), cpu="a processor", load_average=(0.0, 0.0, 0.0))
    return Result(
        created=f"2026-11-22T12:{place:02d}:00Z",
        edgecomp="0",
        command=("edgecomp", "profile", method),
        target="cpu",
        subject=Subject(f"{method}-{place}", "0" * 64, method, "inside", "vit_small_patch16_224", "fp32", "", 224),
        machine=machine,
        profiles=profiles,
        layers=layers,
        memory=(MemoryUse((49,), False, 300.0, 350.0), MemoryUse((49, 98, 147), True, 340.0, 420.0)),
    )


def _profile(model: str, share: float, samples: int, chance: random.Random) -> LatencyProfile:
    times = [60_000 * share * (1 + abs(chance.gauss(0, 0.03))) for _ in range(samples)]
    kept = 0 if model.startswith("plain") else int(model.split(".")[1][1:])
    mean = statistics.fmean(times)
    return LatencyProfile(
        model=model,
        role="bucket" if kept else "plain",
        tokens_in=196 if kept else 0,
        tokens_out=kept,
        precision="fp32",
        runner="onnxruntime 1.31.1",
        threads=2,
        batch=1,
        samples_us=tuple(times),
        num_samples=samples,
        percentiles=percentiles_of(times),
        mean_us=mean,
        min_us=min(times),
        max_us=max(times),
        throughput_per_s=1e6 / mean,
        warmup_runs=40,
        is_steady=True,
        loop_overhead_us=0.2,
        stages=(Stage("encoder", 0.9 * mean, "by layers"), Stage("merge", 0.05 * mean, "by layers")) if kept else (),
        host_peak_mib=300.0 + kept,
    )


if __name__ == "__main__":
    main()
