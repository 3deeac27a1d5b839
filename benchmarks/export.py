"""Wall time of `edgecomp export` over a bare `torch.onnx.export` of the same module, both as fresh processes.

    python benchmarks/export.py [--method lookupvit] [--preset s16] [--image-size 224] [--budget 25] [--rounds 5]
                                [--parts 1] [--json FILE]

One bucket in fp32. The bare process builds the same module and saves the file; edgecomp also computes goldens, holds
the static form to the original, checks every node, runs ONNX Runtime and hashes all. Reach 1.5, aim 1.2. With
--parts 1 the seconds of each of edgecomp's steps are shown, as its progress lines name them.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from argparse import Namespace

from common import Apart, parse, publish, run_apart

_BARE = """
import sys, torch
from edgecomp.backbones.assemble import assemble
from edgecomp.specs import load_recipe
from edgecomp.specs.order import Order
method, preset, pixels, budget, out = sys.argv[1:]
order = Order(recipe=load_recipe(method), preset=preset, image_size=int(pixels), budgets=(budget,) if budget else ())
module = assemble(order).models[0]
inputs = tuple(torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in module.input_specs(1))
with torch.no_grad():
    program = torch.onnx.export(module, inputs, dynamo=True, opset_version=20, verbose=False)
program.save(out, external_data=True)
"""
_PARTS = """
import sys, time
started = time.perf_counter()
from edgecomp import api
seen = [("starting", started)]
method, preset, pixels, budget, out = sys.argv[1:]
words = {"budget": budget} if budget else {}
api.export(method, preset=preset, image_size=int(pixels), batch=1, out=out, **words,
           progress=lambda line: seen.append((line, time.perf_counter())))
seen.append(("", time.perf_counter()))
for (line, since), (_, until) in zip(seen, seen[1:]):
    print(f"{until - since:.2f}", line, sep="\\t")
"""


def main() -> None:
    """Measure and print."""
    options = parse(
        __doc__ or "",
        method=(str, "lookupvit", "which"),
        preset=(str, "", "its size; the recipe's own if left out"),
        image_size=(int, 0, "pixels; 0: the preset's"),
        budget=(str, "", "tokens kept; the recipe's own if left out, 25 of lookupvit"),
        rounds=(int, 5, "rounds"),
        parts=(int, 0, "1: the seconds of each step of one export"),
    )
    options.budget = options.budget or ("25" if options.method == "lookupvit" else "")
    words = [options.method, options.preset, str(options.image_size), options.budget]
    name = " ".join(word for word in words if word not in ("", "0"))
    if options.parts:
        with tempfile.TemporaryDirectory() as folder:
            printed = run_apart([sys.executable, "-c", _PARTS, *words, f"{folder}/bundle"]).printed
        rows: list[list[object]] = [list(line.split("\t")) for line in printed.splitlines()]
        publish(f"export of {name}, its steps", ["seconds", "step"], rows, options.json)
        return
    rows = _compare(options, words)
    header = ["process", "median", "min", "max", "of the processor", "peak MiB"]
    publish(f"export of {name}, one bucket: seconds", header, rows, options.json)


def _compare(options: Namespace, words: list[str]) -> list[list[object]]:
    runs: dict[str, list[Apart]] = {"bare": [], "edgecomp": []}
    asked = ["--method", options.method, "--batch", "1"]
    given = [(name, getattr(options, name)) for name in ("preset", "budget", "image_size")]
    asked += [word for name, value in given if value for word in (f"--{name.replace('_', '-')}", str(value))]
    for _ in range(1 if options.quick else options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            runs["bare"].append(run_apart([sys.executable, "-c", _BARE, *words, f"{folder}/bare.onnx"]))
            command = [sys.executable, "-m", "edgecomp", "export", *asked, "--out", f"{folder}/bundle"]
            runs["edgecomp"].append(run_apart(command))
    rows: list[list[object]] = []
    for name, done in runs.items():
        processor, peak = statistics.median(one.processor_s for one in done), max(one.peak_mib for one in done)
        rows.append([name, *_spread([one.seconds for one in done], 1), f"{processor:.1f}", f"{peak:.0f}"])
    pairs = list(zip(runs["edgecomp"], runs["bare"], strict=True))
    walls = [ours.seconds / bare.seconds for ours, bare in pairs]
    processor = statistics.median(ours.processor_s / bare.processor_s for ours, bare in pairs)
    rows.append(["ratio", *_spread(walls, 2), f"{processor:.2f}", ""])
    return rows


def _spread(values: list[float], digits: int) -> list[str]:
    return [f"{choose(values):.{digits}f}" for choose in (statistics.median, min, max)]


if __name__ == "__main__":
    main()
