"""`edgecomp compare --methods`: many methods on one host and one image, side by side."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from edgecomp import __version__
from edgecomp.api._compare import now, require_rounds, settle_of
from edgecomp.api._export import export
from edgecomp.api._overhead import NodeShares, node_shares
from edgecomp.api._progress import Progress, silent
from edgecomp.bundle import Bundle, golden_key, open_bundle
from edgecomp.errors import EdgecompError, InvalidSpec, UnknownName
from edgecomp.evaluation.reconstruction import Reconstruction, fill_error, read_back_error, unmerge_error
from edgecomp.images import read_image
from edgecomp.parity import read_goldens, rows_of
from edgecomp.profiles.comparison import require_out, write_comparison
from edgecomp.profiles.interleave import Interleaved, interleave
from edgecomp.profiles.machine import read_machine
from edgecomp.profiles.ratios import paired_ratio
from edgecomp.profiles.statistics import median_interval
from edgecomp.report.methods import METHODS_KIND, MethodRow, MethodsReport
from edgecomp.resources import cache_dir, photograph_path
from edgecomp.runners import Array, Runner, require_threads
from edgecomp.runners.chain import open_graph
from edgecomp.serving.memory import measure_memory
from edgecomp.serving.parts import image_pixels
from edgecomp.specs import load_recipe, method_names
from edgecomp.specs.manifest import Bucket, PlainGraph

__all__ = ["compare_methods"]

BACKBONE, BUDGET = "vit_small_patch16_224", "64"
_PLAIN = "plain"


class _Placed(NamedTuple):
    """A graph with what it is given; `layer` is the host's that it reads, counted from the end."""

    bundle: Bundle
    graph: Bucket | PlainGraph
    inputs: dict[str, Array]
    notes: tuple[str, ...]
    layer: int = -1


def compare_methods(
    methods: str | Sequence[str] = "all",
    *,
    image: str | Path = "",
    backbone: str = BACKBONE,
    backbone_weights: str | Path = "",
    image_size: int = 0,
    budget: str | int = BUDGET,
    batch: int = 1,
    runner: str = "onnxruntime",
    threads: int = 0,
    rounds: int = 20,
    duration_s: float = 0.0,
    seed: int = 0,
    cache: str | Path = "",
    out: str | Path = "",
    progress: Progress = silent,
) -> MethodsReport:
    """Place many methods in or behind one host, for one budget, and measure them in turns beside the plain host.

    Each method stands where it stands by itself, inside the host if it can and after it else, with its recipe's
    defaults. Exports go to a cache, and are made again when edgecomp or the request has changed.

    Args:
        methods: names, one text with commas, or `all`.
        image: a JPEG, PNG, WebP or BMP file; "": the photograph that ships with edgecomp.
        backbone: a timm ViT's name, or a folder or listed name of an image tower of transformers.
        backbone_weights: as for `export`; errors of a random host say little of a trained one.
        image_size: pixels a side; 0: the host's own.
        budget: tokens kept, a count or a percentage.
        batch: the image is repeated over it.
        runner, threads, rounds, duration_s, seed: as in `compare`.
        cache: folder of the exports; "": edgecomp's own.
        out: write the report here, a .json file.
        progress: takes a line now and then.

    Raises:
        UnknownName: no such method. InvalidSpec: not one of them can be placed. RunError: the image cannot be read, or
        a graph cannot run. What one method cannot do is no error: it is in `left_out`, with the reason.
    """
    require_threads(threads)
    require_rounds(rounds, duration_s)
    if str(out):
        require_out(Path(out), kind=METHODS_KIND)
    names = _names(methods)
    path = Path(image) if str(image) else photograph_path()
    picture = read_image(path)
    words: dict[str, Any] = {
        "backbone": backbone,
        "backbone_weights": backbone_weights,
        "budget": budget,
        "batch": batch,
        "image_size": image_size,
    }
    root = Path(cache) if str(cache) else cache_dir() / "compare"
    placed: dict[str, _Placed] = {}
    plains: dict[int, _Placed] = {}  # by the host's layer that is compressed
    left_out: dict[str, str] = {}
    for name in names:
        progress(f"exporting {name}")
        try:
            layer = load_recipe(name).defaults.feature_layer
            bundle = _export(name, root, words, with_plain=layer not in plains)
        except EdgecompError as error:
            left_out[name] = str(error)
            continue
        given = partial(_inputs, picture=picture)
        if layer not in plains:
            plains[layer] = given(bundle, bundle.manifest.plain[0])
        placed[name] = given(bundle, bundle.manifest.buckets[0])._replace(layer=layer)
    if not placed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise InvalidSpec(f"no method can be placed on {backbone} with budget {budget}: {reasons}")
    main = max(plains)  # the whole host, where one of the methods reads its last layer
    placed = {_PLAIN: plains[main]._replace(layer=main), **placed}
    machine = read_machine()
    references = {layer: _tokens(one, runner=runner, threads=threads) for layer, one in plains.items()}
    turns, outputs, version = _run(
        placed, runner=runner, threads=threads, rounds=rounds, duration_s=duration_s, seed=seed, progress=progress
    )
    rows = []
    for name, one in placed.items():
        progress(f"memory and own part of {name}")
        row = _row(name, one, turns, outputs.get(name, {}), references[one.layer], runner=runner, threads=threads)
        if one.layer != main:
            said = f"it reads the host's layer {one.layer}, and its error is to that; the plain model runs to {main}"
            row = msgspec.structs.replace(row, notes=(*row.notes, said))
        rows.append(row)
    manifest = placed[_PLAIN].bundle.manifest
    weights = str(manifest.backbone_weights or manifest.weights)
    report = MethodsReport(
        created=now(),
        edgecomp=__version__,
        image=path.name,
        backbone=manifest.backbone,
        image_size=manifest.image_size,
        weights=weights,
        budget=str(budget),
        batch=batch,
        runner=version,
        threads=threads,
        rounds=turns.rounds,
        seed=seed,
        machine=machine,
        rows=tuple(rows),
        left_out=left_out,
        notes=_notes(weights),
    )
    if str(out):
        write_comparison(report, Path(out), kind=METHODS_KIND)
    return report


