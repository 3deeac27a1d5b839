"""`edgecomp parity`: a bundle's graphs against the goldens of the original."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np

from edgecomp.api._emulate import runnable
from edgecomp.api._progress import Progress, silent
from edgecomp.bundle import Bundle, golden_key, open_bundle
from edgecomp.parity import CASES, OutputParity, ParityReport, cases_of, check_bucket, judge, read_goldens
from edgecomp.runners import Array, require_threads
from edgecomp.runners.chain import open_graph
from edgecomp.serving import Answer, Model
from edgecomp.specs import Tolerance
from edgecomp.specs.manifest import Bucket, PlainGraph, RouterGraph

__all__ = ["parity"]

_ROUNDING = 1e-4


def parity(
    bundle: str | Path,
    *,
    runner: str = "onnxruntime",
    threads: int = 0,
    budget: str | int | None = None,
    batch: int | None = None,
    progress: Progress = silent,
) -> ParityReport:
    """Run a bundle's buckets on the golden inputs and compare with the original's outputs.

    Args:
        bundle: the folder.
        runner: `onnxruntime` or `onnxruntime-cuda`.
        threads: CPU threads; 0: as many as the runtime chooses.
        budget: only the bucket that keeps so many tokens (a count or a percentage); None: all, the router, what routed
            requests get, and the plain model.
        batch: only this batch size; None: all.
        progress: takes one line for each bucket.

    Returns:
        the report; `bool(report)` is the verdict. A missed threshold is a result, not an error.

    Raises:
        BundleError: the bundle is not whole. InvalidSpec: it has no such bucket.
        MissingDependency, RunError: the runner cannot run here.
    """
    require_threads(threads)
    opened = open_bundle(Path(bundle))
    manifest = opened.manifest
    graphs: list[Bucket | PlainGraph | RouterGraph] = list(opened.select(budget=budget, batch=batch))
    if budget is None:
        graphs += [graph for graph in manifest.routers if batch in (None, graph.batch)]
        graphs += [graph for graph in manifest.plain if batch in (None, graph.batch)]
    goldens, tolerance = read_goldens(opened.path), manifest.recipe.tolerances[manifest.precision]
    rows: list[OutputParity] = []
    version = ""
    with runnable(opened, runner, progress=progress) as (ready, emulated):
        for graph in graphs:
            progress(f"{graph.model} in {runner}")
            with open_graph(runner, ready, graph, threads=threads) as loaded:
                rows.extend(check_bucket(loaded, graph, goldens, tolerance))
                version = loaded.version
        if budget is None and manifest.router is not None:
            progress(f"requests as the router sends them, in {runner}")
            rows.extend(_check_routed(ready, goldens, tolerance, runner=runner, threads=threads))
    return ParityReport(str(bundle), runner, version, threads, manifest.precision, tolerance, tuple(rows), emulated)


def _check_routed(
    opened: Bundle, goldens: Mapping[str, Array], tolerance: Tolerance, *, runner: str, threads: int
) -> list[OutputParity]:
    """Hold what a routed request gets to what its bucket gives when it is asked for: every bit must be the same."""
    exact = msgspec.structs.replace(tolerance, max_rel=0.0)
    graph = opened.manifest.buckets[0]
    routers = opened.manifest.routers
    cases = cases_of(routers[0]) if routers else CASES
    rows: list[OutputParity] = []
    served: set[int] = set()
    with Model(opened, runner=runner, threads=threads, resident=None) as model:
        for case in cases:
            request: dict[str, Array] = {}
            for name in (spec.name for spec in graph.inputs):  # on the sides of thresholds there is an image alone
                keys = (golden_key("input", one, name) for one in (case, "seeded"))
                request[name] = next(goldens[key][:1] for key in keys if key in goldens)
            routed = model(request)
            rows += _check_choice(opened, goldens, case, routed, exact)
            rows += _check_served(model, request, routed, case, exact)
            served.add(routed.budget)
    for tokens in sorted(set(model.buckets) - served) if routers else ():
        case = f"sent to {tokens}"  # the last request, with thresholds that leave no choice
        with Model(_routing_to(opened, tokens), runner=runner, threads=threads, resident=None) as model:
            routed = model(request)
            got, expected = np.asarray([routed.budget]), np.asarray([tokens])
            rows.append(judge(f"routed to {routed.budget}", case, "bucket", got, expected, exact))
            rows += _check_served(model, request, routed, case, exact)
    return rows


def _check_served(
    model: Model, request: Mapping[str, Array], routed: Answer, case: str, exact: Tolerance
) -> list[OutputParity]:
    """Hold what a routed request got to what its bucket gives when it is asked for."""
    alone = model(request, budget=routed.budget)
    return [
        judge(f"routed to {routed.budget}", case, name, array, alone[name], exact)
        for name, array in routed.outputs.items()
    ]


def _routing_to(opened: Bundle, tokens: int) -> Bundle:
    """Return the bundle with thresholds that send every request to one bucket: needs lie in [0, 1]."""
    record, kept = opened.manifest.router, sorted({bucket.budget.tokens_out for bucket in opened.manifest.buckets})
    assert record is not None
    place = kept.index(tokens)
    cuts = tuple(0.0 if k < place else 2.0 for k in range(len(kept) - 1))
    router = msgspec.structs.replace(record, thresholds=cuts)
    return Bundle(opened.path, msgspec.structs.replace(opened.manifest, router=router))


def _check_choice(
    opened: Bundle, goldens: Mapping[str, Array], case: str, routed: Answer, tolerance: Tolerance
) -> list[OutputParity]:
    """Hold the bucket of a request without words to what the original's need says, with the thresholds of now."""
    record = opened.manifest.router
    key = golden_key("output", case, "need", part="router")
    words = goldens.get(golden_key("input", case, "words"))
    if record is None or key not in goldens or (words is not None and words[0].any()):
        return []
    kept = sorted({bucket.budget.tokens_out for bucket in opened.manifest.buckets})
    need, cuts = goldens[key][0], np.asarray(record.thresholds, np.float32)
    beside = np.abs(need - cuts) < _ROUNDING  # there either side is right
    wanted = (need >= cuts) | (beside & (np.asarray(routed.need) >= cuts))
    got, expected = np.asarray([kept.index(routed.budget)]), np.asarray([int(wanted.sum())])
    return [judge(f"router {record.name}", case, "bucket", got, expected, tolerance)]
