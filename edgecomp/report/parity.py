"""The text that `edgecomp parity` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from edgecomp.parity import ChoiceParity, OutputParity, ParityReport
from edgecomp.report.text import table

__all__ = ["describe_parity"]

_TIE = "tie"
_VALUES = ["max abs", "max rel", "cosine mean", "cosine min", "PSNR dB", ""]


def describe_parity(
    report: ParityReport, *, explain: bool = False, per_layer: bool = False, bisect: bool = False
) -> str:
    """Return the text: each output's metrics, the thresholds, the verdict, and each miss with its element.

    Args:
        explain: tell the first choice that differs, or the closest call, with the scores of both sides.
        per_layer: show every module.
        bisect: say where an error begins, or that none does.
    """
    whose = "the PyTorch original" if report.against == "original" else report.against
    threads = f"{report.threads or 'its own choice of'} threads, " if report.runner.startswith("onnxruntime") else ""
    word = report.precision + (" emulated in fp32" if report.emulated else "")
    rows = [[row.model, row.case, row.output, *_values(row), _verdict(report, row)] for row in report.outputs]
    lines = [
        f"{report.bundle}: {report.version}, {threads}{word}, against {whose}",
        "",
        table(["model", "case", "output", *_VALUES], rows),
        "",
    ]
    for section in (_selection(report), _self_tests(report), _layers(report) if per_layer else []):
        lines += [*section, ""] if section else []
    lines += [f"thresholds: {_thresholds(report)}"]
    lines += [f"{model}: left out, torch runs no routers" for model in report.left_out]
    lines += _misses(report)
    if explain:
        lines += _explanation(report)
    if bisect and not report.culprits:
        compared = f"no module makes an error of its own: {len(report.layers)} compared"
        lines.append(compared if report.layers else "not shown: no module of these graphs can be compared by itself")
    lines += [str(culprit) for culprit in report.culprits]
    lines.append(f"verdict: {'pass' if report else 'FAIL'}")
    return "\n".join(lines)


def _values(row: OutputParity) -> list[str]:
    value = row.difference
    return [
        f"{value.max_abs:.2e}",
        f"{value.max_rel:.2e}",
        f"{value.cosine_mean:.9f}",
        f"{value.cosine_min:.9f}",
        f"{value.psnr:.1f}",
    ]


def _verdict(report: ParityReport, row: OutputParity) -> str:
    if row:
        return "pass"
    return _TIE if report.close_call(row) is not None else "FAIL"


def _thresholds(report: ParityReport) -> str:
    text = f"max rel {report.tolerance.max_rel:g}, cosine min {report.tolerance.min_cosine}"
    for name, values in (("atol", report.limits.atol), ("rtol", report.limits.rtol)):
        text += "".join(f", {name} {value:g} for {output or 'all others'}" for output, value in values.items())
    return text


def _selection(report: ParityReport) -> list[str]:
    """Return the two tables of choices: values with the original's forced, and agreement layer by layer."""
    lines: list[str] = []
    parts = [part for part in report.selection if part.choices]
    if parts:
        forced = [
            [row.model, row.case, row.output, *_values(row), "pass" if row else "FAIL"]
            for part in parts
            for row in part.forced
        ]
        lines += ["with the original's choices forced:", "", table(["model", "case", "output", *_VALUES], forced), ""]
        choices = [
            [
                row.model,
                row.case,
                row.where,
                row.kind,
                f"{row.agreement:.3f}",
                row.flips,
                "none" if row.margin is None else f"{row.margin:.2e}",
                f"{row.noise:.2e}",
                f"{row.score_error:.2e}",
                row.verdict,
            ]
            for part in parts
            for row in part.choices
        ]
        header = ["model", "case", "layer", "kind", "Jaccard", "flips", "margin", "noise", "score error", ""]
        lines += ["choices, each on the rows that the original had:", "", table(header, choices)]
    for part in report.selection:
        if not part.choices:
            lines.append(f"{part.model} chooses no tokens by a score: nothing to force")
    return lines


def _self_tests(report: ParityReport) -> list[str]:
    if not report.self_tests:
        return []
    rows = [
        [one.model, one.test, one.detail, "" if one.is_not_shown else "pass" if one else "FAIL"]
        for one in report.self_tests
    ]
    return ["against itself:", "", table(["model", "test", "what", ""], rows)]


def _layers(report: ParityReport) -> list[str]:
    rows = [
        [
            layer.model,
            layer.case,
            layer.module,
            f"{layer.input_error:.2e}",
            f"{layer.local:.2e}",
            f"{layer.error:.2e}",
            f"{layer.cosine:.9f}",
        ]
        for layer in report.layers
    ]
    header = ["model", "case", "module", "error read", "of its own", "error given", "cosine min"]
    return ["module by module, over the largest magnitude of the original:", "", table(header, rows)]


def _misses(report: ParityReport) -> Iterator[str]:
    for row in report.outputs:
        close = report.close_call(row) if not row else None
        if close is not None:
            yield (
                f"{row.model}, {row.case}, {row.output}: its values are judged with the choices forced, and not here, "
                f"since rounding may decide a choice in {close.where} (choice {close.number})"
            )
            continue
        yield from (f"{row.model}, {row.case}, {row.output}: {failure}" for failure in row.failures)
    for part in report.selection:
        for forced in part.forced:
            yield from (
                f"{forced.model}, {forced.case}, {forced.output}, choices forced: {failure}"
                for failure in forced.failures
            )
        for choice in part.choices:
            yield from (f"{choice.model}, {choice.case}, {choice.where}: {failure}" for failure in choice.failures)
    for test in report.self_tests:
        yield from (f"{test.model}, {test.test}: {failure}" for failure in test.failures)


def _explanation(report: ParityReport) -> list[str]:
    """Return the first choice that went another way; where none did, the closest call."""
    choices = [choice for part in report.selection for choice in part.choices]
    if not choices:
        return ["first divergence: none; no graph chooses tokens by a score"]
    flipped = [choice for choice in choices if choice.worst is not None]
    if flipped:
        lines = ["first divergence in each case:"]
        firsts: dict[tuple[str, str], ChoiceParity] = {}
        for choice in flipped:
            firsts.setdefault((choice.model, choice.case), choice)
        return lines + [
            f"  {one.model}, {one.case}, {one.where} ({one.kind}, choice {one.number}): {one.worst}: {one.verdict}"
            for one in firsts.values()
        ]
    closest = _closest(choices)
    if closest is None:
        return [f"first divergence: none; all {len(choices)} choices agree"]
    where = f"{closest.model}, {closest.case}, {closest.where}"
    return [
        f"first divergence: none; all {len(choices)} choices agree",
        f"closest call: {where}: margin {closest.margin:.3g}, noise {closest.noise:.3g}",
    ]


def _closest(choices: Sequence[ChoiceParity]) -> ChoiceParity | None:
    with_margin = [choice for choice in choices if choice.margin is not None]
    return min(with_margin, key=lambda choice: (choice.margin or 0.0) / (choice.noise or 1.0), default=None)