def _names(methods: str | Sequence[str]) -> tuple[str, ...]:
    known = method_names()
    given = methods.split(",") if isinstance(methods, str) else methods
    names = tuple(dict.fromkeys(name.strip() for name in given if name.strip()))
    if names == ("all",):
        return known
    for name in names:
        if name not in known:
            raise UnknownName("method", name, (*known, "all"))
    if not names:
        raise InvalidSpec("--methods names none; give names with commas between them, or `all`")
    return names


def _notes(weights: str) -> tuple[str, ...]:
    if not weights.startswith("random"):
        return ()
    return ("weights are random: latency, FLOPs and memory are real, errors say little of a trained model",)


def _export(name: str, root: Path, words: Mapping[str, Any], *, with_plain: bool) -> Bundle:
    """Return the bundle of a method; an export that is there and answers the same request is taken as it is."""
    told = ",".join(f"{key}={value}" for key, value in words.items())
    parts = (name, str(words["backbone"]), str(words["budget"]), hashlib.sha256(told.encode()).hexdigest()[:8])
    folder = "-".join(re.sub(r"[^A-Za-z0-9._]+", "_", part) for part in parts) + ("-plain" if with_plain else "")
    return open_bundle(export(name, **words, with_plain=with_plain, out=root / folder, force=True).bundle)


def _inputs(bundle: Bundle, graph: Bucket | PlainGraph, *, picture: Any) -> _Placed:
    """Return a graph with the image prepared as it wants it, and numbers for what else it takes."""
    preprocess = bundle.manifest.preprocess
    inputs: dict[str, Array] = {}
    made_up = []
    for spec in graph.inputs:
        if spec.kind == "image" and preprocess is not None:
            pixels = image_pixels(bundle, picture, "uint8" if spec.dtype == "uint8" else "float32")
            inputs[spec.name] = np.ascontiguousarray(np.broadcast_to(pixels, spec.shape))
        else:
            inputs[spec.name] = rows_of(
                read_goldens(bundle.path), golden_key("input", "seeded", spec.name), graph.batch
            )
            made_up.append(spec.name)
    notes = (f"seeded numbers stand for {', '.join(made_up)}",) if made_up else ()
    return _Placed(bundle, graph, inputs, notes)


def _run(
    placed: Mapping[str, _Placed],
    *,
    runner: str,
    threads: int,
    rounds: int,
    duration_s: float,
    seed: int,
    progress: Progress,
) -> tuple[Interleaved, dict[str, dict[str, Array]], str]:
    """Return times in turn, each graph's outputs, and the runner's version."""
    with ExitStack() as stack:
        loaded: dict[str, Runner] = {}
        for name, one in placed.items():
            progress(f"loading {name} in {runner}")
            loaded[name] = stack.enter_context(open_graph(runner, one.bundle, one.graph, threads=threads))
        outputs = {name: loaded[name].infer(one.inputs) for name, one in placed.items()}
        turns = interleave(
            {name: partial(loaded[name].infer, one.inputs) for name, one in placed.items()},
            rounds=rounds,
            duration_s=duration_s,
            seed=seed,
            settle_s=settle_of(runner, threads),
            progress=lambda share: progress(f"taking turns, {100 * share:.0f} %"),
        )
        version = next(iter(loaded.values())).version
    return turns, outputs, version


