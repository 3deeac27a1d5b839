"""Which measurements may stand beside each other: same model, same machine, same runner, same mode.

What differs in one of these stands in a group of its own, under a heading that says it, and no ratio is formed between
groups. Within a group a ratio is formed in one run alone: a time from another run of the same machine is no measure,
because machines drift between runs by more than most gains.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from edgecomp.profiles.latency import LatencyProfile
from edgecomp.profiles.machine import Machine
from edgecomp.profiles.result import Result, Subject
from edgecomp.report.page.sources import Source
from edgecomp.report.page.values import Role
from edgecomp.report.page.words import joined, shown

__all__ = ["Entry", "Group", "graph_label", "group_results", "machine_label", "threads_label"]

_PARTS = ("stem", "router")
SETTLED = "unstable"


class Entry(msgspec.Struct, frozen=True):
    """One graph in one mode, with what a page says of it.

    Attributes:
        file: name of the result's file.
        label: what tells it from the others of its group.
        role: `plain`, `part` (a stem or a router alone) or `method`.
        plain: the plain model of the same run, batch and mode; None where there is none, and for itself and for parts.
        reasons: why its numbers are not stable; empty where they are.
    """

    file: str
    result: Result
    profile: LatencyProfile
    label: str
    role: Role
    plain: LatencyProfile | None
    reasons: tuple[str, ...]

    @property
    def marks(self) -> tuple[str, ...]:
        """The marks that each of its times carries."""
        return (SETTLED,) if self.reasons else ()


class Group(msgspec.Struct, frozen=True):
    """Entries that may be compared, and what they have in common, in words."""

    title: str
    lines: tuple[str, ...]
    entries: tuple[Entry, ...]

    @property
    def results(self) -> tuple[tuple[str, Result], ...]:
        """The results of the entries, each once, with their files' names."""
        return tuple({entry.file: (entry.file, entry.result) for entry in self.entries}.values())


def group_results(sources: Iterable[Source]) -> tuple[Group, ...]:
    """Return the groups in order of their titles."""
    found: dict[tuple[object, ...], list[tuple[str, Result, LatencyProfile]]] = {}
    for source in sources:
        if isinstance(source.value, Result):
            for profile in source.value.profiles:
                found.setdefault(_key(source.value, profile), []).append((source.name, source.value, profile))
    groups = [_group(rows) for rows in found.values()]
    return tuple(sorted(groups, key=lambda group: (group.title, group.lines)))


def graph_label(profile: LatencyProfile) -> str:
    """Return what a graph is, in a word or two."""
    if profile.role in (*_PARTS, "plain"):
        return profile.role
    if profile.tokens_out:
        return f"{profile.tokens_out} of {profile.tokens_in} kept"
    return shown(profile.model)


def threads_label(threads: int) -> str:
    """Return how many threads, in words."""
    return "1 thread" if threads == 1 else f"{threads or 'its own choice of'} threads"


def machine_label(machine: Machine) -> str:
    """Return a machine in a few words."""
    cores = f"{machine.cores} core{'s' if machine.cores != 1 else ''}"
    return joined(machine.gpu, machine.cpu, cores)


def reasons_of(profile: LatencyProfile) -> tuple[str, ...]:
    """Return why a profile's numbers are not to be believed as they stand."""
    return tuple(shown(mark.removeprefix("unstable: ")) for mark in profile.marks)


def _key(result: Result, profile: LatencyProfile) -> tuple[object, ...]:
    machine, subject = result.machine, result.subject
    where = (machine.cpu, machine.cores, machine.gpu, machine.gpu_driver, machine.governor, result.target)
    how = (profile.runner, profile.threads, profile.mode, profile.streams, profile.cuda_graph)
    return (_host(subject), subject.image_size, *where, *how)


def _host(subject: Subject) -> str:
    """Return the model that was compressed: results of one host are comparable whatever the method."""
    if subject.backbone not in ("", "none"):
        return subject.backbone
    return f"{subject.method} {subject.preset}".strip() or subject.name


def _group(rows: Sequence[tuple[str, Result, LatencyProfile]]) -> Group:
    _, result, profile = rows[0]
    machine, pixels = result.machine, result.subject.image_size
    labels = _labels(rows)
    entries = [
        Entry(
            file=file,
            result=of,
            profile=one,
            label=label,
            role="plain" if one.role == "plain" else "part" if one.role in _PARTS else "method",
            plain=_plain(of, one),
            reasons=reasons_of(one),
        )
        for (file, of, one), label in zip(rows, labels, strict=True)
    ]
    mode = profile.mode if profile.streams == 1 else f"{profile.mode} with {profile.streams} streams"
    graph = {None: "", True: "CUDA graph", False: "no CUDA graph"}[profile.cuda_graph]
    model = joined(_host(result.subject), f"{pixels} pixels" if pixels else "")
    title = f"{model}; {shown(machine.gpu or machine.cpu)}; {shown(profile.runner)}"
    return Group(
        title=f"{title}; {mode}",
        lines=(
            f"Model: {model}.",
            f"Machine: {machine_label(machine)}; governor {shown(machine.governor)}; target {shown(result.target)}.",
            f"Run by {joined(profile.runner, threads_label(profile.threads), mode, graph)}.",
        ),
        entries=tuple(sorted(entries, key=lambda e: (e.profile.batch, e.role == "part", e.file, e.role != "plain"))),
    )


def _plain(result: Result, profile: LatencyProfile) -> LatencyProfile | None:
    """Return what a profile may be divided by: of the same file, batch and settings."""
    if profile.role in ("plain", *_PARTS):
        return None
    same = ("batch", "mode", "streams", "runner", "threads", "cuda_graph")
    alike = (
        one
        for one in result.profiles
        if one.role == "plain" and all(getattr(one, name) == getattr(profile, name) for name in same)
    )
    return next(alike, None)


def _labels(rows: Sequence[tuple[str, Result, LatencyProfile]]) -> list[str]:
    """Return a label for each row that no other has: as short as that allows."""
    subjects = {result.subject.name for _, result, _ in rows}
    batches = {profile.batch for _, _, profile in rows}
    labels = []
    for _, result, profile in rows:
        subject = f"{shown(result.subject.name, longest=48)}: " if len(subjects) > 1 else ""
        batch = f", batch {profile.batch}" if len(batches) > 1 else ""
        labels.append(f"{subject}{graph_label(profile)}{batch}")
    for told in (
        [profile.precision or result.subject.precision for _, result, profile in rows],
        [file for file, _, _ in rows],
        [profile.model for _, _, profile in rows],
    ):
        for label in dict.fromkeys(label for label in labels if labels.count(label) > 1):
            places = [place for place, other in enumerate(labels) if other == label]
            if len({told[place] for place in places}) > 1:
                for place in places:
                    labels[place] += f" ({shown(told[place], longest=48) or 'unknown'})"
    seen: dict[str, int] = {}
    for place, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        labels[place] = label if seen[label] == 1 else f"{label} #{seen[label]}"
    return labels
