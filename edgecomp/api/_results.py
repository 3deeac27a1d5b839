"""`edgecomp results`: what lies among results, what two of them differ in, and whether one is worse."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from edgecomp.errors import InvalidSpec, RunError, UnknownName
from edgecomp.files import JSON_ERRORS
from edgecomp.profiles.comparison import (
    COMPARISON_KIND,
    machine_differences,
    setting_differences,
    subject_differences,
    version_differences,
)
from edgecomp.profiles.regression import METRICS, Pair, judge_pair, matched, read_share
from edgecomp.profiles.result import Result, read_result
from edgecomp.report.methods import METHODS_KIND
from edgecomp.report.results import ChangedField, ChangedNumber, CheckReport, DiffReport, ListedFile

__all__ = ["results_check", "results_diff", "results_list", "results_show"]

RESULTS = "profiles/results"
_KIND = "edgecomp result"
_LARGEST = 256 << 20  # bytes
# What is a number of its own in `results_diff`, or belongs to no other run.
_LEFT_OUT = frozenset({
    "created", "command", "samples_us", "percentiles", "mean_us", "min_us", "max_us", "throughput_per_s", "num_samples",
    "load_us", "first_us", "warmup_runs", "loop_overhead_us", "host_peak_mib", "device_peak_mib", "load_average",
    "memory_available_gib", "layers", "blocks", "routing", "memory", "stages", "samples", "time_utc", "notes",
    # of a watch: what is of its own moment, and not of how the device is set
    "duration_s", "energy_mj", "total_energy_mj", "mean_power_mw", "counter_energy_mj", "other_cores", "stolen_cores",
    "sample_cost_us", "now_mhz", "temperatures_c", "temperature_c", "power_mw", "rails_mw", "utilization_percent",
    "memory_used_mib", "memory_available_mib", "ram_used_mib", "interval_ms", "unreadable", "reasons",
})  # fmt: skip
_LONGEST = 64  # entries of a list that is told


def results_list(folder: str | Path = RESULTS) -> tuple[ListedFile, ...]:
    """Return every JSON file below a folder, as what it is: a result, a comparison, a benchmark's table, or damaged.

    Raises:
        InvalidSpec: there is no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InvalidSpec(f"{root} is no folder; name the one that `edgecomp profile --out` writes results to")
    return tuple(_listed(path, path.relative_to(root).as_posix()) for path in sorted(root.rglob("*.json")))


def results_show(file: str | Path) -> Result:
    """Return a result.

    Raises:
        RunError: it cannot be read, is truncated or no result, or is of a newer schema.
    """
    return read_result(Path(file))


def results_diff(old: str | Path, new: str | Path) -> DiffReport:
    """Return in which fields two results differ, and by how much their numbers do, with intervals."""
    first, second = read_result(Path(old)), read_result(Path(new))
    pairs, gone, added = matched(first, second)
    numbers = [number for pair in pairs for number in _numbers(pair)]
    return DiffReport(str(old), str(new), tuple(_changed_fields(first, second)), tuple(numbers), gone, added)


def results_check(
    result: str | Path = "",
    *,
    baseline: str | Path,
    max_regression: str = "5%",
    metric: str = "p50",
    folder: str | Path = RESULTS,
    force: bool = False,
) -> CheckReport:
    """Hold a result to a baseline of the same model on the same machine.

    Args:
        result: the newer one; "": the newest below `folder` of the baseline's model and machine.
        baseline: the older one.
        max_regression: the share that may be lost, for example `5%`.
        metric: `p50`, `p90`, `p99`, `throughput` or `memory`.
        folder: where a result that is not named is looked for.
        force: also compare other models, machines and partly other graphs, and say so.

    Returns:
        the report; false where a graph is worse beyond noise, by the rule of `edgecomp.profiles.regression`.

    Raises:
        InvalidSpec: they cannot be compared, or hold no such metric. RunError: one cannot be read.
    """
    allowed = read_share(max_regression)
    if metric not in METRICS:
        raise UnknownName("metric", metric, METRICS)
    old = read_result(Path(baseline))
    path = Path(result) if str(result) else _newest(old, Path(baseline), Path(folder))
    new = read_result(path)
    differences = [
        f"different {what}: {', '.join(found)}"
        for what, found in (
            ("models", subject_differences(old.subject, new.subject)),
            ("machines", machine_differences(old.machine, new.machine)),
            ("targets", (f"{old.target} and {new.target}",) if old.target != new.target else ()),
        )
        if found
    ]
    pairs, gone, added = matched(old, new)
    set_otherwise = [
        difference
        for pair in pairs
        if pair.old.watch is not None and pair.new.watch is not None
        for difference in setting_differences(pair.old.watch.after, pair.new.watch.after)
    ]
    differences += [f"different settings of the device: {one}" for one in dict.fromkeys(set_otherwise)]
    if not pairs:
        raise InvalidSpec(f"{path} and {baseline} have no graph in common: {'; '.join(gone)} and {'; '.join(added)}")
    differences += [f"{name} is in the baseline alone, and was not checked" for name in gone]
    if differences and not force:
        raise InvalidSpec(
            f"{path} against {baseline}: {'; '.join(differences)}. --force checks what is common, and says so"
        )
    notes = [f"FORCED: {text}" for text in differences] + [f"{name} is new" for name in added]
    if versions := version_differences(old.machine, new.machine):
        notes.append(f"versions differ: {', '.join(versions)}")
    if old.subject.digest != new.subject.digest:
        notes.append(f"the model was exported again: {old.subject.digest[:12]} and {new.subject.digest[:12]}")
    notes += [
        f"{name}: {profile.model} is marked: {mark}"
        for name, one in ((baseline, old), (path, new))
        for profile in one.profiles
        for mark in profile.marks
    ]
    rows = tuple(judge_pair(pair, metric, allowed=allowed) for pair in pairs)
    return CheckReport(str(baseline), str(path), metric, allowed, rows, tuple(notes))


