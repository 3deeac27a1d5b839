"""Does pruning pay? Pruners beside merging, chance and plain pooling, at equal counts of tokens, on Fashion-MNIST.

    python examples/fashion_mnist/pruning.py --data /usr/share/datasets/fashion-mnist [--parts inside places after]

`inside`: between attention and MLP of the small vision transformer's blocks, evaluated as in `table.py`. `places`:
which patch alone the host cannot lose. `after`: behind its last block but one, by readouts fitted on the plain host's
tokens (`probe.py`). Nothing is retrained. Needs
`pip install '.[cpu]'` and the data (Debian's package dataset-fashion-mnist).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from host import load_host
from places import rank_in_draw, top1_without_each
from pooling import evaluate_pooling, nearest_grid, pooling_matrix
from probe import Readout, fit
from table import describe, interval, write_between
from torch import Tensor
from train import read

from edgecomp import api
from edgecomp.evaluation import balanced_subset, paired_drop
from edgecomp.report.evaluate import EvaluationReport
from edgecomp.runners import open_runner

_Choices = dict[str, tuple[str, dict[str, Any]]]

_INSIDE: _Choices = {
    "attention-pruning": ("attention-pruning", {}),
    "evit": ("evit", {}),
    "tome": ("tome", {}),
    "random": ("attention-pruning", {"score": "random"}),
}
_SCHEDULES: _Choices = {
    "one-shot: step": ("attention-pruning", {"schedule": "step"}),
    "one-shot: blocks=[2]": ("attention-pruning", {"blocks": [2]}),
    "constant": ("attention-pruning", {}),
    "linear": ("attention-pruning", {"schedule": "linear"}),
    "cosine": ("attention-pruning", {"schedule": "cosine"}),
}
_AFTER: _Choices = {
    "visionzip": ("visionzip", {}),
    "attention-pruning": ("attention-pruning", {}),
    "random": ("attention-pruning", {"score": "random"}),
}
_PRESET = "attention-pruning"  # its schedule is `constant`
_DEPTH, _LAYER, _RUN = 6, -2, 16  # blocks; where the tokens behind the encoder are taken; images of a run there
_BEGIN = "<!-- pruning.py writes {} from here -->"


def main() -> None:
    """Export, evaluate, print the tables, and write them where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the IDX files")
    parts = {"inside": compare_inside, "places": compare_places, "after": compare_after}
    parser.add_argument("--parts", nargs="+", default=list(parts), choices=list(parts))
    methods = list(_INSIDE | _AFTER)
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods, help="pooling is always there")
    parser.add_argument("--schedules", nargs="*", default=list(_SCHEDULES), choices=list(_SCHEDULES))
    parser.add_argument("--budget", nargs="+", type=int, default=[37, 25, 13, 5], help="patch tokens kept")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 32], help="accuracy is that of the last")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=int, default=None, help="so many images; default: all")
    parser.add_argument("--timed", type=int, default=2000, help="so many at other batch sizes, and in places")
    parser.add_argument("--draws", type=int, default=3, help="seeds of `random`, from 0")
    parser.add_argument("--epochs", type=int, default=5, help="of the readouts")
    parser.add_argument("--write", type=Path, default=None, help="put the tables between the marks of this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for part in options.parts:
        text = "\n".join(parts[part](options))
        print(text, flush=True)
        if options.write is not None:
            write_between(options.write, _BEGIN.format(part), text)


# -- inside the host ------------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """A report for each batch size, and the patch tokens left behind each block by the count at the end."""

    reports: list[EvaluationReport]
    left: dict[int, str]


def compare_inside(options: argparse.Namespace) -> list[str]:
    """Return the table of methods, what other draws of `random` give, and the table of schedules."""
    methods = {name: measure(options, name, *what) for name, what in _INSIDE.items() if name in options.methods}
    methods["pooling"] = measure_pooling(options, _DEPTH // 2 - 1)
    lines = table_of(methods)
    if "random" in methods:
        lines += ["", describe_draws(options, methods["random"].reports[-1])]
    if not options.schedules:
        return lines
    schedules = {
        name: methods[_PRESET] if name == "constant" and _PRESET in methods else measure(options, name, *what)
        for name, what in _SCHEDULES.items()
        if name in options.schedules
    }
    schedules["pooling"] = measure_pooling(options, _DEPTH // 2)
    return [*lines, "", "### At once, or a little in each block", "", *table_of(schedules)]


def table_of(found: Mapping[str, Measured]) -> list[str]:
    """Return the table of several methods."""
    reports = {name: it.reports for name, it in found.items()}
    return describe(reports, "patch tokens behind each block", lambda name, kept: found[name].left[kept])


def measure(
    options: argparse.Namespace, name: str, method: str, params: Mapping[str, Any], batches: Sequence[int] = ()
) -> Measured:
    """Export a method inside the host, and evaluate it at each batch size."""
    reports, left = [], {}
    with tempfile.TemporaryDirectory() as folder:
        print(f"exporting {name}", flush=True)
        exported = api.export(
            method,
            preset="inside" if method == "attention-pruning" else "",
            backbone=load_host(),
            budget=options.budget,
            batch=batches or options.batch,
            output="logits",
            params=params,
            with_plain=True,
            stem=False,
            out=Path(folder) / method,
        )
        for kept in options.budget:  # a note tells the tokens behind each block, the class token counted
            (note,) = (note for note in exported.manifest.notes if note.startswith(f"budget {kept}: tokens after"))
            left[kept] = ", ".join(str(int(count) - 1) for count in note.rpartition(": ")[2].split(", "))
        for batch in batches or options.batch:
            print(f"evaluating {name} at batch {batch}", flush=True)
            limit = limit_of(options, batch)
            found = api.evaluate(exported.bundle, options.data, batch=batch, threads=options.threads, limit=limit)
            reports.append(found)
    return Measured(reports, left)


def measure_pooling(options: argparse.Namespace, block: int) -> Measured:
    """Evaluate pooling in one block at each batch size, to the grids nearest to the budgets."""
    grids = sorted({nearest_grid(kept) for kept in options.budget})
    left = {
        rows * columns: ", ".join(str(rows * columns if index >= block else 49) for index in range(_DEPTH))
        for rows, columns in grids
    }
    reports = []
    for batch in options.batch:
        print(f"evaluating pooling in block {block} at batch {batch}", flush=True)
        limit, threads = limit_of(options, batch), options.threads
        found = evaluate_pooling(options.data, grids=grids, block=block, batch=batch, threads=threads, limit=limit)
        reports.append(found)
    return Measured(reports, left)


def limit_of(options: argparse.Namespace, batch: int) -> int | None:
    """Return how many images are run at a batch size: fewer where time alone is read."""
    limit: int | None = options.limit
    timed: int = options.timed
    return limit if batch == options.batch[-1] else min(timed, limit or timed)


def describe_draws(options: argparse.Namespace, first: EvaluationReport) -> str:
    """Return top-1 of every draw of `random`, in words."""
    found = [first]
    for seed in range(1, options.draws):
        params, name = {"score": "random", "seed": seed}, f"random, seed {seed}"
        found += measure(options, name, "attention-pruning", params, options.batch[-1:]).reports
    texts = []
    for kept in sorted(options.budget, reverse=True):
        rows = [next(row for row in report.evaluation.scores if report.kept[row.model] == kept) for report in found]
        texts.append(f"{kept} tokens: {', '.join(f'{100 * row.top1.value:.2f}' for row in rows)}")
    return f"`random` is one fixed draw for all images. Top-1 % of {len(found)} draws: {'; '.join(texts)}."


# -- places --------------------------------------------------------------------------------------------------------


def compare_places(options: argparse.Namespace) -> list[str]:
    """Return the grid of top-1 without each patch, and how early the draws of `random` drop the one needed most."""
    block = _DEPTH // 4  # the first in which `constant` prunes
    images, labels = read_test(options, options.timed)
    plain, without = top1_without_each(images, labels, block)
    worst = int(without.argmin())
    what = f"Top-1 % where this one patch is dropped in block {block}"
    lines = [
        f"{len(labels):,} test images, plain {100 * plain:.2f}. {what}:",
        "",
        "| |" + "|".join(f" column {column} " for column in range(7)) + "|",
        "|" + "---|" * 8,
    ]
    lines += [
        f"| row {row} | {' | '.join(f'{100 * share:.1f}' for share in shares)} |" for row, shares in enumerate(without)
    ]
    ranks = [f"seed {seed}: {rank_in_draw(worst, seed)}" for seed in range(options.draws)]
    where = f"Row {worst // 7}, column {worst % 7} costs most."
    return [*lines, "", f"{where} Its rank among 49 in the draws of `random`: {', '.join(ranks)}."]


def read_test(options: argparse.Namespace, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the test images, as many as the limit says, chosen as `api.evaluate` does."""
    images, labels = read(options.data, "test")
    count = min(most or len(labels), options.limit or len(labels))
    if count == len(labels):
        return images, labels
    chosen = torch.from_numpy(balanced_subset(labels.numpy(), count, seed=0))
    return images[chosen], labels[chosen]


# -- after the encoder ----------------------------------------------------------------------------------------------


def compare_after(options: argparse.Namespace) -> list[str]:
    """Return a table of what two readouts, fitted on all 49 tokens, make of the tokens kept."""
    print("tokens of the training images", flush=True)
    images, labels = read(options.data, "train")
    tokens = plain_tokens(images)
    print("fitting the readouts", flush=True)
    readouts = {
        "mean": fit(tokens, labels, queries=0, epochs=options.epochs),
        "attention": fit(tokens, labels, queries=4, epochs=options.epochs),
    }
    fitted = f"readouts fitted on {len(labels):,} training images in {options.epochs} epochs, seed 0"
    images, labels = read_test(options)
    plain = plain_tokens(images)
    expected = {name: predict(readout, plain) for name, readout in readouts.items()}
    heads = " | ".join(f"{name}: top-1 % | drop, points | agreement %" for name in readouts)
    right = [f"{100 * (expected[name] == labels).to(torch.float64).mean():.2f} | | |" for name in readouts]
    lines = [
        f"{len(labels):,} test images, {fitted}, tokens of feature layer {_LAYER}, nothing timed.",
        "",
        f"| method | tokens kept | {heads} |",
        "|" + "---|" * (2 + 3 * len(readouts)),
        f"| plain | {plain.shape[1]} | {' '.join(right)}",
    ]
    kinds = {name: what for name, what in _AFTER.items() if name in options.methods}
    kinds |= {
        f"random, seed {seed}": ("attention-pruning", {"score": "random", "seed": seed})
        for seed in range(1, options.draws if "random" in kinds else 1)
    }
    for name, (method, params) in kinds.items():
        for kept, found in kept_tokens(options, name, method, params, images):
            lines.append(f"| {name} | {kept} | {judge(readouts, found, expected, labels)}")
    for grid in map(nearest_grid, sorted(options.budget, reverse=True)):
        found = pooling_matrix(grid) @ plain.to(torch.float32)
        lines.append(f"| pooling | {found.shape[1]} | {judge(readouts, found, expected, labels)}")
    return lines


@torch.inference_mode()
def plain_tokens(images: Tensor) -> Tensor:
    """Return all patch tokens of the feature layer, (n, 1, 28, 28) -> (n, 49, D) in fp16."""
    host = load_host()
    layers = [
        host.get_intermediate_layers(pixels.expand(-1, 3, -1, -1), n=-_LAYER)[0].to(torch.float16)
        for pixels in images.split(256)
    ]
    return torch.cat(layers)


def kept_tokens(
    options: argparse.Namespace, name: str, method: str, params: Mapping[str, Any], images: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """Yield, for each budget, the patch tokens that a bundle's graph keeps of all images, in ONNX Runtime."""
    with tempfile.TemporaryDirectory() as folder:
        print(f"exporting {name}, after the encoder", flush=True)
        exported = api.export(
            method,
            backbone=load_host(),
            feature_layer=_LAYER,
            budget=options.budget,
            batch=_RUN,
            params=params,
            stem=False,
            out=Path(folder) / method,
        )
        for bucket in reversed(exported.manifest.buckets):
            print(f"running {name}, {bucket.budget.tokens_out} tokens", flush=True)
            found = []
            with open_runner("onnxruntime", exported.bundle / bucket.model, threads=options.threads) as runner:
                for pixels in images.expand(-1, 3, -1, -1).split(_RUN):
                    batch = np.zeros(bucket.inputs[0].shape, np.float32)
                    batch[: len(pixels)] = pixels.numpy()
                    kept = runner.infer({"image": batch})["kept"][: len(pixels)]
                    found.append(torch.from_numpy(kept[:, -bucket.budget.tokens_out :].copy()))  # no class token
            yield bucket.budget.tokens_out, torch.cat(found)


def judge(readouts: Mapping[str, Readout], tokens: Tensor, expected: Mapping[str, Tensor], labels: Tensor) -> str:
    """Return top-1, drop and agreement of each readout on the tokens kept, as cells."""
    cells = []
    for name, readout in readouts.items():
        found, before = predict(readout, tokens), expected[name]
        lost = int(((before == labels) & (found != labels)).sum())
        gained = int(((before != labels) & (found == labels)).sum())
        drop = paired_drop(lost, gained, len(labels))
        shares = [100 * (found == other).to(torch.float64).mean().item() for other in (labels, before)]
        cells.append(f"{shares[0]:.2f} | {100 * drop.value:.2f} {interval(drop, 100)} | {shares[1]:.2f} |")
    return " ".join(cells)


@torch.inference_mode()
def predict(readout: Readout, tokens: Tensor) -> Tensor:
    """Return the class of each image."""
    return torch.cat([readout(part).argmax(-1) for part in tokens.split(256)])


if __name__ == "__main__":
    main()
