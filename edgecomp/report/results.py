"""What `edgecomp results` finds in result files: the values, and the texts that its verbs print."""

from __future__ import annotations

from typing import Literal

import msgspec

from edgecomp.profiles.ratios import Ratio
from edgecomp.profiles.regression import Metric, Regression
from edgecomp.report.compare import describe_interval
from edgecomp.report.text import table

__all__ = [
    "ChangedField",
    "ChangedNumber",
    "CheckReport",
    "DiffReport",
    "ListedFile",
    "describe_check",
    "describe_diff",
    "describe_list",
]

_UNITS: dict[str, str] = {**dict.fromkeys(("p50", "p90", "p99"), "ms"), "throughput": "items/s", "memory": "MiB"}


class ListedFile(msgspec.Struct, frozen=True):
    """A JSON file among results.

    Attributes:
        kind: `result`, `comparison`, `search`, `benchmark` (a table of `benchmarks/`), `other`, or `damaged`.
        what: subject and runner of a result, a benchmark's title, or what is wrong.
        created: "" where the file does not say.
        graphs: profiles in it.
        p50_ms: of the first of them; none of what is no result.
        state: `unstable` where a number carries a mark against it, `unknown` where clocks could not be read, else
            `stable`; "" of what is no result.
    """

    path: str
    kind: Literal["result", "comparison", "search", "benchmark", "other", "damaged"]
    what: str
    target: str = ""
    created: str = ""
    graphs: int = 0
    p50_ms: float | None = None
    state: Literal["", "stable", "unstable", "unknown"] = ""


class ChangedField(msgspec.Struct, frozen=True):
    """A field that differs, by its path in the file: `machine.versions.numpy`."""

    field: str
    old: str
    new: str


class ChangedNumber(msgspec.Struct, frozen=True):
    """A metric of a graph that both results have."""

    model: str
    metric: Metric
    old: float
    new: float
    change: float
    ratio: Ratio | None


class DiffReport(msgspec.Struct, frozen=True):
    """What differs between two results.

    Attributes:
        fields: of model, machine, versions, conditions and device state.
        numbers: of the graphs that both have.
        gone, added: graphs that only the first, or only the second, has.
    """

    old: str
    new: str
    fields: tuple[ChangedField, ...]
    numbers: tuple[ChangedNumber, ...]
    gone: tuple[str, ...]
    added: tuple[str, ...]


class CheckReport(msgspec.Struct, frozen=True):
    """Whether a result is worse than its baseline by more than is allowed; `bool(report)` is the verdict."""

    baseline: str
    result: str
    metric: Metric
    allowed: float
    rows: tuple[Regression, ...]
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return all(self.rows)


def describe_list(rows: tuple[ListedFile, ...], folder: str) -> str:
    """Return the table of files."""
    if not rows:
        return f"{folder}: no JSON files"
    header = ["file", "kind", "target", "created", "graphs", "p50 ms", "", "what"]
    return table(header, [_listed(row) for row in rows])


def _listed(row: ListedFile) -> list[object]:
    p50 = "-" if row.p50_ms is None else f"{row.p50_ms:.3f}"
    mark = {"unstable": "unstable", "unknown": "clocks unknown"}.get(row.state, "")
    return [row.path, row.kind, row.target or "-", row.created or "-", row.graphs or "-", p50, mark, row.what]


def describe_diff(report: DiffReport) -> str:
    """Return what differs, fields first."""
    lines = [f"{report.old} and {report.new}"]
    if report.fields:
        lines += ["", table(["field", "old", "new"], [[one.field, one.old, one.new] for one in report.fields])]
    else:
        lines.append("model, machine, versions and conditions are the same")
    if report.numbers:
        rows = [
            [
                one.model,
                one.metric,
                _value(one.old),
                _value(one.new),
                _UNITS[one.metric],
                *_change(one.change, one.ratio),
            ]
            for one in report.numbers
        ]
        lines += ["", table(["model", "metric", "old", "new", "unit", "worse by", "95 %", ""], rows)]
    lines += [f"in the first alone: {name}" for name in report.gone]
    lines += [f"in the second alone: {name}" for name in report.added]
    if report.numbers:
        lines.append("not interleaved: other machine state possible; above 1 is worse, throughput counted upside down")
    return "\n".join(lines)


def describe_check(report: CheckReport) -> str:
    """Return a row for each graph, notes, and the verdict."""
    rows = [
        [
            row.model,
            row.batch,
            _value(row.old),
            _value(row.new),
            *_change(row.change, row.ratio)[:2],
            row.verdict,
            row.why,
        ]
        for row in report.rows
    ]
    unit = _UNITS[report.metric]
    header = ["model", "batch", f"old {unit}", f"new {unit}", "worse by", "95 %", "", "why"]
    lines = [f"{report.result} against {report.baseline}: {report.metric}", "", table(header, rows), ""]
    lines += [f"note: {note}" for note in report.notes]
    failed = sum(not row for row in report.rows)
    verdict = "pass" if report else f"FAIL: {failed} of {len(report.rows)} worse"
    lines.append(f"verdict: {verdict} (at most {100 * report.allowed:g} % may be lost)")
    return "\n".join(lines)


def _value(number: float) -> str:
    return f"{number:.3f}" if number < 1000 else f"{number:.1f}"


def _change(change: float, ratio: Ratio | None) -> list[str]:
    """Return a ratio as three cells; the third says which way, where noise allows to tell."""
    if ratio is None:
        return [f"{change:.3f}x", "no interval", ""]
    words = {"faster": "better", "slower": "worse"}
    return [f"{change:.3f}x", describe_interval(ratio), words.get(ratio.pace, ratio.pace)]
