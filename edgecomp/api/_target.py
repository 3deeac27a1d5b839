"""`edgecomp target calibrate`: the efficiency of a target, fitted to what its user measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from edgecomp.api._estimate import costs_of
from edgecomp.api._progress import Progress, silent
from edgecomp.bundle import open_bundle
from edgecomp.errors import InvalidSpec, MissingDependency, RunError
from edgecomp.estimates.applied import calibrate, clear, save, shipped_for
from edgecomp.estimates.efficiency import Efficiency, Observed, modelled_us
from edgecomp.estimates.roofline import load_of, prepare
from edgecomp.profiles.latency import LatencyProfile
from edgecomp.profiles.result import Result, read_result
from edgecomp.report.target import CalibratedRow, TargetReport
from edgecomp.specs import Target, load_target
from edgecomp.specs.costs import GraphCosts
from edgecomp.specs.origin import file_sha256

__all__ = ["target_calibrate"]

_ROLES = ("bucket", "plain", "model")
_ON_GPU = ("tensorrt", "rtx", "onnxruntime-cuda", "onnxruntime-trt")  # how a profile's runner begins, in small letters


class _Model(NamedTuple):
    """A bundle or file that was measured, known by its digest."""

    path: Path
    digest: str


def target_calibrate(
    target: str,
    *,
    results: Sequence[str | Path] = (),
    models: Sequence[str | Path] = (),
    plugin: bool = True,
    force: bool = False,
    clear_it: bool = False,
    progress: Progress = silent,
) -> TargetReport:
    """Refit the efficiency of a target from results of `edgecomp profile`, and keep it for later estimates of it.

    Args:
        target: a target's name, or the path of its TOML file; the calibration is kept under its name.
        results: result files, measured on that target.
        models: the bundles or .onnx files that were measured, told by their digest: a result holds no graph.
        plugin: merge nodes ran in edgecomp's plugin.
        force: take results of another device too, and of runners that are not known to use its GPU.
        clear_it: remove the calibration instead.
        progress: takes one line for each step.

    Raises:
        UnknownName, InvalidSpec: no such target; nothing to fit; results of another device, or of a model not given.
        RunError: a result or model is damaged. MissingDependency: the package onnx is not installed.
    """
    chosen = load_target(target)
    if clear_it:
        if results or models:
            raise InvalidSpec("--clear removes the calibration and takes no --from or --model; leave one of them out")
        return TargetReport(chosen.name, "", cleared=clear(chosen.name))
    if not results:
        raise InvalidSpec(f"nothing to fit {chosen.name} to; give results of `edgecomp profile --out` with --from")
    known = [_identify(Path(path)) for path in models]
    observed: list[Observed] = []
    labels, notes, graphs = [], [], []
    seen: set[tuple[object, ...]] = set()
    forced = False
    for file in map(Path, results):
        progress(file.name)
        result = read_result(file)
        if result.target != chosen.name and not force:
            raise InvalidSpec(
                f"{file.name} was measured on {result.target}, and this is {chosen.name}; give results of that device, "
                "or --force to take it all the same"
            )
        forced |= result.target != chosen.name
        model = _model_of(result, known, file)
        for profile in result.profiles:
            if profile.mode != "single-stream" or profile.role not in _ROLES:
                notes.append(f"{file.name}: {profile.model} as {profile.role}, {profile.mode}, is left out")
                continue
            graph = (result.subject.digest, profile.model, profile.batch)
            if (*graph, profile.samples_us) in seen:
                notes.append(f"{file.name}: {profile.model} is the same measurement as one before it: counted once")
                continue
            seen.add((*graph, profile.samples_us))
            forced |= _require_gpu(profile, file, chosen, force=force)
            notes += [f"{file.name}: {profile.model}: {mark}" for mark in profile.marks]
            observed.append(_observe(model, profile, chosen, plugin=plugin))
            graphs.append(graph)
            labels.append(f"{result.subject.name}/{profile.model}, batch {profile.batch}, {profile.runner}")
    if not observed:
        raise InvalidSpec(
            f"the results hold no single-stream latency of a bucket, plain model or file, so {chosen.name} cannot be "
            "fitted; measure with `edgecomp profile --out`"
        )
    before = shipped_for(chosen.name)
    made = calibrate(chosen.name, observed, labels, graphs=graphs, forced=forced)
    path = save(made)
    rows = tuple(
        CalibratedRow(label, one.us, _sum(one, before.efficiency), _sum(one, made.efficiency))
        for label, one in zip(labels, observed, strict=True)
    )
    return TargetReport(
        chosen.name,
        str(path),
        rows=rows,
        before=before.efficiency,
        after=made.efficiency,
        error=made.error,
        error_of=made.error_of,
        forced=forced,
        notes=tuple(dict.fromkeys(notes)),
    )


def _require_gpu(profile: LatencyProfile, file: Path, target: Target, *, force: bool) -> bool:
    """Refuse a time that is not known to be the GPU's, of which a target tells; say whether it was forced in."""
    if profile.runner.lower().startswith(_ON_GPU):
        return False
    if not force:
        raise InvalidSpec(
            f"{file.name}: {profile.model} was run by {profile.runner}, and {target.name} is estimated for its GPU; "
            f"give results of {', '.join(_ON_GPU[:-1])} (`edgecomp profile --runner`), or --force to take it all "
            "the same"
        )
    return True


def _sum(one: Observed, efficiency: Efficiency) -> float:
    return float(modelled_us(one.load, efficiency).sum())


def _identify(path: Path) -> _Model:
    if path.is_dir():
        return _Model(path, open_bundle(path, verify=False).manifest.digest)
    if not path.is_file():
        raise RunError(f"--model {path} is not there; give the bundle or .onnx file that was measured")
    return _Model(path, file_sha256(path))


def _model_of(result: Result, known: Sequence[_Model], file: Path) -> _Model:
    subject = result.subject
    found = next((model for model in known if model.digest == subject.digest), None)
    if found is None:
        given = ", ".join(str(model.path) for model in known) or "none"
        raise InvalidSpec(
            f"{file.name} measured {subject.name} (digest {subject.digest[:12]}), and no --model is that (given: "
            f"{given}); give the bundle or file, unaltered"
        )
    return found


def _observe(model: _Model, profile: LatencyProfile, target: Target, *, plugin: bool) -> Observed:
    costs = next(_costs(model, profile), None)
    if costs is None:
        raise InvalidSpec(
            f"{model.path} has no graph {profile.model!r}, which the result names; give what was measured"
        )
    batch = profile.batch if costs.batch else 0
    work = prepare(costs, precision="", batch=batch, plugin=plugin, target=target)
    return Observed(target.name, load_of(work, target)[0], profile.p50_us)


def _costs(model: _Model, profile: LatencyProfile) -> Iterator[GraphCosts]:
    try:
        from edgecomp.export.costs import count_costs
    except ImportError as error:
        raise MissingDependency("onnx", needed_for="counting what a graph costs", extra="export") from error
    if not model.path.is_dir():
        yield count_costs(model.path, batch=profile.batch)
        return
    manifest = open_bundle(model.path, verify=False).manifest
    for graph in (*manifest.buckets, *manifest.plain):
        if graph.model == profile.model:
            yield costs_of(model.path, graph)
