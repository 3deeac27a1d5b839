"""Under which conditions each file was measured, and what stands against its numbers."""

from __future__ import annotations

from collections.abc import Sequence

from edgecomp.profiles.comparison import Comparison
from edgecomp.profiles.machine import Machine
from edgecomp.profiles.result import Result
from edgecomp.report.calibrate import CalibrationReport
from edgecomp.report.estimate import EstimateReport
from edgecomp.report.methods import MethodsReport
from edgecomp.report.page.device import device_table
from edgecomp.report.page.groups import graph_label, reasons_of
from edgecomp.report.page.numbers import word
from edgecomp.report.page.sources import Source
from edgecomp.report.page.values import Cell, Column, Section, Table
from edgecomp.report.page.words import joined, shown, slug
from edgecomp.search.result import SearchResult

__all__ = ["conditions_section"]


def conditions_section(sources: Sequence[Source], slugs: set[str]) -> Section | None:
    """Return machine, versions, state and stability of each file; None where no file says any."""
    rows: list[tuple[Cell, ...]] = []
    commands: list[tuple[Cell, ...]] = []
    notes: list[str] = []
    for source in sources:
        value = source.value
        if isinstance(value, CalibrationReport | EstimateReport) or value.machine is None:
            continue
        rows.append((word(source.name), *_measured(value), *_machine(value.machine)))
        if isinstance(value, Comparison):
            command = word(shown(" ".join(value.command), longest=300))
            names = word(joined(*(one.name for one in value.contestants[:4])))
            commands.append((word(source.name), command, names, word("\u2013"), word("\u2013")))
        if isinstance(value, SearchResult):
            command = word(shown(" ".join(value.command), longest=300))
            method = joined(value.method, value.preset, value.backbone)
            commands.append((word(source.name), command, word(method), word("unknown"), word("\u2013")))
        if isinstance(value, Result):
            commands.append((word(source.name), word(shown(" ".join(value.command), longest=300)), *_subject(value)))
            notes += [f"{source.name}: {shown(note)}" for note in value.notes]
            notes += [
                f"{source.name}: {shown(model)} runs its matrix products in "
                + ", ".join(f"{shown(dtype)} ({count})" for dtype, count in products.items())
                for model, products in value.types.items()
            ]
    if not rows:
        return None
    columns = ("File", "Measured", "Stability", "Machine", "Governor, load", "Memory", "System", "Versions")
    tables = [Table("Machine and state of each file", tuple(map(Column, columns)), tuple(rows))]
    watched = device_table(sources)
    tables += [watched] if watched is not None else []
    if commands:
        heads = ("File", "Command that repeats it", "Method", "Weights", "Digest")
        tables.append(Table("What was measured", tuple(map(Column, heads)), tuple(commands)))
    return Section(
        slug=slug("conditions", slugs),
        title="Conditions",
        lines=tuple(dict.fromkeys(notes)),
        tables=tuple(tables),
    )


def _measured(value: object) -> tuple[Cell, ...]:
    if isinstance(value, SearchResult | Comparison | MethodsReport):
        return (word(shown(value.created), f"edgecomp {shown(value.edgecomp)}"), word("see its table"))
    if not isinstance(value, Result):
        return (Cell("unknown"), Cell("unknown"))
    shaky = [f"{graph_label(one)}: {'; '.join(reasons_of(one))}" for one in value.profiles if reasons_of(one)]
    verdict = Cell("", note=". ".join(shaky), marks=("unstable",))
    if not shaky:
        verdicts = {one.stability.verdict if one.stability is not None else "not watched" for one in value.profiles}
        verdict = Cell(", ".join(sorted(verdicts)))
    return (word(shown(value.created), f"edgecomp {shown(value.edgecomp)}"), verdict)


def _machine(machine: Machine) -> tuple[Cell, ...]:
    cores = f"{machine.cores} core{'s' if machine.cores != 1 else ''}"
    load = ", ".join(f"{load:.2f}" for load in machine.load_average) or "unknown"
    memory = f"{machine.memory_gib:g} GiB" if machine.memory_gib else "unknown"
    free = f"{machine.memory_available_gib:g} GiB free" if machine.memory_available_gib else ""
    gpu = f"{shown(machine.gpu)}, driver {shown(machine.gpu_driver)}" if machine.gpu else ""
    versions = ", ".join(f"{shown(name)} {shown(version)}" for name, version in machine.versions.items())
    return (
        word(joined(machine.cpu, cores), gpu),
        word(shown(machine.governor), f"load {load}"),
        word(memory, free),
        word(shown(machine.os), shown(machine.python)),
        word(versions or "unknown"),
    )


def _subject(result: Result) -> tuple[Cell, ...]:
    subject = result.subject
    method = joined(subject.method, subject.preset, subject.backbone, subject.precision) or shown(subject.name)
    return (
        word(method, shown(subject.name)),
        word(shown(subject.weights) or "unknown"),
        word(shown(subject.digest)[:12]),
    )
