"""A report as text for a terminal, as Markdown, and its measurements as CSV; none needs a package of its own."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator

from edgecomp.report.evaluate import EvaluationReport
from edgecomp.report.page.groups import Entry, group_results
from edgecomp.report.page.numbers import INDICATIVE, ratio_of
from edgecomp.report.page.sources import Source
from edgecomp.report.page.values import Cell, Page, Section, Table
from edgecomp.report.page.words import csv_cell, markdown
from edgecomp.report.text import table

__all__ = ["CSV_MARKER", "MARKDOWN_MARKER", "render_csv", "render_markdown", "render_text"]

MARKDOWN_MARKER = "<!-- edgecomp report -->"
CSV_MARKER = "edgecomp_row,file,group,"

_PERCENTILES = ("p50", "p90", "p95", "p99", "p99.9")


def render_text(page: Page) -> str:
    """Return what the page says, without plots, in lines for a terminal."""
    lines = [page.title, *page.lead]
    for section in page.sections:
        lines += ["", section.title, "=" * len(section.title), *_text(section)]
    return "\n".join([*lines, *(["", *page.absent] if page.absent else [])])


def _text(section: Section) -> Iterator[str]:
    yield from section.lines
    for one in section.tables:
        yield ""
        yield one.caption
        yield ""
        yield table([column.name for column in one.columns], [[_said(cell) for cell in row] for row in one.rows])
        yield from one.foot
    for picture in section.pictures:
        yield f"{picture.title}. {picture.alt}"
    for part in section.parts:
        yield ""
        yield part.title
        yield "-" * len(part.title)
        yield from _text(part)


def _said(cell: Cell) -> str:
    """Return a cell in one line: number, marks, interval."""
    text = cell.text + ("~" if INDICATIVE in cell.marks else "")
    marks = ", ".join(mark for mark in cell.marks if mark not in (INDICATIVE, cell.text))
    return text + (f" {marks}" if marks else "") + (f" ({cell.note})" if cell.note else "")


def render_markdown(page: Page) -> str:
    """Return the page in GitHub's Markdown, without plots; every text from a file is escaped."""
    lines = [MARKDOWN_MARKER, f"# {markdown(page.title)}", ""]
    lines += [f"{markdown(line)}  " for line in page.lead]
    for section in page.sections:
        lines += _markdown(section, 2)
    if page.absent:
        lines += ["", "## What these results do not hold", "", *(f"* {line}" for line in page.absent)]
    return "\n".join(lines).rstrip() + "\n"


def _markdown(section: Section, level: int) -> Iterator[str]:
    yield from ("", f"{'#' * level} {markdown(section.title)}", "")
    yield from (f"{markdown(line)}  " for line in section.lines)
    for one in section.tables:
        yield from ("", f"**{markdown(one.caption)}**", "")
        yield from _markdown_table(one)
        yield from ("", *(f"{markdown(line)}  " for line in one.foot))
    yield from (f"{markdown(picture.title)}. {markdown(picture.alt)}  " for picture in section.pictures)
    for part in section.parts:
        yield from _markdown(part, level + 1)


def _markdown_table(one: Table) -> Iterator[str]:
    yield f"| {' | '.join(markdown(column.name) for column in one.columns)} |"
    yield f"|{'|'.join('---:' if column.is_number else '---' for column in one.columns)}|"
    for row in one.rows:
        yield f"| {' | '.join(markdown(_said(cell)) for cell in row)} |"


def render_csv(sources: Iterable[Source]) -> str:
    """Return a row for each graph that was measured; a text that a spreadsheet would take for a formula is quoted.

    Numbers are plain, in the unit that their column names; what is not known is empty.
    """
    sources = tuple(sources)
    out = io.StringIO()
    heads = [*CSV_MARKER.rstrip(",").split(","), *_COLUMNS]
    for name in _PERCENTILES:
        heads += [f"{name}_ms", f"{name}_low_ms", f"{name}_high_ms", f"{name}_mark"]
    writer = csv.DictWriter(out, heads, restval="", lineterminator="\n")
    writer.writeheader()
    for place, group in enumerate(group_results(sources), 1):
        for entry in group.entries:
            writer.writerow({key: _cell(value) for key, value in _measured(entry, place).items()})
    for source in sources:
        if isinstance(source.value, EvaluationReport):
            for row in _evaluated(source.name, source.value):
                writer.writerow({key: _cell(value) for key, value in row.items()})
    return out.getvalue()


