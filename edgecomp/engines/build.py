"""Builds an engine from an ONNX file, unless the one that is there was built from the same things."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import msgspec

from edgecomp import __version__
from edgecomp.engines.adapter import (
    Flavour,
    FlavourName,
    create_config,
    create_network,
    has_product,
    read_engine,
    watch,
)
from edgecomp.engines.flavour import choose_flavour, load_flavour
from edgecomp.engines.gpu import local_gpu_sm
from edgecomp.engines.inspector import confirm
from edgecomp.engines.memory import require_memory
from edgecomp.engines.network import (
    collecting_logger,
    count_layer_types,
    network_inputs,
    network_outputs,
    parse_onnx,
    require_static,
)
from edgecomp.engines.plugin_use import (
    PluginChoice,
    SizeAboveLimit,
    choose_libraries,
    copy_library,
    find_plugin_nodes,
    graph_for_plugins,
    loaded_plugins,
    require_plugin_layers,
    without_libraries,
)
from edgecomp.engines.proof import prove
from edgecomp.engines.record import EngineRecord, read_record, sidecar_path
from edgecomp.engines.settings import OWN_SETTINGS, BuilderSettings
from edgecomp.engines.timing import TimingCache, choose_timing_cache, load_timing_cache, store_timing_cache
from edgecomp.engines.watching import Watch, interruptible, no_collection
from edgecomp.errors import BuildError, TargetMismatch
from edgecomp.lock import bundle_lock
from edgecomp.specs.origin import file_sha256
from edgecomp.specs.target import Target

__all__ = ["BuiltEngine", "EngineRecord", "build_engine", "read_record", "require_target_runs"]

_ASKED = "a rebuild was asked for"
_ERRORS_SHOWN = 5
_FIRST_SM = {"bf16": 80, "fp8": 89, "fp4": 100}  # the first hardware with such matrix products
_SHORTEST_SHOWN = 40  # characters of a changed value; a hash is longer


@dataclasses.dataclass(frozen=True)
class BuiltEngine:
    """An engine on disk.

    Attributes:
        path: the plan.
        record: what is known about it.
        reused: it was there already, and nothing was built.
        plugins: one line for each op that a plugin could run: what runs it, and why.
        notes: what the user should know of how it was built: why again, a timing cache or a lock that was left out.
        differing_bytes: of a second build from the first, where one was asked for; -1: the sizes differ.
    """

    path: Path
    record: EngineRecord
    reused: bool
    plugins: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    differing_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class _Job:
    """One engine to build: what it is made of, what it is made with, and how it is told."""

    flavour: Flavour
    onnx: Path
    weights: Path
    out_dir: Path
    inputs: dict[str, Any]
    settings: BuilderSettings
    fp32_nodes: Collection[str]
    timing: TimingCache | None
    choices: tuple[PluginChoice, ...]
    progress: Callable[[str], None]
    notes: list[str]

    def note(self, line: str) -> None:
        """Tell a line now, and in the report."""
        self.notes.append(line)
        self.progress(line)


def build_engine(
    onnx: Path,
    out_dir: Path,
    *,
    target: Target,
    runtime: str,
    precision: str,
    onnx_sha256: str,
    weights: Path | None = None,
    weights_sha256: str = "",
    weight_bytes: int = 0,
    fp32_nodes: Collection[str] = (),
    settings: BuilderSettings = OWN_SETTINGS,
    timing_cache: str = "auto",
    plugin: str = "auto",
    force: bool = False,
    force_memory: bool = False,
    check_stable: bool = False,
    progress: Callable[[str], None],
) -> BuiltEngine:
    """Build `<out_dir>/<stem of onnx>.<runtime>.engine`, a raw plan, and its record beside it.

    Where a plugin runs nodes of the graph, the plan is named `.<runtime>.plugin.engine`, so that both kinds stay, and
    the library is copied beside it. An engine that is there is kept when its record names the same inputs and its
    hash is the recorded one. The files appear at once and whole, also when the build is interrupted.

    Args:
        onnx: the graph.
        out_dir: where the engine goes; made when it is missing.
        target: the device that the engine is for.
        runtime: "tensorrt", "rtx" or "auto".
        precision: the word that the graph was exported with. It does not change the graph's types: it is proven.
        onnx_sha256: hash of the graph, from the bundle's manifest.
        weights: folder of the external data; none: it lies beside the graph.
        weights_sha256: hash of the external data, or "" where there is none.
        weight_bytes: size of the external data, for the estimate of memory.
        fp32_nodes: names of the nodes that stay in fp32 on purpose; they may belong to other graphs of the bundle.
        settings: what the builder may use.
        timing_cache: "auto", "off" or a file.
        plugin: "auto" takes a library that is compiled for the target, "require" compiles one or fails, "off" takes
            none; a path that ends in `.so` takes that library.
        force: build even when nothing changed.
        force_memory: build even where the memory is likely not to suffice.
        check_stable: build once more, in memory alone, and compare.
        progress: receives a line for each step.
    """
    flavour = load_flavour(choose_flavour(target, runtime))
    require_target_runs(precision, target, flavour.name)
    timing = choose_timing_cache(timing_cache, flavour, target=target.name, sm=target.sm)
    found = find_plugin_nodes(onnx)
    choices = choose_libraries(onnx, found, plugin, sm=target.sm, flavour=flavour, progress=progress)
    islands = "\n".join(sorted(fp32_nodes))
    inputs = {
        "model": onnx.name,
        "onnx_sha256": onnx_sha256,
        "weights_sha256": weights_sha256,
        "target": target.name,
        "runtime": flavour.name,
        "runtime_version": flavour.version,
        "sm": (target.sm,),
        "precision": precision,
        "fp32_nodes_sha256": hashlib.sha256(islands.encode()).hexdigest() if islands else "",
        **msgspec.structs.asdict(settings),
    }
    job = _Job(
        flavour, onnx, weights or onnx.parent, out_dir, inputs, settings, fp32_nodes, timing, choices, progress, []
    )

    def guard() -> None:
        if not force_memory and onnx.is_file():
            size = onnx.stat().st_size + weight_bytes
            require_memory(onnx, size, target, settings, local_sm=local_gpu_sm())

    try:
        return _build_or_keep(job, guard, force=force, check_stable=check_stable)
    except SizeAboveLimit as error:
        if plugin != "auto":
            raise
        job = dataclasses.replace(job, choices=without_libraries(choices, str(error)))
        progress(job.choices[0].line)
        return _build_or_keep(job, guard, force=force, check_stable=check_stable)


def require_target_runs(precision: str, target: Target, runtime: FlavourName | None = None) -> None:
    """Refuse a type that the hardware has not; TensorRT says so late in the build, or not at all.

    Args:
        precision: the word that the graph was exported with.
        target: the device.
        runtime: the flavour, where it is known already.
    """
    first = _FIRST_SM.get(precision, 0)
    has = tuple(word for word in target.precisions if target.sm >= _FIRST_SM.get(word, 0))
    if precision != "fp32" and precision not in has:
        since = f"; {precision} begins with SM{first}" if target.sm < first else ""
        raise TargetMismatch(
            f"{target.name} (SM{target.sm}) does not run {precision}; it runs {', '.join(has)}{since}. "
            f"Export the model with one of these"
        )
    if runtime and not has_product(runtime, target.sm, precision):
        raise TargetMismatch(
            f"TensorRT for RTX has no {precision} matrix product for {target.name} (SM{target.sm}; tried with 1.7.1), "
            f"and the graph is {precision}; full TensorRT has it: build where that GPU and TensorRT are, with "
            f"--runtime tensorrt"
        )


def _build_or_keep(job: _Job, guard: Callable[[], None], *, force: bool, check_stable: bool) -> BuiltEngine:
    """Build one engine with these libraries, unless it is there."""
    plugins = tuple(one for choice in job.choices if (one := choice.record()) is not None)
    kind = f"{job.flavour.name}.plugin" if plugins else job.flavour.name
    engine = job.out_dir / f"{job.onnx.stem}.{kind}.engine"
    job = dataclasses.replace(job, inputs={**job.inputs, "plugins": plugins})
    lines = tuple(choice.line for choice in job.choices)
    if force or _why_rebuild(engine, job.inputs):
        guard()
        with bundle_lock(job.out_dir, "build", say=job.note), _no_empty_folder(job.out_dir):
            # Once more: the build of another process may have ended while this one began.
            reason = _ASKED if force else _why_rebuild(engine, job.inputs)
            if reason:
                _require_writable(job.out_dir)
                return _build(job, engine, reason, lines, check_stable=check_stable)
    for choice in job.choices:
        copy_library(choice, job.out_dir)
    job.progress(f"{engine.name}: kept, nothing changed since it was built")
    differing = None
    if check_stable:
        guard()
        job.progress(f"{engine.name}: building again to compare")
        differing = _count_differing(engine, _build_plan(job, engine.name)[0])
    return BuiltEngine(engine, read_record(engine), True, lines, tuple(job.notes), differing)


def _require_writable(folder: Path) -> None:
    """Refuse a folder before minutes are spent on what it cannot hold."""
    probe = folder / f".{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BuildError(f"{folder} cannot be written: {error.strerror}; {_remedy(error)}") from None


def _remedy(error: OSError) -> str:
    return "free space" if error.errno == errno.ENOSPC else "copy the bundle to a folder that can be written"


@contextlib.contextmanager
def _no_empty_folder(folder: Path) -> Iterator[None]:
    """Remove the folders that a block made and put nothing into."""
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        yield
    finally:
        for one in made:
            with contextlib.suppress(OSError):  # not empty: engines are in it
                one.rmdir()


def _build(job: _Job, engine: Path, reason: str, lines: tuple[str, ...], *, check_stable: bool) -> BuiltEngine:
    """Build an engine and write it; the lock is held."""
    _remove_leftovers(engine)
    sms = ", ".join(f"SM{sm}" for sm in job.inputs["sm"])
    job.progress(f"{engine.name}: building with {job.flavour.name} {job.flavour.version} for {sms} ({reason})")
    if reason != _ASKED and (engine.exists() or sidecar_path(engine).exists()):
        job.notes.append(f"built again: {reason}")
    plan, measured = _build_plan(job, engine.name)
    fields = {"schema": 1, **job.inputs, **measured, "edgecomp_version": __version__}
    record = msgspec.convert(fields, EngineRecord)
    for choice in job.choices:
        copy_library(choice, job.out_dir)
    _write_pair(engine, plan, record)
    del plan
    warned = f", {len(record.warnings)} warnings" if record.warnings else ""
    job.progress(f"{engine.name}: {record.size_bytes} bytes in {record.seconds:.1f} s{warned}")
    differing = None
    if check_stable:
        job.progress(f"{engine.name}: building once more to compare")
        differing = _count_differing(engine, _build_plan(job, engine.name)[0])
    return BuiltEngine(engine, record, False, lines, tuple(job.notes), differing)


def _count_differing(engine: Path, plan: memoryview) -> int:
    """Return how many bytes of a plan differ from the file; -1 where the sizes do."""
    first = engine.read_bytes()
    if len(first) != plan.nbytes:
        return -1
    if memoryview(first) == plan:
        return 0
    step = 1 << 16
    pieces = ((first[at : at + step], plan[at : at + step]) for at in range(0, len(first), step))
    return sum(a != b for one, other in pieces if one != other for a, b in zip(one, other, strict=True))


def _why_rebuild(engine: Path, inputs: dict[str, Any]) -> str:
    """Return the reason why the engine that is there cannot be kept, or "" when it can."""
    if not engine.is_file():
        return "there is none yet"
    try:
        record = read_record(engine)
    except BuildError as error:
        return str(error)
    changed = [_change(name, getattr(record, name), value) for name, value in inputs.items()]
    if any(changed):
        return f"changed: {', '.join(filter(None, changed))}"
    if record.proof is None:
        return "its record holds no proof of precision"
    if engine.stat().st_size != record.size_bytes or file_sha256(engine) != record.sha256:
        return "the file is not the one that its record describes"
    return ""


def _change(name: str, before: object, now: object) -> str:
    """Return what changed: the name, and both values where they are short."""
    if before == now:
        return ""
    values = str(before), str(now)
    return name if max(map(len, values)) > _SHORTEST_SHOWN else f"{name} {values[0]} -> {values[1]}"


def _build_plan(job: _Job, label: str) -> tuple[memoryview, dict[str, object]]:
    """Return the plan, and the fields of its record that are known only after building."""
    flavour, onnx = job.flavour, job.onnx
    if not onnx.is_file():
        raise BuildError(f"there is no file {onnx}; export the model first")
    start = time.monotonic()
    logger = collecting_logger(flavour)
    with contextlib.ExitStack() as stack:
        stack.enter_context(no_collection())
        builder = flavour.module.Builder(logger)
        stack.enter_context(loaded_plugins(builder, job.choices))
        network = create_network(flavour, builder)
        content = graph_for_plugins(flavour, onnx, job.choices)
        parser = parse_onnx(flavour, network, logger, onnx, weights=job.weights, content=content)
        require_static(network, onnx)
        proof, products = prove(flavour, network, onnx, job.inputs["precision"], job.fp32_nodes)
        merges = require_plugin_layers(flavour, network, onnx, job.choices)
        config = create_config(
            flavour, builder, sms=job.inputs["sm"], precision=job.inputs["precision"], settings=job.settings
        )
        started_from = load_timing_cache(job.timing, config, logger, job.note)
        seen = Watch(label, job.progress)
        monitor = watch(flavour, config, seen.step)
        with interruptible(seen):
            serialized = builder.build_serialized_network(network, config)
        known = {
            "num_layers": network.num_layers,
            "layer_types": count_layer_types(network),
            "merges": merges,
            "inputs": network_inputs(network),
            "outputs": network_outputs(network),
            "timing_cache": started_from,
        }
        if serialized is None:
            errors = "; ".join(logger.errors[-_ERRORS_SHOWN:]) or "the builder gives no reason"
            raise BuildError(f"{onnx.name} does not build with {flavour.name} {flavour.version}: {errors}")
        store_timing_cache(job.timing, config, job.note)
        plan = memoryview(serialized).cast("B")
        if local_gpu_sm() in job.inputs["sm"]:
            outputs = [tensor.name for tensor in network_outputs(network)]
            information = read_engine(flavour, logger, plan)
            if information:
                proof = confirm(proof, products, information, onnx, outputs=outputs)
        del parser, network, monitor  # the parser owns the weights until here; plugin layers go before their library
    return plan, {
        "seconds": round(time.monotonic() - start, 3),
        "size_bytes": plan.nbytes,
        "sha256": hashlib.sha256(plan).hexdigest(),
        "warnings": tuple(logger.warnings),
        "proof": proof,
        **known,
    }


def _remove_leftovers(engine: Path) -> None:
    """Remove what a killed build left half-written; the lock says that nobody is writing now."""
    for file in (engine, sidecar_path(engine)):
        for left in file.parent.glob(f".{file.name}.*.tmp"):
            left.unlink(missing_ok=True)


def _write_pair(engine: Path, plan: memoryview, record: EngineRecord) -> None:
    """Write the plan and then its record, each under another name first.

    The old record goes before the new plan comes: what an interruption can leave is a plan without a record,
    which the next build replaces, and never a record that describes another plan.
    """
    sidecar = sidecar_path(engine)
    unique = f".{os.getpid()}-{secrets.token_hex(4)}.tmp"
    new_plan, new_sidecar = engine.with_name(f".{engine.name}{unique}"), engine.with_name(f".{sidecar.name}{unique}")
    try:
        engine.parent.mkdir(parents=True, exist_ok=True)
        _write(new_plan, plan)
        _write(new_sidecar, msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")
        sidecar.unlink(missing_ok=True)
        os.replace(new_plan, engine)
        os.replace(new_sidecar, sidecar)
    except OSError as error:
        raise BuildError(
            f"{engine} cannot be written ({plan.nbytes} bytes): {error.strerror}; {_remedy(error)}"
        ) from error
    finally:
        new_plan.unlink(missing_ok=True)
        new_sidecar.unlink(missing_ok=True)


def _write(path: Path, content: Any) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
