"""`edgecomp profile`: how long a bundle's bucket takes here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
import numpy as np

from edgecomp import __version__
from edgecomp.api._measure import Plan, command_of, measure_opened, short_of, target_named, time_preprocessing, utc_now
from edgecomp.api._profile_file import profile_file
from edgecomp.api._profile_layers import Part, ablate_blocks, layer_times, with_shares
from edgecomp.api._progress import Progress, silent
from edgecomp.api._torch import TORCH, open_torch
from edgecomp.bundle import Bundle, golden_key, open_bundle
from edgecomp.engines.nodes import cut_labels, read_graph
from edgecomp.images import PixelType
from edgecomp.parity import read_goldens
from edgecomp.profiles.latency import LatencyProfile, Stage
from edgecomp.profiles.machine import read_machine
from edgecomp.profiles.result import (
    BlockTime,
    LayerTime,
    MemoryUse,
    Result,
    RoutedTime,
    Subject,
    require_out,
    write_result,
)
from edgecomp.runners import Array, Runner, open_runner
from edgecomp.runners.chain import open_graph, require_kernels
from edgecomp.runners.onnxruntime_types import runtime_products
from edgecomp.serving.memory import measure_memory
from edgecomp.specs.manifest import Bucket, Graph, Manifest
from edgecomp.words import read_words

if TYPE_CHECKING:
    from edgecomp.profiles.latency import Mode

__all__ = ["profile"]


def profile(
    bundle: str | Path,
    *,
    runner: str = "onnxruntime",
    duration_s: float = 3.0,
    runs: int = 20,
    warmup_s: float = 2.0,
    threads: int = 0,
    mode: str = "single-stream",
    streams: int = 1,
    percentile: float = 0.0,
    cuda_graph: bool = False,
    stages: bool = True,
    per_layer: bool = False,
    ablate: bool = False,
    original: bool = False,
    weights: str = "random",
    backbone_weights: str = "random",
    then_weights: str = "random",
    budget: str | int | None = None,
    batch: int | None = None,
    out: str | Path = "",
    progress: Progress = silent,
) -> Result:
    """Measure the latency of each bucket with its stem, of router and stem alone, and of the plain model.

    Each is warmed up until it is steady, then timed run after run on the seeded golden input; raw samples are kept.
    Of several buckets, the memory of a process that serves the largest, of one that serves all of them, and of one
    whose graphs share their weights, as well.

    Args:
        bundle: the folder, or an ONNX file with static shapes, whose inputs are seeded noise.
        runner, threads, budget, batch: as in `parity`.
        duration_s: least seconds to measure each graph for, above 0 and at most 3600.
        runs: least samples of each graph, even if they take longer.
        warmup_s: most seconds of warm-up; 0 leaves it out.
        mode, streams: as MLPerf calls them: `single-stream`, `multi-stream` or `offline`, with so many at a time.
        percentile: one that must be carried by enough samples; a note says so where it is not. 0: none in particular.
        cuda_graph: launch an engine as one CUDA graph.
        stages: time what stands around a graph, too: preparing an image, and copies to and from a GPU.
        per_layer: what each layer takes, by the runtime's own profiler, in runs of their own.
        ablate: what each encoder block takes, by graphs that end after it; no export is needed for it.
        original: time the PyTorch original of each bucket, too, in torch on the CPU.
        weights, backbone_weights, then_weights: of the runner `torch` and of `original`: files, where the bundle's
            came from files.
        out: write the result here: a file that ends in `.json`, or a folder of results.
        progress: takes one line for each graph.

    Raises:
        BundleError, InvalidSpec, MissingDependency, RunError: as in `parity`.
    """
    plan = Plan(
        runner=runner,
        threads=threads,
        duration_s=duration_s,
        runs=runs,
        warmup_s=warmup_s,
        mode=cast("Mode", mode),
        streams=streams,
        percentile=percentile,
        cuda_graph=cuda_graph,
        stages=stages,
        per_layer=per_layer,
        ablate=ablate,
        original=original,
        weights=weights,
        backbone_weights=backbone_weights,
        then_weights=then_weights,
    )
    plan.require()
    if str(out):
        require_out(Path(out))
    if Path(bundle).suffix == ".onnx":
        result = profile_file(Path(bundle), plan, budget=budget, batch=batch, progress=progress)
    else:
        result = _profile_bundle(Path(bundle), plan, budget=budget, batch=batch, progress=progress)
    if str(out):
        write_result(result, Path(out))
    return result


def _profile_bundle(
    folder: Path, plan: Plan, *, budget: str | int | None, batch: int | None, progress: Progress
) -> Result:
    """Measure the graphs of a bundle."""
    runner, threads = plan.runner, plan.threads
    opened = open_bundle(folder)
    if runner != TORCH:
        require_kernels(opened, runner)
    manifest, goldens, machine = opened.manifest, read_goldens(opened.path), read_machine()
    buckets = opened.select(budget=budget, batch=batch)
    batches = sorted({bucket.batch for bucket in buckets})
    profiles: list[LatencyProfile] = []
    notes: list[str] = []
    layers: list[LayerTime] = []
    seen_stems: set[str] = set()
    blocks: list[BlockTime] = []

    def note(said: str) -> None:
        notes.append(said)
        progress(f"note: {said}")

    def measure(open_one: Callable[[], Runner], graph: Graph, inputs: Mapping[str, Array]) -> None:
        progress(f"timing {graph.model} in {runner}")
        measured = measure_opened(
            plan,
            open_one,
            inputs,
            model=graph.model,
            batch=graph.batch,
            say=note,
            is_first=not profiles,
            **_described(manifest, graph),
        )
        profiles.append(measured)
        if short := short_of(plan, measured):
            note(short)

    for size in batches:
        inputs = {
            spec.name: np.ascontiguousarray(goldens[golden_key("input", "seeded", spec.name)][:size])
            for spec in buckets[0].inputs
        }
        if manifest.router is not None and budget is None and runner != TORCH:
            router = next((graph for graph in manifest.router.graphs if graph.batch == size), None)
            _measure_router(opened, manifest, router, size, inputs, measure, plan=plan)
        plain = [graph for graph in manifest.plain if graph.batch == size and budget is None]
        for graph in (*(bucket for bucket in buckets if bucket.batch == size), *plain):
            measure(partial(_open, plan, opened, graph), graph, inputs)
            for part in _parts(plan, opened, graph, inputs) if plan.per_layer or plan.ablate else ():
                is_new = part.name != graph.stem or part.name not in seen_stems
                seen_stems.add(part.name)  # several buckets share one
                if plan.per_layer and is_new:
                    progress(f"timing the layers of {part.name}")
                    layers += layer_times(plan, part, partial(_open_alone, plan, part.path))
                if plan.ablate and is_new and (part.name != graph.stem or cut_labels(read_graph(part.path))):
                    blocks += ablate_blocks(plan, part, weights=opened.path, progress=progress)
            if plan.per_layer:
                own = tuple(layer for layer in layers if layer.model in (graph.model, graph.stem))
                profiles[-1] = with_shares(profiles[-1], own)
            if plan.original and graph not in plain:
                progress(f"timing the original of {graph.model} in {TORCH}")
                described = _described(manifest, graph) | {"role": "original", "precision": "fp32"}
                eager = msgspec.structs.replace(plan, runner=TORCH, cuda_graph=False)
                opening = partial(_open_torch, eager, opened, graph, original=True)
                name = f"original of {graph.model}"
                profiles.append(
                    measure_opened(eager, opening, inputs, model=name, batch=graph.batch, say=note, **described)
                )
    memory: tuple[MemoryUse, ...] = ()
    if runner != TORCH and budget is None and len({bucket.budget.tokens_out for bucket in buckets}) > 1:
        progress("measuring memory in processes of their own")
        memory = _measure_memory(opened, goldens, runner=runner, threads=threads)
    return Result(
        created=utc_now(),
        edgecomp=__version__,
        command=command_of(folder, plan, budget=budget, batch=batch),
        target=target_named(plan, profiles[0]),
        subject=_subject(opened),
        machine=machine,
        profiles=_with_stages(opened, profiles, plan),
        layers=tuple(layers),
        blocks=tuple(blocks),
        routing=_routing(manifest, profiles),
        memory=memory,
        types=_types(opened, [one.model for one in profiles if one.role != "original"], runner),
        notes=tuple(notes),
    )


def _described(manifest: Manifest, graph: Graph) -> dict[str, Any]:
    """Return what a profile says of its graph."""
    roles = ((manifest.stem, "stem"), (manifest.routers, "router"), (manifest.plain, "plain"))
    words = {
        "role": next((role for graphs, role in roles if graph in graphs), "bucket"),
        "precision": graph.precision,
        "flops": graph.flops,
    }
    return words | (
        {"tokens_in": graph.budget.tokens_in, "tokens_out": graph.budget.tokens_out}
        if isinstance(graph, Bucket)
        else {}
    )


def _subject(opened: Bundle) -> Subject:
    manifest = opened.manifest
    return Subject(
        name=opened.path.resolve().name,
        digest=manifest.digest,
        method=manifest.method,
        preset=manifest.preset,
        backbone=manifest.backbone,
        precision=manifest.precision,
        rest=manifest.rest,
        image_size=manifest.image_size,
        weights=str(manifest.weights),
    )


def _open(plan: Plan, opened: Bundle, graph: Graph) -> Runner:
    if plan.runner == TORCH:
        return _open_torch(plan, opened, graph)
    return open_graph(plan.runner, opened, graph, threads=plan.threads, cuda_graph=plan.cuda_graph)


def _open_alone(plan: Plan, model: Path) -> Runner:
    return open_runner(plan.runner, model, threads=plan.threads)


def _parts(plan: Plan, opened: Bundle, graph: Graph, inputs: Mapping[str, Array]) -> tuple[Part, ...]:
    """Return the graph with what it reads; its stem in front of it, where it has one."""
    if not graph.stem:
        return (Part(opened.path / graph.model, graph.model, inputs),)
    stem = Part(opened.path / graph.stem, graph.stem, inputs)
    with _open_alone(plan, stem.path) as loaded:
        handed = loaded.infer({name: inputs[name] for name in loaded.input_names})
    return stem, Part(opened.path / graph.model, graph.model, {**inputs, **handed})


def _open_torch(plan: Plan, opened: Bundle, graph: Graph, *, original: bool = False) -> Runner:
    return open_torch(
        opened,
        graph,
        weights=plan.weights,
        backbone_weights=plan.backbone_weights,
        then_weights=plan.then_weights,
        threads=plan.threads,
        original=original,
    )


def _with_stages(opened: Bundle, profiles: Sequence[LatencyProfile], plan: Plan) -> tuple[LatencyProfile, ...]:
    """Return profiles of whole models with the stages that stand around and in front of their graphs."""
    manifest = opened.manifest
    if not plan.stages:
        return tuple(profiles)
    before: tuple[Stage, ...] = ()
    if manifest.preprocess is not None:
        dtype: PixelType = "uint8" if manifest.input_dtype == "uint8" else "float32"
        before = (time_preprocessing(manifest.preprocess, dtype),)
    routers = {one.batch: one.p50_us for one in profiles if one.role == "router"}
    found = []
    for one in profiles:
        router = (
            (Stage("router", routers[one.batch], "alone, with its own copies in and out"),)
            if one.role == "bucket" and one.batch in routers
            else ()
        )
        is_whole = one.role not in ("router", "stem")
        own = _named_by_method(manifest, one.stages)
        found.append(msgspec.structs.replace(one, stages=(*before, *router, *own)) if is_whole else one)
    return tuple(found)


def _named_by_method(manifest: Manifest, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Say of two methods in a row in which stage each runs."""
    if manifest.then is None:
        return stages
    host = f"{manifest.backbone} and " if manifest.backbone != "none" else ""
    runs = {"stem": f"{host}{manifest.method}", "behind the stem": manifest.then.method}
    return tuple(
        msgspec.structs.replace(one, how=f"{runs[one.name]}; {one.how}") if one.name in runs else one for one in stages
    )