def _row(
    name: str,
    one: _Placed,
    turns: Interleaved,
    outputs: Mapping[str, Array],
    tokens: Array,
    *,
    runner: str,
    threads: int,
) -> MethodRow:
    samples = turns.samples_us[name]
    words: dict[str, Any] = {
        "method": name,
        "flops": one.graph.flops // one.graph.batch,
        "latency_us": median_interval(samples),
        "samples_us": samples,
        "memory_mib": _memory(one, runner=runner, threads=threads),
        "notes": one.notes,
    }
    shares, words["overhead_note"] = _shares(one, runner=runner, threads=threads)
    p50_us = words["latency_us"].value
    words["attention_us"] = None if shares is None else shares.attention * p50_us
    if not isinstance(one.graph, Bucket):
        return MethodRow(**words, tokens_in=len(tokens), tokens_out=len(tokens))
    found, note = _reconstructions(one.graph, outputs, tokens)
    kept = int(outputs["count"][0]) - _prefix(one.graph, outputs) if "count" in outputs else None
    room = one.graph.budget.tokens_out
    if kept is not None and kept > room:
        words["notes"] += (
            f"it found {kept} tokens to keep on this image, and the budget holds {room}: it lost the rest",
        )
    return MethodRow(
        **words,
        placement=one.bundle.manifest.placement,
        preset=one.bundle.manifest.preset,
        tokens_in=one.graph.budget.tokens_in,
        tokens_out=one.graph.budget.tokens_out,
        kept=None if kept is None else min(kept, room),
        reconstructions=found,
        reconstruction_note=note,
        overhead_share=None if shares is None else shares.own,
        overhead_us=None if shares is None else shares.own * p50_us,
        ratio=paired_ratio(samples, turns.samples_us[_PLAIN]),
    )


def _tokens(one: _Placed, *, runner: str, threads: int) -> Array:
    """Return the tokens of a plain model, of the first item."""
    with open_graph(runner, one.bundle, one.graph, threads=threads) as loaded:
        tokens: Array = loaded.infer(one.inputs)["tokens"][0]
        return tokens


def _prefix(graph: Bucket, outputs: Mapping[str, Array]) -> int:
    """Return how many prefix tokens stand in front of what was kept."""
    rows = next((outputs[spec.name].shape[1] for spec in graph.outputs if spec.kind == "tokens"), 0)
    return max(0, int(rows) - graph.budget.tokens_out)


def _shares(one: _Placed, *, runner: str, threads: int) -> tuple[NodeShares | None, str]:
    """Return the shares of the method's own nodes and of attention, or why nothing tells."""
    if runner != "onnxruntime":
        return None, f"the runner {runner} does not tell nodes apart here; ONNX Runtime on the CPU does"
    try:
        return node_shares(one.bundle.path / one.graph.model, one.inputs, threads=threads), ""
    except EdgecompError as error:
        return None, str(error)


def _memory(one: _Placed, *, runner: str, threads: int) -> float | None:
    """Return the peak of a process that serves one request; none where the system does not tell, or for a batch."""
    if one.graph.batch > 1:
        return None
    buckets = [one.graph.budget.tokens_out] if isinstance(one.graph, Bucket) else []
    use = measure_memory(one.bundle.path, buckets, one.inputs, runner=runner, threads=threads)
    return None if use is None else use.peak_mib


def _reconstructions(
    graph: Bucket, outputs: Mapping[str, Array], tokens: Array
) -> tuple[tuple[Reconstruction, ...], str]:
    """Return the error of each way back that the outputs name, on the first item, or why there is none.

    Prefix tokens are left out: the plain model gives its patch tokens alone.
    """
    compressed = next((outputs[spec.name][0] for spec in graph.outputs if spec.kind == "tokens"), None)
    if compressed is None or compressed.ndim != 2:
        return (), "it gives no tokens of one image"
    prefix = _prefix(graph, outputs)
    if "count" in outputs:  # rows behind it are filled up
        compressed = compressed[: int(outputs["count"][0])]
    try:
        if "source_map" in outputs:
            rows = outputs["source_map"][0]
            rows = np.where(rows < len(compressed), rows, -1)  # what found no room was dropped
            return (unmerge_error(tokens, compressed, rows[len(rows) - len(tokens) :]),), ""
        if "index" in outputs:
            places = outputs["index"][0][prefix : len(compressed)]
            places = np.where(places < 0, places, places - prefix)
            fills = [fill_error(tokens, compressed[prefix:], places, fill=fill) for fill in ("zero", "nearest")]
            return tuple(fills), ""
        return (read_back_error(tokens, compressed),), ""
    except InvalidSpec as error:
        return (), str(error)
