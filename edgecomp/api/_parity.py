"""`edgecomp parity`: a bundle's graphs against the goldens of the original."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from edgecomp.api._emulate import runnable
from edgecomp.api._forced import check_choices, half_of
from edgecomp.api._layers import compare_layers
from edgecomp.api._progress import Progress, silent
from edgecomp.api._torch import TORCH, open_torch
from edgecomp.bundle import Bundle, golden_key, open_bundle
from edgecomp.errors import InvalidSpec, UnknownName
from edgecomp.parity import (
    CASES,
    LayerParity,
    OutputParity,
    ParityReport,
    SelfTest,
    cases_of,
    check_bucket,
    find_culprits,
    judge,
    question_runner,
    read_goldens,
    read_limits,
)
from edgecomp.parity.check import Judged, label_of
from edgecomp.runners import Array, Runner, open_runner, require_threads, runner_names
from edgecomp.runners.chain import open_graph
from edgecomp.serving import Answer, Model
from edgecomp.specs import Tolerance
from edgecomp.specs.manifest import Bucket, Graph, PartGraph

__all__ = ["parity"]

_ROUNDING = 1e-4
_ORIGINAL = "original"
_THREAD_COUNTS = (1, 2, 4)


def parity(
    bundle: str | Path,
    *,
    runner: str = "onnxruntime",
    threads: int = 0,
    against: str = _ORIGINAL,
    budget: str | int | None = None,
    batch: int | None = None,
    selection: bool = False,
    self_test: bool = False,
    per_layer: bool = False,
    weights: str | Path = "random",
    backbone_weights: str | Path = "random",
    then_weights: str | Path = "random",
    atol: Sequence[str | float] = (),
    rtol: Sequence[str | float] = (),
    progress: Progress = silent,
) -> ParityReport:
    """Run a bundle's buckets on the golden inputs and compare with the original's outputs.

    Args:
        bundle: the folder.
        runner: `onnxruntime` or `onnxruntime-cuda`, with threads of its own where wanted: `onnxruntime:4`; `tensorrt`
            or `rtx`: the engines that were built, on the GPU here; `torch`: the static models in eager torch, fp32.
        threads: CPU threads where the runner says none; 0: as many as the runtime chooses.
        against: `original`, or another runner whose outputs are expected on the golden inputs.
        budget: only the bucket that keeps so many tokens (a count or a percentage); None: all, the router, what routed
            requests get, and the plain model.
        batch: only this batch size; None: all.
        selection: judge which tokens are chosen, and the values under the original's choices, apart; graphs of a
            reduced precision whose outputs are off are judged so in any case.
        self_test: ask the runner whether it agrees with itself: rows that are alike, runs again, numbers of threads.
        per_layer: make the model again in torch, and compare each of its modules with the graph's; `report.culprits`
            says where an error begins.
        weights, backbone_weights, then_weights: for `per_layer` and `torch`, the files that the bundle was made with,
            where there were any.
        atol, rtol: largest errors in place of the recipe's: `NAME:1e-3` for one output, `1e-3` for all others.
        progress: takes one line for each bucket.

    Returns:
        the report; `bool(report)` is the verdict. A missed threshold is a result, not an error.

    Raises:
        BundleError: the bundle is not whole, or with `selection` holds no choices. InvalidSpec: it has no such bucket
            or output, or the runner cannot answer that question. MissingDependency, RunError, TargetMismatch: the
            runner cannot run here.
    """
    require_threads(threads)
    limits = read_limits(atol=atol, rtol=rtol)
    files = {
        "weights": str(weights),
        "backbone_weights": str(backbone_weights),
        "then_weights": str(then_weights),
    }
    one = _read_runner(runner, threads, files)
    other = None if against == _ORIGINAL else _read_runner(against, threads, files)
    if threads and not any(_takes_threads(name) for name in (one.name, against)):
        raise InvalidSpec(f"threads={threads} with runner {one.name}: it takes no number of threads; leave them out")
    if one.name == TORCH and (selection or per_layer):
        raise InvalidSpec("the runner 'torch' is the model itself, and takes no choices: judge another one against it")
    opened = open_bundle(Path(bundle))
    manifest = opened.manifest
    buckets = list(opened.select(budget=budget, batch=batch))
    in_torch = TORCH in (one.name, against)
    precision = "fp32" if one.name == TORCH else manifest.precision
    parts = {part.label: part for bucket in buckets for part in manifest.parts_of(bucket)}
    graphs: list[Judged] = [*buckets, *({} if in_torch else parts).values()]
    routers = [graph for graph in manifest.routers if batch in (None, graph.batch)] if budget is None else []
    if budget is None:
        graphs += [] if in_torch else routers
        graphs += [graph for graph in manifest.plain if batch in (None, graph.batch)]
    limits.require_known(spec.name for graph in graphs for spec in graph.outputs)
    goldens, tolerance = read_goldens(opened.path), manifest.recipe.tolerances[precision]
    rows: list[OutputParity] = []
    choosing: list[Bucket | PartGraph] = []
    tests: list[SelfTest] = []
    version = ""
    with runnable(opened, one.name, progress=progress) as ready:
        for graph in graphs:
            progress(f"{label_of(graph)} in {runner}")
            with ExitStack() as stack:
                form = half_of(ready, graph)
                loaded = stack.enter_context(one.open(ready.bundle, graph, model=form))
                expected = stack.enter_context(other.open(ready.bundle, graph, model=form)) if other else None
                found = check_bucket(loaded, graph, goldens, tolerance, limits=limits, against=expected)
                rows.extend(found)
                if isinstance(graph, (Bucket, PartGraph)) and (selection or (precision != "fp32" and not all(found))):
                    choosing.append(graph)
                version = loaded.version
                if self_test and isinstance(graph, Bucket):
                    progress(f"{graph.model} against itself in {runner}")
                    counts = _THREAD_COUNTS if one.name == "onnxruntime" else ()
                    threaded = {n: partial(one._replace(threads=n).open, ready.bundle, graph) for n in counts}
                    tests.extend(question_runner(loaded, graph, goldens, tolerance, with_threads=threaded))
        layers: list[LayerParity] = []
        for bucket in buckets if per_layer else ():
            progress(f"modules of {bucket.model} in {runner}")
            layers.extend(
                compare_layers(
                    ready.bundle,
                    bucket,
                    goldens,
                    tolerance,
                    partial(_open_derived, one, ready.bundle),
                    **files,
                )
            )
        chosen = check_choices(
            ready,
            choosing,
            goldens,
            tolerance,
            limits=limits,
            open_one=one.open,
            open_other=None if other is None or other.name == TORCH else other.open,
            progress=lambda label: progress(f"choices of {label} in {runner}"),
        )
        if budget is None and manifest.router is not None and other is None and not in_torch:
            progress(f"requests as the router sends them, in {runner}")
            rows.extend(_check_routed(ready.bundle, goldens, tolerance, runner=one.name, threads=one.threads))
    return ParityReport(
        str(bundle), one.name, version, one.threads, precision, tolerance, tuple(rows),
        against=against, limits=limits, selection=chosen, self_tests=tuple(tests), layers=tuple(layers),
        culprits=find_culprits(layers, limit=tolerance.max_rel), emulated=ready.emulated,
        left_out=tuple(graph.model for graph in routers) if in_torch else (),
    )  # fmt: skip


class _RunnerChoice(NamedTuple):
    """A runner by name, with its threads, and the files that a model in torch is made of."""

    name: str
    threads: int
    files: Mapping[str, str]

    def open(self, bundle: Bundle, graph: Graph, *, model: Path | None = None) -> Runner:
        """Load a graph of a bundle, or another form of it."""
        if self.name == TORCH:
            return open_torch(
                bundle,
                graph,
                weights=self.files["weights"],
                backbone_weights=self.files["backbone_weights"],
                then_weights=self.files["then_weights"],
            )
        return open_graph(self.name, bundle, graph, threads=self.threads, model=model)


def _open_derived(runner: _RunnerChoice, bundle: Bundle, model: Path) -> Runner:
    """Load a graph that was made of one of the bundle's, and reads its weights."""
    return open_runner(runner.name, model, threads=runner.threads, weights=bundle.path)