_COLUMNS = (
    "subject", "digest", "method", "preset", "backbone", "image_size", "model", "role", "tokens_in", "tokens_kept",
    "precision", "flops", "batch", "runner", "threads", "mode", "streams", "cuda_graph", "target", "cpu", "cores",
    "gpu", "governor", "measured", "stability", "samples", "mean_ms", "min_ms", "max_ms", "items_per_s",
    "time_over_plain", "time_over_plain_low", "time_over_plain_high", "load_ms", "first_ms", "loop_overhead_us",
    "host_peak_mib", "device_peak_mib", "top1_percent", "agreement_percent", "drop_points",
    "ms_per_image", "ms_per_image_low", "ms_per_image_high",
)  # fmt: skip


def _measured(entry: Entry, group: int) -> dict[str, object]:
    result, profile = entry.result, entry.profile
    subject, machine = result.subject, result.machine
    row: dict[str, object] = {
        "edgecomp_row": "profile",
        "file": entry.file,
        "group": group,
        **_of(subject, ("digest", "method", "preset", "backbone", "image_size")),
        "subject": subject.name,
        **_of(profile, ("model", "role", "tokens_in", "flops", "batch", "runner", "threads", "mode", "streams")),
        "tokens_kept": profile.tokens_out,
        "precision": profile.precision or subject.precision,
        "cuda_graph": {None: "", True: "yes", False: "no"}[profile.cuda_graph],
        "target": result.target,
        **_of(machine, ("cpu", "cores", "gpu", "governor")),
        "measured": result.created,
        "stability": f"unstable: {'; '.join(entry.reasons)}" if entry.reasons else "",
        "samples": profile.num_samples,
        **{name: _ms(getattr(profile, name.replace("_ms", "_us"))) for name in ("mean_ms", "min_ms", "max_ms")},
        "items_per_s": profile.throughput_per_s,
        "load_ms": _ms(profile.load_us),
        "first_ms": _ms(profile.first_us),
        **_of(profile, ("loop_overhead_us", "host_peak_mib", "device_peak_mib")),
    }
    if entry.plain is not None and entry.plain.p50_us:
        names = ("time_over_plain", "time_over_plain_low", "time_over_plain_high")
        row |= zip(names, ratio_of(profile, entry.plain), strict=True)
    for name in _PERCENTILES:
        one = profile.percentiles.get(name)
        if one is not None:
            marks = [*([INDICATIVE] if one.is_indicative else []), *entry.marks]
            row |= {f"{name}_ms": _ms(one.us), f"{name}_low_ms": _ms(one.low_us), f"{name}_high_ms": _ms(one.high_us)}
            row[f"{name}_mark"] = "; ".join(marks)
    return row


def _evaluated(file: str, report: EvaluationReport) -> Iterator[dict[str, object]]:
    for score in report.evaluation.scores:
        compared = score.against_plain
        row: dict[str, object] = {
            "edgecomp_row": "evaluate",
            "file": file,
            "subject": report.bundle,
            "model": score.model,
            "role": "plain" if score.model == report.plain else "",
            "tokens_kept": report.kept.get(score.model),
            "flops": report.flops.get(score.model),
            "batch": report.evaluation.batch,
            "runner": report.version,
            "threads": report.threads,
            **_of(report.machine, ("cpu", "cores", "gpu", "governor")),
            "samples": len(score.run_ms),
            "ms_per_image": score.ms_per_image.value,
            "ms_per_image_low": score.ms_per_image.low,
            "ms_per_image_high": score.ms_per_image.high,
            "top1_percent": 100 * score.top1.value,
        }
        if compared is not None:
            ratio = compared.time_ratio
            row |= {
                "time_over_plain": ratio.value,
                "time_over_plain_low": ratio.low,
                "time_over_plain_high": ratio.high,
            }
            row |= {"agreement_percent": 100 * compared.agreement.value, "drop_points": 100 * compared.drop.value}
        yield row


def _of(value: object, names: tuple[str, ...]) -> dict[str, object]:
    return {name: getattr(value, name) for name in names}


def _ms(us: float | None) -> float | None:
    return None if us is None else us / 1000


def _cell(value: object) -> object:
    if isinstance(value, str):
        return csv_cell(value)
    if isinstance(value, float):
        return f"{value:.9g}"
    return "" if value is None else value
