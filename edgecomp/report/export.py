"""What an export made: the value, and the text that `edgecomp export` prints."""

from __future__ import annotations

from pathlib import Path

import msgspec

from edgecomp.bundle import WEIGHTS
from edgecomp.parity import ParityReport
from edgecomp.report.text import flops, size, table
from edgecomp.specs.manifest import Graph, Manifest, RouterRecord

__all__ = ["ExportReport", "describe_export", "router_line"]


class ExportReport(msgspec.Struct, frozen=True):
    """What an export made; `bool(report)` is the verdict of its parity check.

    Attributes:
        bundle: the folder.
        manifest: what is in it.
        reused: an unchanged bundle of the same request was there already, and nothing was done.
        parity: ONNX Runtime against the original's goldens; None when reused.
        seconds: wall time.
        weights_bytes: size of the shared weights file.
    """

    bundle: Path
    manifest: Manifest
    reused: bool
    parity: ParityReport | None
    seconds: float
    weights_bytes: int

    def __bool__(self) -> bool:
        return self.parity is None or bool(self.parity)


def describe_export(report: ExportReport) -> str:
    """Return the text: what was made, tokens, FLOPs, parity, sizes, and the next command."""
    manifest = report.manifest
    head = "unchanged, nothing to do" if report.reused else f"written in {report.seconds:.1f} s"
    lines = [
        f"{report.bundle}: {head}",
        f"  method     {manifest.method}, preset {manifest.preset}, {manifest.placement}"
        + (f" {manifest.backbone} (feature layer {manifest.feature_layer})" if manifest.backbone != "none" else ""),
        *then_lines(manifest),
        f"  input      {_inputs(manifest)}",
        f"  precision  {precision_line(manifest)}",
        f"  weights    {manifest.weights}",
    ]
    if manifest.backbone_weights is not None:
        lines.append(f"  backbone   {manifest.backbone_weights}")
    origins = [manifest.weights, *([manifest.backbone_weights] if manifest.backbone_weights else [])]
    if any(origin.kind == "random" for origin in origins):
        lines.append("             latency and shapes are real; outputs are those of an untrained model")
    lines += [f"  note       {note}" for note in manifest.notes]
    lines += ["", _bucket_table(report), ""]
    if manifest.plain_flops:
        lines.append(f"  uncompressed: {manifest.plain_name}, {flops(manifest.plain_flops)} a sample")
    for stem in manifest.stem:
        shared = ", ".join(bucket.model for bucket in manifest.buckets if bucket.stem == stem.model)
        lines.append(f"  stem       {stem.model}: {flops(stem.flops // stem.batch)} a sample, run once for {shared}")
    if manifest.router is not None:
        lines.append(f"  router     {router_line(manifest.router)}")
    data = sum(entry.size for entry in manifest.files if entry.name != WEIGHTS)
    lines.append(
        f"  {manifest.parameters:,} parameters; weights {size(report.weights_bytes)} (shared), all else {size(data)}"
    )
    if report.parity is not None:
        worst = report.parity.worst.difference
        lines.append(
            f"  parity     {'pass' if report.parity else 'FAIL'}: {len(report.parity.outputs)} outputs in "
            f"{report.parity.version}, max rel error {worst.max_rel:.2g} (allowed {report.parity.tolerance.max_rel:g})"
            + (", emulated: fp32 rounded as the type" if report.parity.emulated else "")
        )
        if ties := len(report.parity.ties):
            lines.append(
                f"             {ties} of them with the original's choices forced, since rounding decides one there; "
                "`edgecomp parity --explain` shows it"
            )
    lines.append(f"  next       edgecomp parity {report.bundle}")
    return "\n".join(lines)


def then_lines(manifest: Manifest) -> list[str]:
    """Return the line of the second method, where there is one."""
    then = manifest.then
    if then is None:
        return []
    return [f"  then       {then.method}, preset {then.preset}, on {then.between} tokens; weights {then.weights}"]


def precision_line(manifest: Manifest) -> str:
    """Return what a bundle's graphs compute in, how many nodes are in fp32 beside that, and what set the scales."""
    is_quantized = manifest.precision != manifest.rest
    parts = [manifest.precision + (f", the rest {manifest.rest}" if is_quantized else ""), f"opset {manifest.opset}"]
    graphs = [*manifest.stem, *manifest.buckets[:1]]  # what one request runs
    if quantized := sum(len(graph.quantized) for graph in graphs):
        parts.append(f"{quantized} linear layers quantised")
    if manifest.rest != "fp32" and (islands := sum(_in_fp32(graph) for graph in graphs)):
        parts.append(f"{islands} nodes in fp32")
    if manifest.fp32:
        parts.append(f"fp32 asked for: {', '.join(manifest.fp32)}")
    if manifest.samples is not None:
        what = "scales from" if is_quantized else "range seen on"
        parts.append(f"{what} {manifest.samples.count} inputs: {manifest.samples.source}")
    return "; ".join(parts)


def _in_fp32(graph: Graph) -> int:
    return sum(not reason.startswith("left in") for reason in graph.islands.values())


def router_line(router: RouterRecord) -> str:
    """Return what a bundle's router is, in a line."""
    if router.fixed:
        return f"fixed: always {router.fixed} tokens"
    cuts = ", ".join(f"{value:.4g}" for value in router.thresholds)
    state = f"set for {router.calibration.target}" if router.calibration is not None else "not calibrated"
    weights = f"; weights {router.weights}" if router.weights is not None else ""
    return f"{router.name}, {router.graphs[0].model}; thresholds {cuts}, {state}{weights}"


def _inputs(manifest: Manifest) -> str:
    return ", ".join(str(spec) for spec in manifest.buckets[0].inputs)


def _bucket_table(report: ExportReport) -> str:
    manifest = report.manifest
    several = len({bucket.budget.tokens_out for bucket in manifest.buckets}) > 1
    rows = []
    for bucket in manifest.buckets:
        ratio = bucket.flops / bucket.batch / manifest.plain_flops if manifest.plain_flops else 0.0
        rows.append(
            [
                bucket.model,
                bucket.batch,
                bucket.budget.tokens_in,
                bucket.budget.tokens_out,
                f"{bucket.budget.compression:.1f}x",
                flops(bucket.flops // bucket.batch),
                f"{ratio:.2f}x" if ratio else "-",
                *([size(bucket.own_bytes)] if several else []),
            ]
        )
    header = ["model", "batch", "tokens in", "kept", "fewer", "FLOPs a sample", "of uncompressed"]
    header += ["own weights"] if several else []
    return "\n".join("  " + line for line in table(header, rows).splitlines())