def _listed(path: Path, name: str) -> ListedFile:
    try:
        result = read_result(path)
    except RunError as error:
        return _other(path, name, str(error))
    subject, first = result.subject, result.profiles[0]
    words = (subject.name, subject.precision, "in", first.runner)
    return ListedFile(
        name,
        "result",
        " ".join(word for word in words if word),
        target=result.target,
        created=result.created,
        graphs=len(result.profiles),
        p50_ms=first.p50_us / 1000,
        state=result.state,
    )


def _other(path: Path, name: str, problem: str) -> ListedFile:
    """Return what a file is that is no result."""
    try:
        raw = msgspec.json.decode(path.read_bytes()) if path.stat().st_size <= _LARGEST else {"kind": _KIND}
    except (OSError, *JSON_ERRORS):
        return ListedFile(name, "damaged", problem)
    if not isinstance(raw, dict):
        return ListedFile(name, "other", "JSON, and not of edgecomp")
    if raw.get("kind") == _KIND:
        return ListedFile(name, "damaged", problem)
    created = str(raw.get("created", ""))
    if raw.get("kind") == COMPARISON_KIND:
        return ListedFile(name, "comparison", f"base {raw.get('base', 'unknown')}", created=created)
    if raw.get("kind") == METHODS_KIND:
        return ListedFile(name, "comparison", f"methods in {raw.get('backbone', 'unknown')}", created=created)
    if raw.get("kind") == "edgecomp search":
        return ListedFile(name, "search", str(raw.get("verdict", "")), created=created)
    if isinstance(raw.get("title"), str) and isinstance(raw.get("rows"), list):
        return ListedFile(name, "benchmark", f"{raw['title']}, {len(raw['rows'])} rows")
    return ListedFile(name, "other", "JSON, and not of edgecomp")


def _newest(old: Result, baseline: Path, folder: Path) -> Path:
    """Return the newest result of the baseline's model and machine."""
    found = []
    for path in sorted(folder.rglob("*.json")) if folder.is_dir() else ():
        if path.resolve() == baseline.resolve():
            continue
        try:
            one = read_result(path)
        except RunError:
            continue  # a benchmark's table, or damaged: `results list` shows which
        is_alike = not subject_differences(old.subject, one.subject) and not machine_differences(
            old.machine, one.machine
        )
        if is_alike and one.created >= old.created and matched(old, one)[0]:
            found.append((one.created, path))
    if not found:
        raise InvalidSpec(
            f"{folder} holds no newer result of {old.subject.name} on this machine, measured in the same way, besides "
            f"{baseline}; name one, or measure with `edgecomp profile --out {folder}`"
        )
    return max(found)[1]


def _numbers(pair: Pair) -> Iterator[ChangedNumber]:
    for metric in METRICS:
        try:
            row = judge_pair(pair, metric, allowed=0.0)
        except InvalidSpec:
            if metric != "memory":
                raise
            continue  # it was not read, which the files say themselves
        yield ChangedNumber(row.model, metric, row.old, row.new, row.change, row.ratio)


def _changed_fields(old: Result, new: Result) -> Iterator[ChangedField]:
    mine, theirs = (dict(_flat(msgspec.to_builtins(result), "")) for result in (old, new))
    for field in dict.fromkeys((*mine, *theirs)):
        one, other = mine.get(field, "none"), theirs.get(field, "none")
        if one != other:
            yield ChangedField(field, one, other)


def _flat(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield the fields of a document by their paths; entries of profiles by the name of their graph."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in _LEFT_OUT:
                yield from _flat(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple) and len(value) <= _LONGEST and any(isinstance(one, dict) for one in value):
        for place, inner in enumerate(value):
            name = inner.get("model") or inner.get("name") or inner.get("core", place)
            yield from _flat(inner, f"{path}[{name}]")
    elif isinstance(value, list | tuple):
        yield path, ", ".join(map(str, value[:_LONGEST])) or "none"
    else:
        yield path, "none" if value in ("", None) else str(value)
