"""The files that a report is made of: each read whole and known for what it is, or refused by its name.

A folder stands for the results in it and below. Other JSON that lies there, an engine's record for example, is left
out and said; a file that was named, or that is broken, stops the report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import TypeVar

import msgspec

from edgecomp.errors import RunError
from edgecomp.files import JSON_ERRORS, read_content, read_document
from edgecomp.profiles.comparison import Comparison
from edgecomp.profiles.result import Result, read_result
from edgecomp.report.calibrate import CalibrationReport
from edgecomp.report.estimate import EstimateReport
from edgecomp.report.evaluate import EvaluationReport
from edgecomp.report.methods import MethodsReport
from edgecomp.report.page.words import file_label
from edgecomp.search.result import SearchResult, read_search

__all__ = ["Document", "Source", "Sources", "read_sources"]

_LARGEST = 256 << 20
_MOST_FILES = 2_000


Document = Result | Comparison | MethodsReport | SearchResult | EstimateReport | EvaluationReport | CalibrationReport


class Source(msgspec.Struct, frozen=True):
    """One file: its name as a page says it, which no other has, and what it holds."""

    name: str
    value: Document


class Sources(msgspec.Struct, frozen=True):
    """All files, and those of folders that were left out."""

    files: tuple[Source, ...]
    left_out: tuple[str, ...] = ()


class _Head(msgspec.Struct, frozen=True):
    """The fields by which documents are told apart; what is absent, or of another type, is not said."""

    kind: msgspec.Raw = msgspec.Raw()


def read_sources(paths: Sequence[Path]) -> Sources:
    """Read files, and those of folders; a file that is named twice counts once.

    Raises:
        RunError: one cannot be read, is truncated, of a newer schema or no result; a folder holds none.
    """
    if not paths:
        raise RunError("no result was named; give files that `edgecomp profile --out` wrote, or their folder")
    files: dict[Path, Document] = {}
    names: dict[Path, str] = {}
    left_out: list[str] = []
    for path in paths:
        found = _below(path) if path.is_dir() else [path]
        before = len(files)
        seen = {file.resolve() for file in found} & set(files)
        for file in found:
            if file.resolve() in files:
                continue
            name = file_label(file, path if path.is_dir() else None)
            value = _read(file, is_named=not path.is_dir())
            if value is None:
                left_out.append(name)
            else:
                files[file.resolve()], names[file.resolve()] = value, name
        if path.is_dir() and len(files) == before and not seen:
            raise RunError(f"{path} holds {len(found)} JSON files and no result; `edgecomp profile --out` writes one")
    if len(files) > _MOST_FILES:
        raise RunError(f"{len(files)} results are more than a page can show ({_MOST_FILES}); give fewer")
    named = _told_apart(names)
    listed = (Source(named[file], value) for file, value in files.items())
    return Sources(tuple(sorted(listed, key=lambda source: source.name)), tuple(sorted(left_out)))


def _told_apart(names: dict[Path, str]) -> dict[Path, str]:
    """Return names of files that no two share: those of one name get as many of their folders as tell them apart."""
    found = dict(names)
    for depth in range(1, max(len(file.parents) for file in names) if names else 0):
        counts = Counter(found.values())
        twins = [file for file, name in found.items() if counts[name] > 1]
        for file in twins:
            found[file] = file_label(file, file.parents[min(depth, len(file.parents) - 1)])
    counts, seen = Counter(found.values()), Counter[str]()
    for file, name in found.items():
        if counts[name] > 1:  # they differ behind what is shown of a long name
            seen[name] += 1
            found[file] = f"{name} #{seen[name]}"
    return found


def _below(folder: Path) -> list[Path]:
    """Return the JSON files of a folder and of those below it, without hidden ones."""
    files = (file for file in folder.rglob("*.json") if file.is_file())
    return sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def _read(path: Path, *, is_named: bool) -> Document | None:
    content = read_content(path, noun="result", largest=_LARGEST)
    try:
        head = msgspec.json.decode(content, type=_Head)
    except msgspec.ValidationError:  # a list or a number
        head = _Head()
    except JSON_ERRORS as error:
        raise RunError(f"result {path} is truncated or no JSON ({error}); measure again, or copy it again") from None
    if bytes(head.kind) == b'"edgecomp search"':
        return _require_rows(path, read_search(path))
    if bytes(head.kind) == b'"edgecomp comparison"':
        return _decode(path, Comparison, "comparison", "edgecomp compare")
    if bytes(head.kind) == b'"edgecomp methods"':
        return _decode(path, MethodsReport, "comparison of methods", "edgecomp compare --methods")
    if bytes(head.kind) == b'"edgecomp evaluation"':
        return _decode(path, EvaluationReport, "evaluation", "edgecomp evaluate")
    if bytes(head.kind) == b'"edgecomp estimate"':
        return _decode(path, EstimateReport, "estimate", "edgecomp estimate")
    if bytes(head.kind) == b'"edgecomp calibration"':
        return _decode(path, CalibrationReport, "calibration", "edgecomp calibrate")
    if bytes(head.kind).startswith(b'"edgecomp '):
        return read_result(path)
    if is_named:
        raise RunError(
            f"{path} is JSON, and nothing that a report is made of; give what `edgecomp profile --out`, or "
            "`compare`, `estimate`, `evaluate` or `calibrate` with --json, wrote"
        )
    return None


def _require_rows(path: Path, found: SearchResult) -> SearchResult:
    if not found.rows:
        raise RunError(f"search {path} holds no candidate and so no figure; run the search again")
    return found


Kind = TypeVar("Kind", Comparison, MethodsReport, EstimateReport, EvaluationReport, CalibrationReport)


def _decode(path: Path, kind: type[Kind], noun: str, verb: str) -> Kind:
    again = "run the command that wrote it again"
    value = read_document(path, kind, noun=noun, verb=verb, again=again, largest=_LARGEST)
    if not _figures(value):
        raise RunError(f"{path} holds no graph and so no figure; run the command that wrote it again")
    return value


def _figures(value: Comparison | MethodsReport | EstimateReport | EvaluationReport | CalibrationReport) -> Sized:
    """Return what the document is about."""
    if isinstance(value, Comparison):
        return value.contestants
    if isinstance(value, MethodsReport):
        return value.rows
    if isinstance(value, EstimateReport):
        return value.graphs or (() if value.llm is None else value.llm.rows)
    return value.evaluation.scores if isinstance(value, EvaluationReport) else value.buckets
