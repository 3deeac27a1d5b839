"""What several buckets cost over one: export, size, memory; the seam behind the stem; routers; selection itself.

    python benchmarks/buckets.py [--rounds 7] [--part export,memory,seam,router,selection] [--json FILE]

ViT-S at 224 pixels, batch 1. Export and memory in fresh processes; times interleaved in one.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import interleave, parse, publish, ratio

from edgecomp import api
from edgecomp.bundle import Bundle, open_bundle
from edgecomp.runners import Runner, open_runner
from edgecomp.runners.chain import open_graph
from edgecomp.serving.memory import MemoryUse, measure_memory
from edgecomp.specs.manifest import Graph
from edgecomp.words import read_words

_HOST = "vit_small_patch16_224"
_FOUR = (49, 74, 98, 147)
_METHODS = ("attention-pruning", "evit", "tocom", "visionzip")


def main() -> None:
    """Measure and print."""
    parts = {"export": _export, "memory": _memory, "seam": _seam, "router": _router, "selection": _selection}
    options = parse(__doc__ or "", rounds=(int, 7, "rounds"), part=(str, ",".join(parts), "which, with commas"))
    for name in options.part.split(","):
        with tempfile.TemporaryDirectory() as folder:
            title, header, rows = parts[name](Path(folder), options)
        path = options.json
        publish(title, header, rows, path.with_name(f"{path.stem}-{name}.json") if path is not None else None)


Table = tuple[str, list[str], list[list[object]]]


def _export(folder: Path, options: argparse.Namespace) -> Table:
    rows: list[list[object]] = []
    for method in _METHODS:
        seconds: dict[str, list[float]] = {"one": [], "four": [], "four, whole graphs": []}
        sizes: dict[str, Bundle] = {}
        for turn in range(1 if options.quick else 3):
            for name, taken in seconds.items():
                out = folder / f"{method}-{name}-{turn}"
                budgets = [
                    word for count in (_FOUR if name != "one" else _FOUR[-1:]) for word in ("--budget", str(count))
                ]
                whole = ["--no-stem"] if "whole" in name else []
                words = ["export", "--method", method, "--backbone", _HOST, *budgets, *whole, "--out", str(out)]
                started = time.perf_counter()
                subprocess.run([sys.executable, "-m", "edgecomp", *words], check=True, capture_output=True)
                taken.append(time.perf_counter() - started)
                sizes[name] = open_bundle(out, verify=False)
        base = _bytes(sizes["one"])
        for name, times in seconds.items():
            over = statistics.median(a / b for a, b in zip(times, seconds["one"], strict=True))
            own = max(bucket.own_bytes for bucket in sizes[name].manifest.buckets) if name != "one" else 0
            size = _bytes(sizes[name])
            rows.append(
                [
                    method, name, f"{statistics.median(times):.1f}", f"{over:.2f}", f"{size / 2**20:.1f}",
                    f"{size / base:.3f}", f"{own / 2**20:.2f}",
                ]
            )  # fmt: skip
    return (
        "export and size of four buckets over one",
        ["method", "buckets", "seconds", "over one", "MiB", "over one ", "most own weights of a bucket, MiB"],
        rows,
    )


def _bytes(bundle: Bundle) -> int:
    return sum(entry.size for entry in bundle.manifest.files)


def _memory(folder: Path, options: argparse.Namespace) -> Table:
    rows: list[list[object]] = []
    request = {"image": np.zeros((1, 3, 224, 224), np.float32)}
    for method in ("attention-pruning", "evit"):
        for stem in (True, False):
            out = folder / f"{method}-{stem}"
            api.export(method, backbone=_HOST, budget=_FOUR, stem=stem, out=out)
            one, four = (_measured(out, buckets, request, share=False) for buckets in (_FOUR[-1:], _FOUR))
            shared = _measured(out, _FOUR, request, share=True)
            words: list[object] = [method, "stem" if stem else "whole graphs"]
            for attribute in ("held_mib", "peak_mib"):
                base, *others = (getattr(use, attribute) for use in (one, four, shared))
                words += [f"{base:.0f}", *(f"{value:.0f} ({value / base:.2f})" for value in others)]
            bundle = open_bundle(out)
            image = {"image": np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)}
            model = bundle.path / bundle.manifest.buckets[0].model
            for threads in (1, 2) if not stem else ():
                runs = {
                    str(share): _run(open_runner("onnxruntime", model, threads=threads, share_weights=share), image)
                    for share in (False, True)
                }
                words.append(f"{ratio(interleave(runs, rounds=options.rounds), 'True', 'False'):.2f}")
            rows.append(words if not stem else [*words, "", ""])
    header = ["method", "graphs", "one: MiB held", "four", "four sharing", "one: peak", "four ", "four sharing ",
              "time sharing, 1 thread", "2 threads"]  # fmt: skip
    return "memory of a process that serves four buckets (weights 83 MiB)", header, rows


def _measured(bundle: Path, buckets: Sequence[int], request: dict[str, Any], *, share: bool) -> MemoryUse:
    use = measure_memory(bundle, buckets, request, runner="onnxruntime", threads=1, share_weights=share)
    assert use is not None, "Linux says what a process holds"
    return use


def _seam(folder: Path, options: argparse.Namespace) -> Table:
    rows: list[list[object]] = []
    for method in ("attention-pruning", "evit"):
        bundles = {}
        for name in ("stem", "whole"):
            api.export(method, backbone=_HOST, budget=_FOUR[:2], stem=name == "stem", out=folder / f"{method}-{name}")
            bundles[name] = open_bundle(folder / f"{method}-{name}")
        image = {"image": np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)}
        for threads in (1, 2):
            runs: dict[str, Any] = {}
            for name, bundle in bundles.items():
                runner = open_graph("onnxruntime", bundle, bundle.manifest.buckets[0], threads=threads)
                runs[name] = _run(runner, image)
            samples = interleave(runs, rounds=2 if options.quick else options.rounds)
            rows.append([method, threads, *(f"{statistics.median(samples[name]):.2f}" for name in runs),
                         f"{ratio(samples, 'stem', 'whole'):.3f}"])  # fmt: skip
    header = ["method", "threads", "stem and rest, ms", "whole graph, ms", "ratio"]
    return "the seam: stem and bucket in a row over the whole graph", header, rows


def _router(folder: Path, options: argparse.Namespace) -> Table:
    rows: list[list[object]] = []
    for router in ("difficulty", "detail", "complexity", "coverage", "policy"):
        api.export("attention-pruning", backbone=_HOST, budget=_FOUR, router=router, out=folder / router)
        bundle = open_bundle(folder / router)
        record = bundle.manifest.router
        assert record is not None
        graph = record.graphs[0]
        image = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
        seen = {"image": image, "words": read_words("how many are there?")}
        seen["thresholds"] = np.asarray([record.thresholds], np.float32)
        for threads in (1, 2):
            stem = open_runner("onnxruntime", bundle.path / bundle.manifest.stem[0].model, threads=threads)
            seen |= stem.infer({"image": image})
            alone = open_runner("onnxruntime", bundle.path / graph.model, threads=threads)
            rest = open_graph("onnxruntime", bundle, bundle.manifest.buckets[0], threads=threads)
            runs = {"router": _run(alone, seen), "bucket": _run(rest, seen)}
            samples = interleave(runs, rounds=2 if options.quick else options.rounds)
            rows.append([router, threads, *(f"{statistics.median(samples[name]):.3f}" for name in runs),
                         f"{100 * ratio(samples, 'router', 'bucket'):.2f}"])  # fmt: skip
    header = ["router", "threads", "router, ms", "stem and smallest bucket, ms", "share, %"]
    return "routers over stem and smallest bucket (reach: below 3 %)", header, rows


def _selection(folder: Path, options: argparse.Namespace) -> Table:
    rows: list[list[object]] = []
    for method in ("attention-pruning", "fastervlm", "visionzip", "vispruner", "prumerge", "query-aware"):
        api.export(method, backbone=_HOST, budget=_FOUR[1:3], out=folder / method)
        bundle = open_bundle(folder / method)
        goldens = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in bundle.manifest.buckets[0].inputs}
        generator = np.random.default_rng(0)
        seen: dict[str, Any] = {
            name: generator.standard_normal(array.shape, dtype=np.float32) if array.dtype == np.float32 else array + 1
            for name, array in goldens.items()
        }
        for threads in (1, 2):
            front: Graph = bundle.manifest.stem[0]
            stem = open_runner("onnxruntime", bundle.path / front.model, threads=threads)
            seen |= stem.infer({"image": seen["image"]})
            rest = open_runner("onnxruntime", bundle.path / bundle.manifest.buckets[-1].model, threads=threads)
            runs = {"selection": _run(rest, seen), "stem": _run(stem, seen)}
            samples = interleave(runs, rounds=2 if options.quick else options.rounds, repeats=2)
            rows.append([method, threads, *(f"{statistics.median(samples[name]):.3f}" for name in runs),
                         f"{100 * ratio(samples, 'selection', 'stem'):.2f}"])  # fmt: skip
    header = ["method", "threads", "selection, ms", "encoder, ms", "share, %"]
    return "scores, top-k and gather of 98 tokens over the encoder (reach: below 5 %)", header, rows


def _run(runner: Runner, seen: dict[str, Any]) -> Any:
    return lambda: runner.infer({name: seen[name] for name in runner.input_names})


if __name__ == "__main__":
    main()
