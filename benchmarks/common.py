"""What the benchmarks share: where results go, the machine's description, interleaved medians."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from edgecomp.profiles.interleave import interleave as take_turns
from edgecomp.profiles.machine import read_machine
from edgecomp.report.text import table

__all__ = ["Apart", "interleave", "parse", "publish", "ratio", "run_apart", "time_inside"]


def parse(description: str, **flags: tuple[type, Any, str]) -> argparse.Namespace:
    """Read `--json FILE`, `--quick` and a benchmark's own flags."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, default=None, help="write the figures here too")
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that it works, not to quote")
    for name, (kind, default, text) in flags.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=text)
    return parser.parse_args()


class Apart(NamedTuple):
    """What a process of its own took and printed."""

    seconds: float
    processor_s: float
    peak_mib: float
    printed: str


def run_apart(command: list[str]) -> Apart:
    """Run a command as a process of its own, from its start to its end.

    Raises:
        subprocess.CalledProcessError: it failed; `stderr` is what it said.
    """
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as said:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=printed, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        said.seek(0)
        if status:
            raise subprocess.CalledProcessError(process.returncode, command, printed.read(), said.read())
        return Apart(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, printed.read())


def interleave(runs: Mapping[str, Callable[[], object]], *, rounds: int, repeats: int = 1) -> dict[str, list[float]]:
    """Time callables in turns, as `edgecomp.profiles.interleave` does; return milliseconds of each round, by name.

    Args:
        runs: callables by name.
        rounds: how many times round.
        repeats: calls in each turn; their mean is one sample.
    """
    samples = take_turns(runs, rounds=rounds, repeats=repeats).samples_us
    return {name: [us / 1000 for us in values] for name, values in samples.items()}


def ratio(samples: Mapping[str, list[float]], name: str, base: str) -> float:
    """Return the median over rounds of one time over another, pair by pair."""
    return statistics.median(a / b for a, b in zip(samples[name], samples[base], strict=True))


def publish(title: str, header: list[str], rows: list[list[object]], path: Path | None) -> None:
    """Print a table, and write it with the machine's description where a path is given."""
    print(f"{title}\n\n{table(header, rows)}\n")
    if path is not None:
        machine = msgspec.to_builtins(read_machine())
        document = {"title": title, "machine": machine, "rows": [dict(zip(header, row, strict=True)) for row in rows]}
        path.write_text(json.dumps(document, indent=1) + "\n")
        print(f"written to {path}")


def time_inside(host: str, models: Mapping[str, tuple[str, dict[str, Any]]], *, rounds: int) -> list[list[object]]:
    """Time compressors inside a host in ONNX Runtime against the plain host, and against their originals in eager.

    224 pixels, batch 1, logits, 1 and 2 threads, all interleaved.

    Args:
        host: timm's name.
        models: label -> method and its parameters.
        rounds: how many times round.

    Returns:
        rows of threads, label, ms, speed over plain, what the FLOPs alone would give, time over eager.
    """
    import numpy as np
    import torch

    from edgecomp import api
    from edgecomp.backbones.assemble import assemble
    from edgecomp.bundle import open_bundle
    from edgecomp.runners import open_runner
    from edgecomp.specs import load_recipe
    from edgecomp.specs.order import Order

    def forward(module: Any, image: torch.Tensor) -> None:
        with torch.inference_mode():
            module(image)

    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as folder:
        graphs: dict[str, Path] = {}
        ideals, eager = {"plain": 1.0}, {}
        for number, (label, (method, params)) in enumerate(models.items()):
            out = Path(folder) / str(number)
            words: dict[str, Any] = {"backbone": host, "params": params, "output": "logits"}
            preset = load_recipe(method).placements["inside"]
            api.export(method, preset=preset, with_plain=number == 0, out=out, **words)
            manifest = open_bundle(out).manifest
            if manifest.plain:
                graphs["plain"] = out / manifest.plain[0].model
            graphs[label] = out / manifest.buckets[0].model
            ideals[label] = manifest.plain_flops / manifest.buckets[0].flops
            order = Order(recipe=load_recipe(method), preset=preset, **words)
            eager[label] = assemble(order).models[0].reference().eval()
        image = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            loaded = {label: open_runner("onnxruntime", path, threads=threads) for label, path in graphs.items()}
            runs: dict[str, Callable[[], object]] = {
                label: (lambda runner=runner: runner.infer({"image": image})) for label, runner in loaded.items()
            }
            for label, module in eager.items():
                runs[f"eager {label}"] = partial(forward, module, torch.from_numpy(image))
            samples = interleave(runs, rounds=rounds)
            for label in graphs:
                over = f"{ratio(samples, label, f'eager {label}'):.2f}" if label in eager else ""
                speed, milliseconds = ratio(samples, "plain", label), statistics.median(samples[label])
                rows.append([threads, label, f"{milliseconds:.1f}", f"{speed:.2f}", f"{ideals[label]:.2f}", over])
    return rows