def _types(opened: Bundle, models: Sequence[str], runner: str) -> dict[str, dict[str, int]]:
    """Return in which types ONNX Runtime runs the matrix products of graphs, and stems, that are not in fp32."""
    graphs = {graph.model: graph for graph in opened.manifest.graphs}
    measured = dict.fromkeys(name for model in models for name in (graphs[model].stem, model) if name)
    if not runner.startswith("onnxruntime"):
        return {}
    provider = "CUDAExecutionProvider" if runner == "onnxruntime-cuda" else "CPUExecutionProvider"
    found = {}
    for model in measured:
        if graphs[model].precision != "fp32":
            seen = Counter(product.dtype for product in runtime_products(opened.path / model, provider=provider))
            found[model] = dict(seen.most_common())
    return found


def _measure_memory(
    opened: Bundle, goldens: Mapping[str, Array], *, runner: str, threads: int
) -> tuple[MemoryUse, ...]:
    """Return what the largest bucket takes, what all of them take, and what they take when they share weights."""
    kept = sorted({bucket.budget.tokens_out for bucket in opened.manifest.buckets})
    inputs = opened.manifest.buckets[0].inputs
    request = {spec.name: goldens[golden_key("input", "seeded", spec.name)][:1] for spec in inputs}
    ways = [(kept[-1:], False), (kept, False), *([(kept, True)] if runner == "onnxruntime" else [])]
    found = (
        measure_memory(opened.path, buckets, request, runner=runner, threads=threads, share_weights=shared)
        for buckets, shared in ways
    )
    return tuple(use for use in found if use is not None)


