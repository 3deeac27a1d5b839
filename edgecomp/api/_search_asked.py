"""What a search was asked for: where it runs, what its numbers depend on, and how that reads."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from edgecomp import __version__
from edgecomp.api._request import tools
from edgecomp.api._search_export import Described, ModelAsked
from edgecomp.api._search_measure import KIND
from edgecomp.checkpoint import path_digest
from edgecomp.profiles.machine import Machine
from edgecomp.report.search import SearchPlan
from edgecomp.resources import source_digest
from edgecomp.search.plan import coarse
from edgecomp.search.run import Ask
from edgecomp.search.space import Family, name_of
from edgecomp.search.state import flat
from edgecomp.specs import load_target
from edgecomp.specs.origin import file_sha256

__all__ = ["SearchAsked", "agreement_of", "command_of", "depends_on", "not_on_target", "plan_of"]

_NO_CPU_KERNELS = ("bf16", "fp8")
_NOT_REPEATED = ("out", "keep_bundles", "fresh", "dry_run", "progress")
_FILES = ("recipe", "weights", "backbone_weights", "data", "calibration", "target")
_SHORTER = {
    "max_p50_ms": "max_p50", "max_p99_ms": "max_p99", "max_energy_mj": "max_energy", "duration_s": "duration",
    "params": "set",
}  # fmt: skip


class SearchAsked(msgspec.Struct, frozen=True, kw_only=True):
    """What a search was asked for beside its model."""

    target: str
    runner: str
    threads: int
    duration_s: float
    on: tuple[str, ...]
    data: str
    split: str
    images: int
    seed: int


def not_on_target(word: str, asked: SearchAsked) -> str:
    if asked.target != "local":
        spec = load_target(asked.target)
        if word not in spec.precisions:
            return f"{spec.title} computes in {', '.join(spec.precisions)}"
    is_run = asked.target == "local" or asked.on
    if is_run and asked.runner == "onnxruntime" and word in _NO_CPU_KERNELS:
        return "ONNX Runtime has no kernels for it on the CPU"
    return ""


def plan_of(ask: Ask, asked: SearchAsked) -> SearchPlan:
    families = [
        Family("candidate", ask.subject.method, word, schedule)
        for word in ask.precisions
        if not not_on_target(word, asked)
        for schedule in ask.schedules
    ]
    plain = [f"plain {word}" for word in dict.fromkeys(family.precision for family in families)]
    names = [name_of(family, count) for family in families for count in ask.budgets]
    first = coarse(ask.budgets)
    return SearchPlan(
        subject=ask.subject,
        limits=ask.limits,
        first=tuple(name_of(family, count) for family in families[:1] for count in first),
        candidates=(*plain, *names),
        baselines=tuple(name for name, _ in ask.baselines),
        refused_baselines=ask.refused_baselines,
        least=len(plain) + 1,
        most=len(plain) + len(names) + len(ask.baselines),
        duration_s=asked.duration_s,
        hosts=max(1, len(asked.on)),
    )


def depends_on(asked: SearchAsked, model: ModelAsked, ask: Ask, machine: Machine | None) -> dict[str, Any]:
    """Return what every number of a search depends on."""
    given = msgspec.to_builtins(model)
    for field in ("weights", "backbone_weights", "recipe"):
        if given[field] not in ("", "random", "pretrained"):
            given[field] = path_digest(Path(given[field])) if field != "recipe" else file_sha256(Path(given[field]))
    given["calibration"] = _listing(model.calibration)
    fields = {
        "edgecomp": f"{__version__} {source_digest()[:16]}",
        "tools": tools() | ({} if machine is None else machine.versions),
        "model": given | {"preset": ask.subject.preset, "backbone": ask.subject.backbone},
        "measuring": {
            "target": asked.target, "there": bool(asked.on), "runner": asked.runner, "threads": asked.threads,
            "duration_s": asked.duration_s,
        },
        "data": {"files": _listing(asked.data), "split": asked.split, "images": asked.images, "seed": asked.seed},
        "reference": ask.precisions[0],
        "machine": {} if machine is None else {field: getattr(machine, field) for field in KIND},
    }  # fmt: skip
    return flat(fields)


def _listing(folder: str) -> str:
    """Return what names and contents of a folder's files say: sizes stay where an image is drawn anew."""
    if not folder:
        return ""
    files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
    told = "\n".join(f"{file.relative_to(folder)} {file_sha256(file)}" for file in files)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def agreement_of(asked: SearchAsked, ask: Ask, word: str, described: Described, images: int) -> str:
    subject = described.subject
    if described.is_same_network:
        reference = f"the uncompressed model in {word}"
    else:
        reference = f"{subject.method} with its largest budget, {ask.budgets[-1]}, in {word}"
    where = f"on {images} images of {Path(asked.data).resolve().name}" if asked.data else ""
    if described.output == "logits":
        what = f"share of images whose class is that of {reference}"
    elif described.is_same_network:
        what = (
            f"mean cosine of each token of {reference} with what stands for it: its merged token, or the nearest kept"
        )
    else:
        what = f"cosine of the mean token with that of {reference}"
    return f"{what}, {where or 'a proxy: on the shipped photograph and seeded numbers, not on images of yours'}"


def command_of(given: Mapping[str, Any], signature: inspect.Signature) -> tuple[str, ...]:
    """Return the words that repeat the search: every argument that is not what it is anyway.

    Files stand by their last names, and hosts by none. What says how it was run and not what (the folder, what is kept
    in it, whether it was begun anew) is no part of it.
    """
    words: list[str] = []
    for name, parameter in signature.parameters.items():
        value = tuple(given[name]) if isinstance(given[name], list) else given[name]
        if name in _NOT_REPEATED or not (value if parameter.default is None else value != parameter.default):
            continue
        option = "--" + _SHORTER.get(name, name).replace("_", "-")
        if name == "on":
            words += [f"{option}=ssh://HOST/DIR"] * len(value)
        elif isinstance(value, Mapping):
            words += [f"{option}=params.{key}={_toml(one)}" for key, one in value.items()]
        elif isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        elif isinstance(value, tuple):
            words += [f"{option}={one}" for one in value]
        else:
            words.append(f"{option}={_last_name(value) if name in _FILES else value}")
    return ("edgecomp", "search", *words)


def _last_name(value: str | Path) -> str:
    return Path(value).resolve().name


def _toml(value: object) -> str:
    """Return a value as `--set` reads it."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
