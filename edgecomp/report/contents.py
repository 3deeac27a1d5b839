"""What files hold: the values, and the text that `edgecomp inspect` prints."""

from __future__ import annotations

from collections import Counter

import msgspec

from edgecomp.engines import EngineRecord
from edgecomp.report.export import precision_line, router_line
from edgecomp.report.text import flops, size, table
from edgecomp.specs.manifest import Bucket, Manifest

__all__ = ["BundleContents", "EngineContents", "OnnxContents", "describe_contents"]


class BundleContents(msgspec.Struct, frozen=True, tag="bundle"):
    """A bundle: its manifest, and what lies below its root."""

    path: str
    size_bytes: int
    manifest: Manifest
    below: tuple[str, ...]


class OnnxContents(msgspec.Struct, frozen=True, tag="onnx"):
    """An ONNX file; shapes as text, since a user's file may have symbolic ones.

    Attributes:
        ops: how often each op occurs in the graph; functions: the same in the body of each function.
        topk: how many each TopK takes, a number or the attribute of the function's node that says it.
        reducing_scatters: nodes that scatter with a reduction, which no TensorRT takes.
    """

    path: str
    size_bytes: int
    sha256: str
    producer: str
    ir_version: int
    opsets: dict[str, int]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ops: dict[str, int]
    functions: dict[str, dict[str, int]]
    topk: tuple[str, ...]
    reducing_scatters: tuple[str, ...]
    parameters: int
    external_files: tuple[str, ...]


class EngineContents(msgspec.Struct, frozen=True, tag="engine"):
    """An engine: its own size and hash, and its record where one lies beside it; false where the two disagree."""

    path: str
    size_bytes: int
    sha256: str
    record: EngineRecord | None
    record_problem: str

    def __bool__(self) -> bool:
        return not self.record_problem


def describe_contents(contents: BundleContents | OnnxContents | EngineContents) -> str:
    """Return the text."""
    if isinstance(contents, BundleContents):
        return _describe_bundle(contents)
    if isinstance(contents, OnnxContents):
        return _describe_onnx(contents)
    return _describe_engine(contents)


def _describe_bundle(contents: BundleContents) -> str:
    m = contents.manifest
    params = ", ".join(f"{name}={value}" for name, value in m.params.items())
    lines = [
        f"{contents.path}: edgecomp bundle, schema {m.schema}, {size(contents.size_bytes)}, whole (all hashes match)",
        f"  method     {m.method}, preset {m.preset}, {m.placement}, backbone {m.backbone}",
        f"  params     {params}",
        f"  weights    {m.weights}",
        *([f"  backbone   {m.backbone_weights}"] if m.backbone_weights else []),
        f"  precision  {precision_line(m)}; output {m.output}, input {m.input_dtype}",
        *_islands(m),
        *([f"  router     {router_line(m.router)}"] if m.router is not None else []),
        f"  source     {m.recipe.source.paper}; {m.recipe.source.upstream} ({m.recipe.source.licence})",
        f"  made with  {', '.join(f'{name} {version}' for name, version in m.tools.items())}",
        *(f"  note       {note}" for note in m.notes),
        "",
        table(
            ["model", "batch", "in", "kept", "FLOPs", "nodes", "inputs", "outputs", *(["stem"] if m.stem else [])],
            [
                [
                    g.model,
                    g.batch,
                    g.budget.tokens_in if isinstance(g, Bucket) else "-",
                    g.budget.tokens_out if isinstance(g, Bucket) else "-",
                    flops(g.flops),
                    sum(g.ops.values()),
                    ", ".join(map(str, g.inputs)),
                    ", ".join(map(str, g.outputs)),
                    *([g.stem or "-"] if m.stem else []),
                ]
                for g in m.graphs
            ],
        ),
        "",
        f"  ops        {_ops(m.buckets[0].ops)}",
        "",
        table(["file", "role", "size", "sha256"], [[f.name, f.role, size(f.size), f.sha256[:16]] for f in m.files]),
        f"digest {m.digest}",
    ]
    lines += [f"  below      {name}" for name in contents.below]
    return "\n".join(lines)


def _islands(m: Manifest) -> list[str]:
    """Return a line for each graph that a request runs: its nodes that are kept out of the precision, by reason."""
    lines = []
    for graph in (*m.stem, *m.buckets):
        if graph.islands and graph.batch == m.buckets[0].batch:
            counted = Counter(graph.islands.values()).most_common()
            reasons = ", ".join(f"{reason} ({count})" for reason, count in counted)
            lines.append(f"  islands    {graph.model}: {reasons}")
    return lines


def _describe_onnx(contents: OnnxContents) -> str:
    return "\n".join(
        [
            f"{contents.path}: ONNX, {size(contents.size_bytes)}, IR version {contents.ir_version}",
            f"  producer   {contents.producer or 'unknown'}",
            f"  opsets     {', '.join(f'{domain} {version}' for domain, version in contents.opsets.items())}",
            *(f"  input      {text}" for text in contents.inputs),
            *(f"  output     {text}" for text in contents.outputs),
            f"  ops        {_ops(contents.ops)}",
            *(f"  function   {name}: {_ops(ops)}" for name, ops in contents.functions.items()),
            f"  TopK       of {', '.join(contents.topk)}" if contents.topk else "  TopK       none",
            f"  scatters   with a reduction: {', '.join(contents.reducing_scatters) or 'none'}",
            f"  weights    {contents.parameters:,} values" + _external(contents),
            f"  sha256     {contents.sha256}",
        ]
    )


def _external(contents: OnnxContents) -> str:
    return f", in {', '.join(contents.external_files)}" if contents.external_files else ", in the file itself"


def _describe_engine(contents: EngineContents) -> str:
    lines = [f"{contents.path}: engine, {size(contents.size_bytes)}, sha256 {contents.sha256}"]
    if contents.record is not None:
        r = contents.record
        lines += [
            f"  built by   {r.runtime} {r.runtime_version} for {r.target}, SM {', '.join(map(str, r.sm))}",
            f"  from       {r.model}, sha256 {r.onnx_sha256[:16]}, weights {r.weights_sha256[:16] or 'inside'}",
            f"  precision  {r.precision}; {r.num_layers} layers, workspace {r.workspace_mib or 'default'} MiB",
            f"  took       {r.seconds:.1f} s",
            *(f"  input      {t.name} {t.dtype}{list(t.shape)}" for t in r.inputs),
            *(f"  output     {t.name} {t.dtype}{list(t.shape)}" for t in r.outputs),
            *(f"  plugin     {p.name} {p.version} for {p.op}: load {p.library} beside it first" for p in r.plugins),
            *(f"  merge      {m.node} by the {m.by}" for m in r.merges),
            *(f"  warning    {text}" for text in r.warnings),
        ]
    if contents.record_problem:
        lines.append(f"  PROBLEM    {contents.record_problem}")
    return "\n".join(lines)


def _ops(ops: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in ops.items())
