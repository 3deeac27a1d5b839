"""Accuracy and latency of token mergers inside the small vision transformer, on Fashion-MNIST's test images.

    python examples/fashion_mnist/table.py --data /usr/share/datasets/fashion-mnist [--methods tome pitome tofu]

For each method: one bundle with a bucket for each r (tokens that each of the six blocks removes) and the plain model,
exported with `api.export`, then `api.evaluate` on all images at each batch size. Nothing is retrained. Needs
`pip install '.[cpu]'` and the data (Debian's package dataset-fashion-mnist).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from host import load_host

from edgecomp import api
from edgecomp.evaluation import Estimate
from edgecomp.report.evaluate import EvaluationReport

_TOKENS, _BLOCKS = 49, 6
_BEGIN, _END = "<!-- table.py writes from here -->", "<!-- to here -->"
_VERDICT = {"faster": "pays", "slower": "**does not pay**", "no difference": "no gain measured"}


def main() -> None:
    """Export, evaluate, print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the IDX files")
    parser.add_argument("--methods", nargs="+", default=["tome"], help="mergers; `edgecomp list methods` shows them")
    parser.add_argument("--r", nargs="+", type=int, default=[2, 4, 6, 8], help="tokens that each block removes")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=int, default=None, help="so many images; default: all")
    parser.add_argument("--write", type=Path, default=None, help="put the table between the marks of this file")
    options = parser.parse_args()

    reports: dict[str, list[EvaluationReport]] = {}
    for method in options.methods:
        with tempfile.TemporaryDirectory() as folder:
            bundle = Path(folder) / method
            print(f"exporting {method}", flush=True)
            api.export(
                method,
                backbone=load_host(),
                budget=[count_kept(r) for r in options.r],
                batch=options.batch,
                output="logits",
                with_plain=True,
                stem=False,
                out=bundle,
            )
            reports[method] = []
            for batch in options.batch:
                print(f"evaluating {method} at batch {batch}", flush=True)
                found = api.evaluate(bundle, options.data, batch=batch, threads=options.threads, limit=options.limit)
                reports[method].append(found)
    r_of = {count_kept(r): r for r in options.r}
    text = "\n".join(describe(reports, "r", lambda _, kept: str(r_of[kept])))
    print(text)
    if options.write is not None:
        write_between(options.write, _BEGIN, text)


def write_between(page: Path, begin: str, text: str) -> None:
    """Put `text` between the mark `begin` of a page and the mark of an end that follows it."""
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(_END)[2]
    page.write_text(f"{before}{begin}\n\n{text}\n\n{_END}{after}", encoding="utf-8")


def count_kept(r: int) -> int:
    """Return the patch tokens that are left when each block removes `r`, but never more than half of them."""
    tokens = _TOKENS
    for _ in range(_BLOCKS):
        tokens -= min(r, tokens // 2)
    return tokens


def describe(reports: Mapping[str, list[EvaluationReport]], column: str, value: Callable[[str, int], str]) -> list[str]:
    """Return a Markdown table: a row for the plain model, and one for each bucket of each method.

    Args:
        reports: of each method, one for each batch size; accuracy is that of the last.
        column: head of the column that tells of a method and the tokens kept what `value` returns.
    """
    first = next(iter(reports.values()))
    timed = " | ".join(f"ms/image, batch {report.evaluation.batch} | over plain | " for report in first)
    header = f"| method | {column} | tokens kept | top-1 % | drop, points | agreement % | FLOPs | {timed} |"
    lines = [f"{conditions(reports)}.", "", header]
    lines.append("|" + "---|" * (header.count("|") - 1))
    plain = [report.evaluation.scores[0] for report in first]
    times = " | ".join(f"{row.ms_per_image.value:.3f} | | " for row in plain)
    top1 = f"{100 * plain[-1].top1.value:.2f} {interval(plain[-1].top1, 100)}"
    lines.append(f"| plain | - | {_TOKENS} | {top1} | | | 1.00x | {times} |")
    for method, runs in reports.items():
        for rows in reversed(list(zip(*(report.evaluation.scores[1:] for report in runs), strict=True))):
            kept, report = runs[-1].kept[rows[-1].model], runs[-1]
            compared = [row.against_plain for row in rows]
            last = compared[-1]
            assert last is not None
            times = " | ".join(
                f"{row.ms_per_image.value:.3f} | {it.time_ratio.value:.2f}x {interval(it.time_ratio, 1)} | "
                f"{_VERDICT[it.pace]}"
                for row, it in zip(rows, compared, strict=True)
                if it is not None
            )
            lines.append(
                f"| {method} | {value(method, kept)} | {kept} | {100 * rows[-1].top1.value:.2f} | "
                f"{100 * last.drop.value:.2f} {interval(last.drop, 100)} | {100 * last.agreement.value:.2f} | "
                f"{report.flops[rows[-1].model] / report.flops[report.plain]:.2f}x | {times} |"
            )
    return lines


def conditions(reports: Mapping[str, list[EvaluationReport]]) -> str:
    """Return what was run where, in words."""
    first = next(iter(reports.values()))
    counts = [f"{report.evaluation.images:,}" for report in first]
    images = f"{counts[-1]} test images"
    if len(set(counts)) > 1:
        images = ", ".join(
            f"{count} test images at batch {report.evaluation.batch}"
            for count, report in zip(counts, first, strict=True)
        )
    averages = [report.machine.load_average for runs in reports.values() for report in runs]
    loads = sorted({average[0] for average in averages if average})
    load = " to ".join(f"{end:.2f}" for end in dict.fromkeys((loads[0], loads[-1]))) if loads else "unknown"
    threads = f"{first[0].threads or 'its own choice of'} thread{'' if first[0].threads == 1 else 's'}"
    machine = first[0].machine
    return f"{images}, {first[0].version}, {threads} on {machine.cpu}, {machine.cores} cores, load {load}"


def interval(estimate: Estimate, scale: float) -> str:
    """Return the ends of a 95 % interval."""
    return f"({scale * estimate.low:.2f} to {scale * estimate.high:.2f})"


if __name__ == "__main__":
    main()
