"""`edgecomp check`: the graphs of a bundle, or any ONNX file, held to a target without building."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from packaging.specifiers import InvalidSpecifier, SpecifierSet

from edgecomp.api._build import local_target
from edgecomp.api._progress import Progress, silent
from edgecomp.bundle import open_bundle
from edgecomp.engines import planned_flavour
from edgecomp.errors import BundleError, InvalidSpec, MissingDependency, RunError, UnknownName
from edgecomp.report.check import CheckReport, FixReport, HeldTo
from edgecomp.specs import OpList, Target, load_oplists, load_target
from edgecomp.specs.origin import file_sha256
from edgecomp.specs.verdict import Verdict, worst

__all__ = ["check"]

_GATES: tuple[Verdict, ...] = ("blocked", "unverified", "likely")
_LARGEST_BATCH = 1 << 16


def check(
    path: str | Path,
    *,
    target: str,
    runtime: str = "auto",
    plugin: Sequence[str] = (),
    fail_on: str = "blocked",
    fix: bool = False,
    out: str | Path | None = None,
    batch: int | None = None,
    progress: Progress = silent,
) -> CheckReport:
    """Hold every node to the target's op lists and to the rules of `export/rules.py`; nothing is built or run.

    Weights are not read, so a model of any size takes seconds. Needs the package onnx, and neither torch nor TensorRT.

    Args:
        path: a bundle, all of whose graphs are checked, or an .onnx file of anyone.
        target: a target's name, `auto` for the GPU of this machine, or the path of a target's TOML file.
        runtime: `tensorrt`, `rtx` (TensorRT for RTX), or `auto`: what is installed here and builds for the target, and
            else full TensorRT where it builds for it. Full TensorRT: the lists of all versions that the target names.
        plugin: ops (`domain::Op`) that a plugin of yours runs; they are not inlined, and unverified.
        fail_on: the best verdict that still makes the report false: `blocked`, `unverified` or `likely`.
        fix: apply the rewrites that are provably equal, prove them in ONNX Runtime, and write a new file.
        out: that file; None: `<stem>.fixed.onnx` beside the model.
        batch: with `fix`, binds an open first dimension of the inputs.
        progress: takes one line for each step.

    Raises:
        RunError: the file is absent, truncated or no ONNX model. BundleError: the bundle is not whole.
        InvalidSpec: a value out of range, or `fix` on a bundle. UnknownName: no such target, runtime or verdict.
        TargetMismatch: no TensorRT builds for the target, or not the one that was asked for.
        ParityError: the rewritten graph does not compute the same; nothing is written.
        MissingDependency: onnx, or for `fix` onnxruntime, is not installed.
    """
    path = Path(path)
    gate = _gate(fail_on)
    _require_fix_words(path, fix=fix, out=out, batch=batch)
    for op in plugin:
        if not all(op.partition("::")[::2]):
            raise InvalidSpec(
                f"--plugin {op!r} is no op with its domain; write for example --plugin edgecomp::TopKMerge"
            )
    chosen = local_target() if target == "auto" else load_target(target)
    flavour = planned_flavour(chosen, runtime)
    lists = _lists_of(chosen, flavour)
    files = _files_of(path)
    try:
        from edgecomp.export.check import check_graph
        from edgecomp.export.rules import Scope
    except ImportError as error:
        raise MissingDependency("onnx", needed_for="checking a graph", extra="export") from error
    scope = Scope(chosen, flavour, lists, tuple(plugin))
    graphs = []
    for file in files:
        progress(file.name)
        graphs.append(check_graph(file, scope))
    verdict = worst(graph.verdict for graph in graphs)
    fixed = None
    if fix:
        from edgecomp.export.fix import fix_graph

        written = Path(out) if out is not None else path.with_name(f"{path.stem}.fixed.onnx")
        progress(f"rewriting and proving {path.name}")
        rewrites, proof = fix_graph(path, written, graphs[0], batch=batch or 0)
        after = check_graph(written, scope) if rewrites else None
        fixed = FixReport(str(written) if rewrites else "", rewrites, proof, after)
        verdict = after.verdict if after is not None else verdict
    held = tuple(HeldTo(oplist.name, oplist.versions, oplist.tried.sm) for oplist in lists)
    return CheckReport(str(path), chosen.name, chosen.sm, flavour, held, gate, verdict, tuple(graphs), fixed)


def _gate(word: str) -> Verdict:
    for known in _GATES:
        if word == known:
            return known
    raise UnknownName("--fail-on", word, _GATES)


def _require_fix_words(path: Path, *, fix: bool, out: str | Path | None, batch: int | None) -> None:
    """Refuse options that do not go together."""
    if not fix and (out is not None or batch is not None):
        word = f"--out {out}" if out is not None else f"--batch {batch}"
        raise InvalidSpec(f"{word} is for --fix, which was not given; add --fix, or leave it out")
    if batch is not None and not 1 <= batch <= _LARGEST_BATCH:
        raise InvalidSpec(f"--batch {batch} is not between 1 and {_LARGEST_BATCH}")
    if fix and path.is_dir():
        raise InvalidSpec(
            f"--fix {path}: a bundle is never rewritten, its hashes and goldens are those of its graphs; "
            "export it again with what the findings say"
        )


def _files_of(path: Path) -> list[Path]:
    """Return the graphs of a bundle, hashes checked, or the one file. Weights are compared by size alone."""
    if not path.is_dir():
        if not path.is_file():
            raise RunError(f"{path} is not there; give a bundle or an .onnx file")
        return [path]
    opened = open_bundle(path, verify=False)
    entries = [entry for entry in opened.manifest.files if entry.name.endswith(".onnx")]
    for entry in entries:
        if (seen := file_sha256(path / entry.name)) != entry.sha256:
            raise BundleError(
                f"bundle {path}: {entry.name} has sha256 {seen[:12]} and the manifest says {entry.sha256[:12]}; "
                "it was altered, copy or export the bundle again"
            )
    return [path / entry.name for entry in entries]


def _lists_of(target: Target, flavour: str) -> tuple[OpList, ...]:
    """Return the op lists of a flavour whose versions a target names: `tensorrt-10` for a range that holds a 10."""
    found = []
    for oplist in load_oplists():
        name, _, major = oplist.name.partition("-")
        if (flavour == "rtx" and major == "rtx") or (
            flavour == name and major.isdigit() and _holds(target, flavour, int(major))
        ):
            found.append(oplist)
    if not found:
        raise InvalidSpec(
            f"target {target.name}: no op list covers runtimes.{flavour} = {_range_of(target, flavour)!r}; "
            f"there are {', '.join(oplist.name for oplist in load_oplists())}"
        )
    return tuple(found)


def _holds(target: Target, flavour: str, major: int) -> bool:
    """Say whether a range has a version of this major number: its first, or a late one."""
    wanted = _range_of(target, flavour)
    try:
        versions = SpecifierSet(wanted)
    except InvalidSpecifier:
        raise InvalidSpec(
            f"target {target.name}: runtimes.{flavour} = {wanted!r} is no version range; write for example '>=10.3,<12'"
        ) from None
    return any(versions.contains(f"{major}.{minor}", prereleases=True) for minor in range(100))


def _range_of(target: Target, flavour: str) -> str:
    return next((wanted for name, wanted in target.runtimes.items() if name == flavour), "")