def _read_runner(text: str, threads: int, files: Mapping[str, str]) -> _RunnerChoice:
    """Read `NAME` or `NAME:THREADS`."""
    name, colon, count = text.partition(":")
    if name == _ORIGINAL:
        raise InvalidSpec(
            f"{text!r} is no runner but what was recorded of the original: others are compared with it, --against "
            f"{_ORIGINAL} (the default); `torch` runs the model"
        )
    if (colon and not count.isascii()) or (colon and not count.isdigit()):
        raise InvalidSpec(f"runner {text!r}: give a name, or NAME:THREADS, such as onnxruntime:4")
    if name not in (*runner_names(), TORCH):
        raise UnknownName("runner", name, (*runner_names(), TORCH, _ORIGINAL))
    if colon and threads not in (0, int(count)):
        raise InvalidSpec(f"runner {text!r} has threads of its own, and threads={threads} is another number; drop one")
    if colon and not _takes_threads(name):
        raise InvalidSpec(f"runner {text!r}: {name} takes no number of threads, write {name}")
    chosen = (int(count) if colon else threads) if _takes_threads(name) else 0
    require_threads(chosen)
    return _RunnerChoice(name, chosen, files)


def _takes_threads(runner: str) -> bool:
    return runner.startswith("onnxruntime")


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
