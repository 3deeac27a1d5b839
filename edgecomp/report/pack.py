"""Archives of bundles: the values, the text that `edgecomp bundle` prints, and the README that an archive carries."""

from __future__ import annotations

from pathlib import Path

import msgspec

from edgecomp.report.text import flops, size, table
from edgecomp.specs.manifest import Manifest

__all__ = ["PackReport", "UnpackReport", "archive_readme", "describe_pack", "describe_unpack"]


class PackReport(msgspec.Struct, frozen=True):
    """An archive that was written.

    Attributes:
        bundle: the folder that was packed; its digest.
        sha256: of the archive.
        members: what it holds, by name, with sizes.
        written: False where the same bytes were there already.
        notes: what was left out, and why.
    """

    bundle: str
    digest: str
    path: Path
    size_bytes: int
    sha256: str
    members: dict[str, int]
    written: bool
    notes: tuple[str, ...]


class UnpackReport(msgspec.Struct, frozen=True):
    """A folder that was unpacked, whole and checked.

    Attributes:
        archive: the file.
        out: the new folder; `bundle` is the bundle in it.
        members: what was written, by name, with sizes.
        notes: what stayed in the archive, and why.
    """

    archive: str
    out: Path
    bundle: Path
    digest: str
    members: dict[str, int]
    notes: tuple[str, ...]


def describe_pack(report: PackReport) -> str:
    """Return the text: what the archive holds, and what to do with it."""
    rows = [[name, size(count)] for name, count in report.members.items()]
    lines = [
        (
            f"{report.path} {'written' if report.written else 'unchanged, the same bytes were there'}: "
            f"{len(report.members)} files, {size(report.size_bytes)}, sha256 {report.sha256[:12]}"
        ),
        "",
        table(["file", "size"], rows),
        *(f"note       {note}" for note in report.notes),
        f"next       copy it to the board; there: edgecomp bundle unpack {report.path.name}",
    ]
    return "\n".join(lines)


def describe_unpack(report: UnpackReport) -> str:
    """Return the text: what was written, and the next command."""
    lines = [
        (
            f"{report.out}: {len(report.members)} files, {size(sum(report.members.values()))}, bundle digest "
            f"{report.digest[:12]}; every file of the bundle has the sha256 that its manifest says"
        ),
        *(f"note       {note}" for note in report.notes),
        f"next       edgecomp verify {report.bundle}",
    ]
    return "\n".join(lines)


def archive_readme(manifest: Manifest, plugins: tuple[str, ...], *, wheel: str) -> str:
    """Return the README of an archive: what it is, what to install on the board, and the commands, word for word.

    Args:
        plugins: names of those whose sources are in it.
        wheel: file name of the edgecomp in it.
    """
    tolerance = manifest.recipe.tolerances[manifest.precision]
    rows = [
        [bucket.model, bucket.budget.tokens_in, bucket.budget.tokens_out, bucket.batch, flops(bucket.flops)]
        for bucket in manifest.buckets
    ]
    first = manifest.buckets[0]
    host = "" if manifest.backbone == "none" else f" on {manifest.backbone}"
    version, summary = manifest.tools.get("edgecomp", ""), manifest.recipe.summary.rstrip(".")
    weights = [f"compressor: {manifest.weights}"]
    if manifest.backbone_weights is not None:
        weights.append(f"host: {manifest.backbone_weights}")
    lines = [
        f"# {manifest.method} ({manifest.preset}){host}",
        "",
        f"{summary[:1].upper()}{summary[1:]}. Packed by `edgecomp bundle pack`; exported with edgecomp {version}.",
        "",
        "```",
        table(["graph", "tokens in", "kept", "batch", "cost"], rows),
        "```",
        "",
        f"* takes {', '.join(map(str, first.inputs))}; gives {', '.join(map(str, first.outputs))} ({manifest.output})",
        (
            f"* precision {manifest.precision}, opset {manifest.opset}; parity passes up to max rel "
            f"{tolerance.max_rel:g} and from cosine {tolerance.min_cosine}"
        ),
        f"* weights, {'; '.join(weights)}",
        (
            f"* method: {manifest.recipe.source.title}, {manifest.recipe.source.paper} (upstream's licence: "
            f"{manifest.recipe.source.licence})"
        ),
        f"* digest of the bundle: `{manifest.digest}`",
        *(f"* router `{manifest.router.name}` picks a bucket for each request" for _ in [0] if manifest.router),
        *(f"* note: {note}" for note in manifest.notes),
        "",
        "## Install, on the board",
        "",
        f"Python 3.10 or newer; no torch. edgecomp is in this archive, as `{wheel}`: take it out with",
        f"`unzip ARCHIVE.zip {wheel}`, where you trust whoever packed it. One of these:",
        "",
        "```",
        "# any machine: ONNX Runtime",
        f"python3 -m venv .venv && .venv/bin/pip install './{wheel}[ort]'",
        "# a GeForce or RTX card",
        f"python3 -m venv .venv && .venv/bin/pip install './{wheel}[ort,rtx]'",
        "# Jetson: TensorRT comes with JetPack",
        f"python3 -m venv --system-site-packages .venv && .venv/bin/pip install './{wheel}[ort]'",
        "",
        "source .venv/bin/activate",
        "```",
        "",
        "Or all of it from a machine that reaches the board by ssh: `edgecomp verify BUNDLE --on ssh://user@board/folder`",
        "copies bundle and edgecomp there, and runs it.",
        "",
        "## Unpack, verify, run",
        "",
        "```",
        "edgecomp bundle unpack ARCHIVE.zip --out here && cd here    # or: unzip ARCHIVE.zip -d here",
        "edgecomp doctor                                             # what is installed, what is missing",
        "edgecomp verify bundle                                      # hashes, engines, parity, latency in one go",
        "edgecomp verify bundle --target NAME                        # for one of `edgecomp list targets`",
        "edgecomp build bundle --target NAME                         # engines alone, to bundle/engines/NAME",
        f"edgecomp run bundle {_example(manifest)} --out outputs.safetensors",
        "```",
        "",
        "`verify` exits with 0 where all that applies passed, 1 where something failed, 2 where it could not begin.",
    ]
    for name in plugins:
        lines += [
            "",
            f"## Plugin {name}",
            "",
            f"Some nodes of these graphs run faster in the TensorRT plugin `{name}`, and without it as they are. Its",
            f"sources are in `plugins/{name}`, for a product without Python; `edgecomp` compiles those of its own",
            "installation:",
            "",
            "```",
            f"edgecomp plugin build {name} --sm SM          # 87: Jetson Orin; 86: RTX 30; 89: RTX 40",
            "edgecomp verify bundle --target NAME --plugin require",
            "```",
        ]
    return "\n".join(lines) + "\n"


def _example(manifest: Manifest) -> str:
    return "photo.jpg" if manifest.buckets[0].inputs[0].kind == "image" else "inputs.safetensors"
