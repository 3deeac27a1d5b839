"""`edgecomp profile`: how long a bundle's bucket takes here."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgecomp import __version__
from edgecomp.api._progress import Progress, silent
from edgecomp.bundle import Bundle, golden_key, open_bundle
from edgecomp.errors import InvalidSpec
from edgecomp.parity import read_goldens
from edgecomp.profiles.latency import LatencyProfile, measure_latency
from edgecomp.profiles.machine import Machine, read_machine
from edgecomp.profiles.result import MemoryUse, Result, RoutedTime, Subject, write_result
from edgecomp.runners import Array, Runner, open_runner, require_threads
from edgecomp.runners.chain import open_graph, require_kernels
from edgecomp.runners.onnxruntime_types import runtime_products
from edgecomp.serving.memory import measure_memory
from edgecomp.specs.manifest import Bucket, Graph, Manifest
from edgecomp.words import read_words

__all__ = ["profile"]


def profile(
    bundle: str | Path,
    *,
    runner: str = "onnxruntime",
    duration_s: float = 3.0,
    threads: int = 0,
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
        bundle: the folder.
        runner, threads, budget, batch: as in `parity`.
        duration_s: least seconds to measure each graph for, above 0 and at most 3600.
        out: write the result here: a file that ends in `.json`, or a folder of results.
        progress: takes one line for each graph.

    Raises:
        BundleError, InvalidSpec, MissingDependency, RunError: as in `parity`.
    """
    if not 0 < duration_s <= 3600:
        raise InvalidSpec(f"duration {duration_s} s is not above 0 and at most 3600 s")
    require_threads(threads)
    opened = open_bundle(Path(bundle))
    require_kernels(opened, runner)
    manifest, goldens, machine = opened.manifest, read_goldens(opened.path), read_machine()
    buckets = opened.select(budget=budget, batch=batch)
    batches = sorted({bucket.batch for bucket in buckets})
    profiles: list[LatencyProfile] = []

    def measure(runner_of: Runner, graph: Graph, inputs: dict[str, Array]) -> None:
        progress(f"timing {graph.model} in {runner}")
        given = {name: inputs[name] for name in runner_of.input_names}
        measured = measure_latency(
            lambda: runner_of.infer(given),
            batch=graph.batch,
            model=graph.model,
            runner=runner_of.version,
            threads=threads,
            duration_s=duration_s,
        )
        profiles.append(msgspec.structs.replace(measured, **_described(manifest, graph)))

    for size in batches:
        inputs = {
            spec.name: np.ascontiguousarray(goldens[golden_key("input", "seeded", spec.name)][:size])
            for spec in buckets[0].inputs
        }
        if manifest.router is not None and budget is None:
            router = next((graph for graph in manifest.router.graphs if graph.batch == size), None)
            _measure_router(opened, manifest, router, size, inputs, measure, runner=runner, threads=threads)
        plain = [graph for graph in manifest.plain if graph.batch == size and budget is None]
        for graph in (*(bucket for bucket in buckets if bucket.batch == size), *plain):
            with open_graph(runner, opened, graph, threads=threads) as loaded:
                measure(loaded, graph, inputs)
    memory: tuple[MemoryUse, ...] = ()
    if budget is None and len({bucket.budget.tokens_out for bucket in buckets}) > 1:
        progress("measuring memory in processes of their own")
        memory = _measure_memory(opened, goldens, runner=runner, threads=threads)
    result = Result(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z"),
        edgecomp=__version__,
        command=_command(opened, runner=runner, duration_s=duration_s, threads=threads, budget=budget, batch=batch),
        target=_target(machine),
        subject=_subject(opened),
        machine=machine,
        profiles=tuple(profiles),
        routing=_routing(manifest, profiles),
        memory=memory,
        types=_types(opened, [profile.model for profile in profiles], runner),
    )
    if str(out):
        write_result(result, Path(out))
    return result


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


def _target(machine: Machine) -> str:
    """Return the name of the folder that results of this machine go to."""
    return re.sub(r"[^a-z0-9]+", "-", machine.gpu.lower()).strip("-") or "cpu"


def _command(opened: Bundle, **words: Any) -> tuple[str, ...]:
    """Return the words that repeat the run, without those that say what is so anyway."""
    given = {name: value for name, value in words.items() if value not in (None, 0, "onnxruntime")}
    options = (f"--{name.removesuffix('_s')}={value}" for name, value in given.items())
    return ("edgecomp", "profile", opened.path.resolve().name, *options)


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
    measure: Callable[[Runner, Graph, dict[str, Array]], None],
    *,
    runner: str,
    threads: int,
) -> None:
    """Time the router alone, and the stem alone where there is one."""
    seen = dict(inputs)
    for stem in (graph for graph in manifest.stem if graph.batch == size):
        with open_runner(runner, opened.path / stem.model, threads=threads) as loaded:
            measure(loaded, stem, seen)
            seen |= loaded.infer({name: seen[name] for name in loaded.input_names})
    if router is None or manifest.router is None:
        return
    cuts = np.asarray(manifest.router.thresholds, np.float32)
    seen["thresholds"], seen["words"] = np.repeat(cuts[None], size, 0), np.repeat(read_words(""), size, 0)
    with open_runner(runner, opened.path / router.model, threads=threads) as loaded:
        measure(loaded, router, seen)


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
