"""Thresholds that were set: the value, and the text that `edgecomp calibrate` prints."""

from __future__ import annotations

from typing import Literal

import msgspec

from edgecomp.report.text import table
from edgecomp.specs.costs import Amount, Whole
from edgecomp.specs.manifest import RouterRecord

__all__ = ["BucketUse", "CalibrationReport", "describe_calibration"]


class BucketUse(msgspec.Struct, frozen=True):
    """One bucket on the images.

    Attributes:
        before, after: images that the router sends to it, with the old thresholds and the new.
        ms: median time of one image in it, without the router.
        agreement: with the largest bucket, were all images sent here.
    """

    tokens: Whole
    before: Whole
    after: Whole
    ms: Amount
    agreement: float


class CalibrationReport(msgspec.Struct, frozen=True):
    """What was set, and what it costs.

    Attributes:
        router: as it stands in the manifest now.
        before: the old thresholds.
        buckets: ascending.
        router_ms: what the router itself takes of a request, the median; without the stem, which the bucket needs too.
        batch: of the graphs that served, one request at a time.
        mean_ms: expected of a routed request on these images: the mean over them of bucket and router.
        notes: what a reader must know.
    """

    bundle: str
    router: RouterRecord
    before: tuple[float, ...]
    buckets: tuple[BucketUse, ...]
    router_ms: Amount
    mean_ms: Amount
    runner: str
    threads: int
    batch: int
    notes: tuple[str, ...]
    schema: Literal[1] = 1
    kind: Literal["edgecomp calibration"] = "edgecomp calibration"


def describe_calibration(report: CalibrationReport) -> str:
    """Return the text: thresholds, the histogram of buckets, and what it costs."""
    made = report.router.calibration
    assert made is not None
    rows = [
        [
            use.tokens,
            use.before,
            use.after,
            "#" * round(40 * use.after / made.images),
            f"{use.ms:.3f}",
            f"{100 * use.agreement:.2f}",
        ]
        for use in report.buckets
    ]
    largest, share = report.buckets[-1], 100 * report.router_ms / report.buckets[0].ms
    where = f"{report.runner}, {report.threads or 'its own choice of'} threads, batch {report.batch}"
    lines = [
        f"{report.bundle}: router {report.router.name} set for {made.target}",
        f"  data       {made.images} images of {made.data}, sha256 {made.sha256[:12]}",
        f"  thresholds {_numbers(report.before)} -> {_numbers(report.router.thresholds)}",
        "",
        table(["kept", "before", "after", "", "ms", "agree %"], rows),
        "",
        f"  mean       {made.mean_tokens:.1f} tokens kept, {report.mean_ms:.3f} ms with the router ({where})",
        f"  router     {report.router_ms:.3f} ms a request, {share:.1f} % of the smallest bucket",
        f"  agreement  {100 * made.agreement:.2f} % with the largest bucket, of {made.agreement_of}",
    ]
    slow = [use.tokens for use in report.buckets[:-1] if use.ms + report.router_ms >= largest.ms]
    if slow:
        lines.append(
            f"  router and bucket {', '.join(map(str, slow))} take longer than bucket {largest.tokens} alone "
            f"({largest.ms:.3f} ms): here the router does not pay for {'it' if len(slow) == 1 else 'them'}"
        )
    if report.mean_ms >= largest.ms:
        lines.append(
            f"  a routed request takes {report.mean_ms:.3f} ms, and bucket {largest.tokens} alone {largest.ms:.3f} ms: "
            "the router does not pay here"
        )
    return "\n".join([*lines, *(f"  note       {note}" for note in report.notes)])


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)