def _measure_router(
    opened: Bundle,
    manifest: Manifest,
    router: Graph | None,
    size: int,
    inputs: dict[str, Array],
    measure: Callable[[Callable[[], Runner], Graph, Mapping[str, Array]], None],
    *,
    plan: Plan,
) -> None:
    """Time the router alone, and the stem alone where there is one."""
    seen = dict(inputs)
    for stem in (graph for graph in manifest.stem if graph.batch == size):
        measure(partial(_open, plan, opened, stem), stem, seen)
        with _open(plan, opened, stem) as loaded:
            seen |= loaded.infer({name: seen[name] for name in loaded.input_names})
    if router is None or manifest.router is None:
        return
    cuts = np.asarray(manifest.router.thresholds, np.float32)
    seen["thresholds"], seen["words"] = np.repeat(cuts[None], size, 0), np.repeat(read_words(""), size, 0)
    measure(partial(_open, plan, opened, router), router, seen)


def _routing(manifest: Manifest, profiles: Sequence[LatencyProfile]) -> tuple[RoutedTime, ...]:
    """Return what a routed request takes in each bucket, beside the largest alone."""
    if manifest.router is None:
        return ()
    times = {profile.model: profile.p50_us / 1000 for profile in profiles}
    found = []
    for graph in manifest.router.graphs:
        buckets = [bucket for bucket in manifest.buckets if bucket.batch == graph.batch and bucket.model in times]
        if graph.model in times and buckets:
            found += [
                RoutedTime(
                    model=bucket.model,
                    batch=graph.batch,
                    router_ms=times[graph.model],
                    routed_ms=times[graph.model] + times[bucket.model],
                    smallest_ms=times[buckets[0].model],
                    largest_ms=times[buckets[-1].model],
                )
                for bucket in buckets
            ]
    return tuple(found)
