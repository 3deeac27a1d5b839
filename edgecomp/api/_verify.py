"""`edgecomp verify`: hashes, doctor, plugin, engines, parity and profile of a bundle, in one go, on its target."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from edgecomp.api._build import build, local_target
from edgecomp.api._doctor import doctor
from edgecomp.api._parity import parity
from edgecomp.api._plugin import plugin_build
from edgecomp.api._plugin_word import require_plugin_word
from edgecomp.api._profile import profile
from edgecomp.api._progress import Progress, silent
from edgecomp.bundle import MANIFEST, WEIGHTS, Bundle, open_bundle
from edgecomp.engines import (
    EngineRecord,
    Flavour,
    choose_flavour,
    find_plugin_nodes,
    installed_flavours,
    load_flavour,
    local_gpu_sm,
    read_record,
)
from edgecomp.engines.external import require_contained
from edgecomp.errors import BuildError, EdgecompError, InvalidSpec, MissingDependency, UnknownName
from edgecomp.lock import bundle_lock
from edgecomp.profiles.machine import Machine, read_machine
from edgecomp.report.verify import Stage, StageVerdict, VerifyReport
from edgecomp.resources import cache_dir, source_digest
from edgecomp.runners import require_threads, runner_names
from edgecomp.specs import Target, load_target
from edgecomp.specs.origin import file_sha256

__all__ = ["verify"]

_SCHEMA = 1
_TITLES = {"rtx": "TensorRT for RTX", "tensorrt": "TensorRT"}
_LARGEST_STATE = 64 << 20

Seen = tuple[StageVerdict, str, Any]


def verify(
    bundle: str | Path,
    *,
    target: str = "auto",
    runtime: str = "auto",
    runner: str = "auto",
    threads: int = 0,
    duration_s: float = 3.0,
    plugin: str = "auto",
    allow_plugin: Sequence[str] = (),
    build_engines: bool = True,
    fresh: bool = False,
    progress: Progress = silent,
) -> VerifyReport:
    """Hold a bundle to all that can be proven of it on this machine.

    Stages: the hashes of its files, and that no graph reads beyond them; what is installed; the plugin, where it is
    wanted; engines, built where they are missing or of another TensorRT or GPU; parity with the goldens; latency. A
    stage that does not apply says why. Parity and profile that passed before, with the same bundle, versions, machine
    and options, are not repeated; engines and plugins are kept by their own records.

    What passed is remembered in the user's cache and never in the bundle, which whoever made it could have filled.

    Args:
        bundle: the folder.
        target: a target's name, a TOML file, `none`, or `auto`: the GPU of this machine, and no engines where it has
            none.
        runtime: of the engines, as in `build`.
        runner: as in `parity`, but for `torch`; `auto`: the engines, where they are built and run on the GPU here, and
            else `onnxruntime`. The report says which.
        threads: as in `parity`. duration_s: as in `profile`.
        plugin: as in `build`; `require` compiles it.
        allow_plugin: sha256 of plugin libraries inside the bundle that may be loaded, at least 12 digits.
        build_engines: False takes the engines that are there, and fails where one is missing or foreign.
        fresh: repeat what has passed before.
        progress: takes one line for each step.

    Returns:
        the report; `bool(report)` is the verdict. A stage that fails is a result, not an error.

    Raises:
        BundleError: there is no bundle. BundleBusy: another process writes it.
        UnknownName, InvalidSpec, TargetMismatch: the words do not fit this machine; nothing was run.
    """
    started = time.monotonic()
    require_threads(threads)
    if runner not in ("auto", *runner_names()):
        raise UnknownName("runner", runner, ("auto", *runner_names()))
    if not 0 < duration_s <= 3600:
        raise InvalidSpec(f"duration {duration_s} s is not above 0 and at most 3600 s")
    folder = Path(bundle)
    if not (folder / MANIFEST).is_file():
        open_bundle(folder)
    chosen = _target_of(target)
    require_plugin_word(folder, plugin, allow_plugin)
    with bundle_lock(folder, "verify", say=progress):
        run = _Run(
            folder, str(bundle), chosen, target, runtime, runner, threads, duration_s, plugin, allow_plugin, fresh,
            progress,
        )  # fmt: skip
        run.stages(build_engines=build_engines)
    return VerifyReport(
        schema=_SCHEMA,
        bundle=str(bundle),
        digest=run.digest,
        target=chosen.name if chosen is not None else "",
        runner=run.runner,
        verdict="fail" if any(stage.verdict == "fail" for stage in run.done) else "pass",
        stages=tuple(run.done),
        seconds=round(time.monotonic() - started, 3),
        machine=_machine_line(run.machine),
        notes=tuple(run.notes),
    )


class _Run:
    """One run: what is known so far, and the stages that are done."""

    def __init__(
        self, folder: Path, named: str, target: Target | None, asked: str, runtime: str, runner: str, threads: int,
        duration_s: float, plugin: str, allow_plugin: Sequence[str], fresh: bool, progress: Progress,
    ) -> None:  # fmt: skip
        self.folder, self.named, self.target, self.asked = folder, named, target, asked
        self.runtime, self.runner, self.threads, self.duration_s = runtime, runner, threads, duration_s
        self.plugin, self.allow_plugin, self.fresh, self.progress = plugin, allow_plugin, fresh, progress
        self.machine = read_machine()
        self.done: list[Stage] = []
        self.notes: list[str] = []
        self.digest = ""
        self.opened: Bundle | None = None
        self.state = Path()

    def stages(self, *, build_engines: bool) -> None:
        """Run all stages; without whole files nothing else is looked at."""
        if self._stage("hashes", self._hashes).verdict == "fail":
            left = ("doctor", "plugin", "engines", "parity", "profile")
            self.done += [Stage(name, "not reached", "the bundle is not whole", 0.0) for name in left]
            return
        self._stage("doctor", self._doctor)
        self._stage("plugin", self._plugin)
        engines = self._stage("engines", lambda: self._engines(build_engines=build_engines))
        if self.runner == "auto":
            self.runner = self._runner_of(engines)
        words = f"{self.runner}, {self.threads} threads"
        if not self.runner.startswith("onnxruntime"):  # it runs the plans, so they decide the result
            words += f", {[record.sha256 for _, record in self._plans_of_target()]}"
        elif engines.verdict == "pass":
            self.notes.append(f"the engines were not run: parity and latency are those of {self.runner}")
        self._stage("parity", self._parity, key=f"parity: {words}")
        self._stage("profile", self._profile, key=f"profile: {words}, {self.duration_s:g} s")

    def _runner_of(self, engines: Stage) -> str:
        """Return what runs the engines where they run here; else ONNX Runtime."""
        if engines.verdict == "pass" and self.target is not None and local_gpu_sm() == self.target.sm:
            return choose_flavour(self.target, self.runtime)
        return "onnxruntime"

    def _stage(self, name: str, action: Callable[[], Seen], *, key: str = "") -> Stage:
        """Run a stage, or take what is remembered under its key."""
        self.progress(name)
        remembered = self._remembered().get(key) if key and not self.fresh else None
        if remembered is not None:
            stage = msgspec.structs.replace(remembered, resumed=True)
        else:
            started = time.monotonic()
            verdict: StageVerdict
            try:
                verdict, reason, result = action()
            except (EdgecompError, OSError, MemoryError) as error:
                verdict, reason, result = "fail", str(error) or type(error).__name__, None
            stage = Stage(name, verdict, reason, round(time.monotonic() - started, 3), False, _plain(result))
            if key and verdict == "pass":
                self._remember(key, stage)
        self.done.append(stage)
        return stage

    # -- stages --

    def _hashes(self) -> Seen:
        opened = open_bundle(self.folder)
        inside = require_contained(opened)
        self.opened, self.digest = opened, opened.manifest.digest
        facts = [self.digest, source_digest(), _facts_of(self.machine)]
        key = hashlib.sha256(msgspec.json.encode(facts, order="sorted")).hexdigest()
        self.state = cache_dir() / "verify" / f"{key[:32]}.json"
        count = len(opened.manifest.files)
        return "pass", f"{count} files as the manifest says; {inside} tensors, all inside {WEIGHTS}", None

    def _doctor(self) -> Seen:
        report = doctor()
        wrong = [
            f"{one.subject}: {one.detail} ({one.remedy})" for one in report.findings if one.status == "conflicting"
        ]
        missing = [one.subject for one in report.findings if one.status == "missing"]
        said = "; ".join(wrong) or f"nothing conflicts; not here: {', '.join(missing) or 'nothing'}"
        return "pass" if report else "fail", said, report

    def _plugin(self) -> Seen:
        assert self.opened is not None
        if self.target is None:
            return "not applicable", f"no engine is built ({self._why_no_target()})", None
        names = {n.plugin.name for g in self.opened.manifest.graphs for n in find_plugin_nodes(self.folder / g.model)}
        if not names:
            return "not applicable", "no graph has a node that a plugin runs", None
        if self.plugin != "require":
            said = {"auto": "taken where a fitting one is compiled", "off": "not wanted"}.get(self.plugin, "named")
            return "not applicable", f"--plugin {self.plugin}: {', '.join(sorted(names))} is {said}", None
        reports = [plugin_build(name, sm=[self.target.sm], progress=self.progress) for name in sorted(names)]
        lines = [
            f"{one.plugin} {'was compiled already' if one.reused else 'compiled'} for SM{self.target.sm}"
            for one in reports
        ]
        return "pass", "; ".join(lines), reports

    def _engines(self, *, build_engines: bool) -> Seen:
        assert self.opened is not None
        if self.target is None:
            return "not applicable", f"{self._why_no_target()}{_there(self.folder)}", None
        try:
            flavour = load_flavour(choose_flavour(self.target, self.runtime))
        except MissingDependency as error:
            if self.asked != "auto":
                raise
            return "not applicable", f"{error}{_there(self.folder)}", None
        foreign = _foreign_plans(self.folder, self.target, flavour)
        if not build_engines:
            return self._require_engines(self.opened, flavour, foreign)
        report = build(
            self.folder, target=self.asked, runtime=self.runtime, plugin=self.plugin, allow_plugin=self.allow_plugin,
            progress=self.progress,
        )  # fmt: skip
        kept = sum(engine.reused for engine in report.engines)
        said = (
            f"{len(report.engines) - kept} built, {kept} kept: {_TITLES[flavour.name]} {flavour.version} for "
            f"{self.target.name} (SM{self.target.sm})"
        )
        sm = local_gpu_sm()
        if sm != self.target.sm:
            said += f"; they cannot run here: {'there is no NVIDIA GPU' if sm is None else f'the GPU is SM{sm}'}"
        used = {engine.path.name for engine in report.engines}
        for name, why in foreign.items():
            said += f"; {why}: {'built again' if name in used else 'not used'}"
        return "pass", said, report

    def _require_engines(self, opened: Bundle, flavour: Flavour, foreign: dict[str, str]) -> Seen:
        """Refuse plans that are missing, altered, of another bundle, or foreign; nothing is built."""
        assert self.target is not None
        place, weights = self.folder / "engines" / self.target.name, opened.file(WEIGHTS).sha256
        wrong, fine = [], 0
        for graph in opened.manifest.graphs:
            stem = f"{Path(graph.model).stem}.{flavour.name}"
            plans = [plan for plan in (place / f"{stem}.engine", place / f"{stem}.plugin.engine") if plan.is_file()]
            problems = [foreign.get(plan.name) or _why_unfit(opened, plan, weights) for plan in plans]
            if not plans:
                wrong.append(f"there is no {stem}.engine in {place}")
            elif "" not in problems:
                wrong += problems
            fine += "" in problems
        if wrong:
            return "fail", f"{'; '.join(wrong)}; leave out --no-build to build here", None
        return "pass", f"{fine} engines are there, of {_TITLES[flavour.name]} {flavour.version} and this bundle", None

    def _plans_of_target(self) -> list[tuple[Path, EngineRecord]]:
        return _plans(self.folder / "engines" / self.target.name) if self.target is not None else []

    def _parity(self) -> Seen:
        report = parity(self.folder, runner=self.runner, threads=self.threads, progress=self.progress)
        worst, ties = report.worst, report.ties
        said = f"{len(report.outputs)} outputs in {report.version}"
        if report.emulated:
            said += f", emulated: fp32 that rounds as {report.precision} does"
        said += f", max rel error {worst.difference.max_rel:.2g} (allowed {report.tolerance.max_rel:g})"
        if ties:
            said += f"; {len(ties)} judged with the original's choices forced, since rounding may decide a choice"
        failed = [row for row in report.outputs if not row and row not in ties]
        problems = [f"{row.model}, {row.case}, {row.output}: {'; '.join(row.failures)}" for row in failed]
        for part in report.selection:
            problems += [
                f"{row.model}, {row.case}, {row.output}, choices forced: {'; '.join(row.failures)}"
                for row in part.forced
                if not row
            ]
            problems += [f"{one.model}, {one.case}, {one.where}: {one.failures[0]}" for one in part.choices if not one]
        if problems:
            said = f"{f'{len(failed)} of ' if failed else ''}{said}: {problems[0]}"
        return "pass" if report else "fail", said, report

    def _profile(self) -> Seen:
        assert self.opened is not None
        if self.runner == "onnxruntime" and (word := self.opened.manifest.unknown_to_cpu):
            why = f"ONNX Runtime on the CPU has no kernels for {word}, and the time of what stands in says nothing"
            return "not applicable", why, None
        report = profile(
            self.folder,
            runner=self.runner,
            threads=self.threads,
            duration_s=self.duration_s,
            stages=False,
            progress=self.progress,
        )
        return "pass", ", ".join(f"{one.model} {one.p50_us / 1000:.3f} ms" for one in report.profiles), report

    def _why_no_target(self) -> str:
        if self.asked == "none":
            return "--target none"
        return "there is no NVIDIA GPU on this machine, and --target names none"

    # -- what has passed before --

    def _remembered(self) -> dict[str, Stage]:
        try:
            if self.state.stat().st_size > _LARGEST_STATE:
                return {}
            return msgspec.json.decode(self.state.read_bytes(), type=dict[str, Stage])
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return {}

    def _remember(self, key: str, stage: Stage) -> None:
        beside = self.state.with_name(f".{self.state.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            self.state.parent.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(msgspec.json.encode({**self._remembered(), key: stage}))
            os.replace(beside, self.state)
        except OSError as error:
            self.notes.append(f"{stage.name} is not remembered: {self.state} cannot be written ({error.strerror})")
        finally:
            with suppress(OSError):
                beside.unlink(missing_ok=True)


def _target_of(word: str) -> Target | None:
    """Return the target; None where there is nothing to build for."""
    if word == "none" or (word == "auto" and local_gpu_sm() is None):
        return None
    return local_target() if word == "auto" else load_target(word)


def _plans(folder: Path) -> list[tuple[Path, EngineRecord]]:
    """Return the plans below a folder that have a record."""
    found = []
    for plan in sorted(folder.glob("*.engine")):
        with suppress(BuildError):
            found.append((plan, read_record(plan)))
    return found


def _made(record: EngineRecord) -> str:
    sms = "/".join(f"SM{sm}" for sm in record.sm)
    return f"{_TITLES[record.runtime]} {record.runtime_version} for {record.target} ({sms})"


def _foreign_plans(folder: Path, target: Target, flavour: Flavour) -> dict[str, str]:
    """Return, by name, which plans of a target are of another TensorRT or GPU, naming both."""
    here = f"{_TITLES[flavour.name]} {flavour.version} for {target.name} (SM{target.sm})"
    return {
        plan.name: f"{plan.name} is of {_made(record)}, and here is {here}"
        for plan, record in _plans(folder / "engines" / target.name)
        if (record.runtime, record.runtime_version) != (flavour.name, flavour.version) or target.sm not in record.sm
    }


def _there(folder: Path) -> str:
    """Return a half sentence on plans that are there and cannot be used here; "" without any."""
    engines = folder / "engines"
    found = [one for place in sorted(engines.iterdir()) for one in _plans(place)] if engines.is_dir() else []
    if not found:
        return ""
    kinds = "; ".join(dict.fromkeys(_made(record) for _, record in found))
    here = ", ".join(_TITLES[name] for name in installed_flavours()) or "no TensorRT"
    sm = local_gpu_sm()
    gpu = f"a GPU of SM{sm}" if sm is not None else "no NVIDIA GPU"
    return f"; {len(found)} plans are there, of {kinds}, and not used: this machine has {here} and {gpu}"


def _why_unfit(opened: Bundle, plan: Path, weights_sha256: str) -> str:
    """Return why a plan is not of this bundle, or ""."""
    try:
        record = read_record(plan)
    except BuildError as error:
        return str(error)
    known = {entry.name: entry.sha256 for entry in opened.manifest.files}
    if record.onnx_sha256 != known.get(record.model) or record.weights_sha256 != weights_sha256:
        return f"{plan.name} was built from another bundle"
    if record.sha256 != (seen := file_sha256(plan)):
        return f"{plan.name} has sha256 {seen[:12]} and its record says {record.sha256[:12]}"
    return ""


def _facts_of(machine: Machine) -> dict[str, Any]:
    """Return what of a machine decides a result; not its load, nor anything of its clock."""
    facts: dict[str, Any] = msgspec.to_builtins(machine)
    return {name: value for name, value in facts.items() if name not in _PASSING}


_PASSING = ("governor", "load_average", "memory_available_gib")


def _machine_line(machine: Machine) -> str:
    gpu = f", {machine.gpu} (driver {machine.gpu_driver})" if machine.gpu else ", no NVIDIA GPU"
    return f"{machine.cpu}, {machine.cores} cores{gpu}, {machine.os}, {machine.python}"


def _plain(value: Any) -> Any:
    return msgspec.to_builtins(value, enc_hook=str)
