"""A search in words: the verdict, the front, what was left out and why; and what a search would look at."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from edgecomp.report.text import table
from edgecomp.search.result import Figure, Limits, Row, SearchResult
from edgecomp.search.space import Subject

__all__ = ["SearchPlan", "describe_plan", "describe_search"]


class SearchPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a search would look at, before anything is exported.

    Attributes:
        subject, limits: what is searched.
        first: candidates that are looked at first, beside the uncompressed model.
        candidates: all of them.
        baselines, refused_baselines: what is measured beside the winner, and what cannot be, with the reason.
        least, most: measurements: where the uncompressed model meets the limits, and where all are looked at.
        duration_s: of one.
        hosts: that share them.
    """

    subject: Subject
    limits: Limits
    first: tuple[str, ...]
    candidates: tuple[str, ...]
    baselines: tuple[str, ...]
    refused_baselines: tuple[tuple[str, str], ...]
    least: int
    most: int
    duration_s: float
    hosts: int


def describe_plan(plan: SearchPlan) -> str:
    """Return the text of a dry run."""
    subject, each = plan.subject, plan.duration_s / plan.hosts
    return "\n".join(
        [
            f"{subject.method}, preset {subject.preset}, {subject.placement} {subject.backbone}",
            f"  tokens     {subject.tokens_in} in; {subject.rule} can be kept",
            f"  limits     {_limits(plan.limits)}",
            f"  first      {', '.join(plan.first)}",
            f"  all        {len(plan.candidates)} candidates: {', '.join(plan.candidates)}",
            f"  baselines  {', '.join(plan.baselines) or 'none'}",
            *(f"             {name} is left out: {why}" for name, why in plan.refused_baselines),
            f"  measuring  {plan.least} to {plan.most} times {plan.duration_s:g} s"
            + (f" on {plan.hosts} hosts" if plan.hosts > 1 else "")
            + f": {_minutes(plan.least * each)} to {_minutes(plan.most * each)}",
            "             exports and comparing come on top; they take about as long again for a ViT-S at 30 s each",
        ]
    )


def describe_search(report: SearchResult) -> str:
    """Return the text: the verdict first."""
    subject = f"{report.method}, preset {report.preset}" + (f", {report.backbone}" if report.backbone != "none" else "")
    machine = f" ({report.machine.cpu}, {report.machine.cores} cores)" if report.machine is not None else ""
    how = "times are estimates"
    if report.machine is not None:
        threads = "1 thread" if report.threads == 1 else f"{report.threads or 'its own choice of'} threads"
        how = f"{report.duration_s:g} s each in {report.runner}, {threads}"
    shown = [row for row in report.rows if row.latency_us is not None]
    skipped: dict[tuple[str, str], list[str]] = {}
    for row in report.rows:
        if row.state == "skipped":
            family = " ".join(filter(None, [row.method, row.schedule, row.precision]))
            skipped.setdefault((family, row.why), []).append(f"m{row.tokens_out}")
    return "\n".join(
        [
            report.verdict,
            f"  searched   {subject}; batch {report.batch}; {how}",
            f"  on         {report.target}{machine}",
            f"  limits     {_limits(report.limits)}",
            f"  agreement  {report.agreement_of}",
            "",
            table(["candidate", "kept", "p50 ms", "", "p99 ms", "agreement", "limits", "front"], _rows(shown)),
            "~ indicative: so few samples do not carry this percentile; in brackets 95 % intervals",
            "",
            *(f"  left out   {family} {', '.join(names)}: {why}" for (family, why), names in skipped.items()),
            *(f"  refused    {row.name}: {row.why}" for row in report.rows if row.state == "refused"),
            *(f"  precision  {one.precision} {one.verdict}: {one.why}" for one in report.precisions),
            f"  time       {report.measuring_s:.1f} s of measuring, {report.total_s:.1f} s in all"
            + (f" ({report.total_s / report.measuring_s:.2f}x)" if report.measuring_s else ""),
            *(f"  note       {note}" for note in report.notes),
            *([f"  next       edgecomp export --recipe {report.folder}/{report.recipe}"] if report.recipe else []),
        ]
    )


def _rows(rows: Sequence[Row]) -> list[list[str]]:
    found = []
    for row in rows:
        measured, agreement = row.measured, row.agreement
        if measured is None:
            continue
        known = f"{agreement.value:.4f}" if agreement is not None else "unknown"
        if agreement is not None and agreement.low is not None and agreement.high is not None:
            known += f" ({agreement.low:.4f} to {agreement.high:.4f})"
        found.append(
            [
                row.name + (" (baseline)" if row.role == "baseline" else ""),
                str(row.tokens_out),
                f"{measured.p50_us.value / 1000:.3f}",
                _interval(measured.p50_us),
                _ms(measured.p99_us),
                known,
                "meets" if row.meets else "; ".join(row.misses),
                ("front" if row.state == "front" else f"behind {', '.join(row.by[:2])}" if row.by else row.state)
                + (f"; {measured.note}" if measured.note else ""),
            ]
        )
    return found


def _interval(figure: Figure) -> str:
    ends = [f"{end / 1000:.3f}" if end is not None else "?" for end in (figure.low, figure.high)]
    return f"({ends[0]} to {ends[1]})"


def _ms(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    return f"{figure.value / 1000:.3f}{'~' if figure.is_indicative else ''}"


def _limits(limits: Limits) -> str:
    words = [
        f"p50 at most {limits.max_p50_ms:g} ms" if limits.max_p50_ms is not None else "",
        f"p99 at most {limits.max_p99_ms:g} ms" if limits.max_p99_ms is not None else "",
        f"energy at most {limits.max_energy_mj:g} mJ" if limits.max_energy_mj is not None else "",
        f"agreement at least {limits.min_agreement:g}" if limits.min_agreement is not None else "",
    ]
    return ", ".join(filter(None, words)) + "; a time by the upper end of its 95 % interval"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
