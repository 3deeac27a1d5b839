"""What files hold: the values, and the text that `edgecomp inspect` prints."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec

from edgecomp.checkpoint import FLOATS, count_tensors
from edgecomp.engines import EngineRecord
from edgecomp.report.export import precision_line, router_line, then_lines
from edgecomp.report.text import flops, size, table
from edgecomp.specs.manifest import Bucket, Manifest

__all__ = [
    "BundleContents",
    "CheckpointFile",
    "EngineContents",
    "OnnxContents",
    "WeightsContents",
    "WeightsFit",
    "describe_contents",
]


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


class CheckpointFile(msgspec.Struct, frozen=True):
    """A file of a checkpoint."""

    name: str
    size_bytes: int


class WeightsFit(msgspec.Struct, frozen=True):
    """A method whose layout a checkpoint is in, and what could be exported from it.

    Attributes:
        prefix: in front of the keys that are read.
        tensors, size_bytes: of what is read.
        foreign: tensors of other models that are left out; foreign_groups: whose.
        unknown: keys below the prefix that the layout does not know, which an export refuses.
        params: the method's parameters; decided: those that the shapes of the checkpoint decide.
        width: of the tokens that it reads, or makes.
        tokens_in: 0 where a host decides.
        kept: tokens kept where nothing is said; may_keep: the rule.
        command: what exports it.
        problem: why nothing could be exported.
    """

    method: str
    layout: str
    prefix: str
    tensors: int
    size_bytes: int
    foreign: int
    foreign_groups: str
    unknown: tuple[str, ...]
    preset: str
    placement: str
    params: dict[str, Any]
    decided: tuple[str, ...]
    width: int
    tokens_in: int
    kept: tuple[int, ...]
    may_keep: str
    notes: tuple[str, ...]
    problem: str
    command: str


class WeightsContents(msgspec.Struct, frozen=True, tag="weights"):
    """A checkpoint: its files and types, and the methods that it fits; false where no method could take it.

    Attributes:
        absent: shards that its index names and that are not there.
        saved_by: the method whose `save` wrote it.
        types: tensors of each type.
        nearest: where no method fits, the nearest layout and what differs.
    """

    path: str
    files: tuple[CheckpointFile, ...]
    absent: tuple[str, ...]
    note: str
    saved_by: str
    types: dict[str, int]
    tensors: int
    first_keys: tuple[str, ...]
    groups: str
    fits: tuple[WeightsFit, ...]
    nearest: str

    def __bool__(self) -> bool:
        return any(not fit.problem for fit in self.fits)


def describe_contents(contents: BundleContents | OnnxContents | EngineContents | WeightsContents) -> str:
    """Return the text."""
    if isinstance(contents, WeightsContents):
        return _describe_weights(contents)
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
        *then_lines(m),
        *([f"  params     {', '.join(f'{name}={value}' for name, value in m.then.params.items())}"] if m.then else []),
        f"  weights    {m.weights}",
        *([f"  backbone   {m.backbone_weights}"] if m.backbone_weights else []),
        f"  precision  {precision_line(m)}; output {m.output}, input {m.input_dtype}",
        *_islands(m),
        *([f"  router     {router_line(m.router)}"] if m.router is not None else []),
        f"  source     {m.recipe.source.paper}; {m.recipe.source.upstream} ({m.recipe.source.licence})",
        *(
            [f"             {m.then.source.paper}; {m.then.source.upstream} ({m.then.source.licence})"]
            if m.then
            else []
        ),
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


def _describe_weights(contents: WeightsContents) -> str:
    files = contents.files
    where = "" if len(files) == 1 else f" in {len(files)} shards"
    total = size(sum(file.size_bytes for file in files))
    types = ", ".join(f"{name} ({count})" for name, count in contents.types.items())
    others = [name for name in contents.types if name not in FLOATS]
    read = f"all but {', '.join(others)}, which no weight may be in," if others else "all"
    lines = [
        f"{contents.path}: checkpoint, {total}{where}, {count_tensors(contents.tensors)}",
        *([f"  note       {contents.note}"] if contents.note else []),
        *(f"  absent     {name}: named by the index, and not there" for name in contents.absent),
        *([f"  saved by   edgecomp, method {contents.saved_by}"] if contents.saved_by else []),
        f"  types      {types}; {read} are read as float32",
        f"  keys       {contents.groups}",
    ]
    for fit in contents.fits:
        lines += ["", *_describe_fit(fit)]
    if not contents.fits:
        lines += ["", "  fits       no layout of any method"]
        lines += [f"  nearest    {contents.nearest}"] if contents.nearest else []
        lines += [f"  first keys {', '.join(contents.first_keys)}"]
    return "\n".join(lines)


def _describe_fit(fit: WeightsFit) -> list[str]:
    below = f" below {fit.prefix!r}" if fit.prefix else ""
    decided = ", ".join(f"{name}={value}" for name, value in fit.params.items() if name in fit.decided)
    tokens = (
        f"{fit.tokens_in} tokens of width {fit.width}" if fit.tokens_in else f"a host's tokens of width {fit.width}"
    )
    kept = f", {', '.join(map(str, fit.kept))} kept by default" if fit.kept else ""
    return [
        f"  fits       {fit.method}, layout {fit.layout}{below}: {count_tensors(fit.tensors)}, {size(fit.size_bytes)}",
        *([f"  left out   {count_tensors(fit.foreign)} of other models: {fit.foreign_groups}"] if fit.foreign else []),
        *([f"  not known  {len(fit.unknown)}: {', '.join(fit.unknown[:5])}"] if fit.unknown else []),
        *([f"  PROBLEM    {fit.problem}"] if fit.problem else []),
        *([f"  sizes      {decided}"] if decided else []),
        *(
            []
            if fit.problem
            else [f"  gives      preset {fit.preset}, {fit.placement}; {tokens}{kept} ({fit.may_keep})"]
        ),
        *(f"  note       {note}" for note in fit.notes),
        *([f"  export     {fit.command}"] if fit.command else []),
    ]


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
