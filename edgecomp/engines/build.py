"""Builds an engine from an ONNX file, unless the one that is there was built from the same things."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from edgecomp import __version__
from edgecomp.engines.flavour import Flavour, choose_flavour, create_config, create_network, load_flavour
from edgecomp.engines.network import (
    collecting_logger,
    count_layer_types,
    network_inputs,
    network_outputs,
    parse_onnx,
    require_precision,
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
from edgecomp.engines.record import EngineRecord, read_record, sidecar_path
from edgecomp.errors import BuildError, TargetMismatch
from edgecomp.specs.origin import file_sha256
from edgecomp.specs.target import Target

__all__ = ["BuiltEngine", "EngineRecord", "build_engine", "read_record"]

_ERRORS_SHOWN = 5
_TURING = 75


@dataclasses.dataclass(frozen=True)
class BuiltEngine:
    """An engine on disk.

    Attributes:
        path: the plan.
        record: what is known about it.
        reused: it was there already, and nothing was built.
        plugins: one line for each op that a plugin could run: what runs it, and why.
    """

    path: Path
    record: EngineRecord
    reused: bool
    plugins: tuple[str, ...] = ()


def build_engine(
    onnx: Path,
    out_dir: Path,
    *,
    target: Target,
    runtime: str,
    precision: str,
    onnx_sha256: str,
    weights_sha256: str = "",
    workspace_mib: int = 0,
    plugin: str = "auto",
    force: bool = False,
    progress: Callable[[str], None],
) -> BuiltEngine:
    """Build `<out_dir>/<stem of onnx>.<runtime>.engine`, a raw plan, and its record beside it.

    Where a plugin runs nodes of the graph, the plan is named `.<runtime>.plugin.engine`, so that both kinds stay, and
    the library is copied beside it. An engine that is there is kept when its record names the same inputs and its
    hash is the recorded one. The files appear at once and whole, also when the build is interrupted.

    Args:
        onnx: the graph; its external data lies in the same folder.
        out_dir: where the engine goes; made when it is missing.
        target: the device that the engine is for.
        runtime: "tensorrt", "rtx" or "auto".
        precision: the word that the graph was exported with. It does not change the graph's types: it is checked.
        onnx_sha256: hash of the graph, from the bundle's manifest.
        weights_sha256: hash of the external data, or "" where there is none.
        workspace_mib: the most scratch memory for a layer; 0 leaves the builder's own limit.
        plugin: "auto" takes a library that is compiled for the target, "require" compiles one or fails, "off" takes
            none; a path that ends in `.so` takes that library.
        force: build even when nothing changed.
        progress: receives a line for each step.
    """
    if workspace_mib < 0:
        raise BuildError(f"workspace_mib={workspace_mib} is negative; give MiB, or 0 for the builder's own limit")
    flavour = load_flavour(choose_flavour(target, runtime))
    _require_target_runs(precision, target, flavour.name)
    found = find_plugin_nodes(onnx)
    choices = choose_libraries(onnx, found, plugin, sm=target.sm, flavour=flavour, progress=progress)
    inputs = {
        "model": onnx.name,
        "onnx_sha256": onnx_sha256,
        "weights_sha256": weights_sha256,
        "target": target.name,
        "runtime": flavour.name,
        "runtime_version": flavour.version,
        "sm": (target.sm,),
        "precision": precision,
        "workspace_mib": workspace_mib,
    }
    try:
        return _build_or_keep(flavour, onnx, out_dir, inputs, choices, force=force, progress=progress)
    except SizeAboveLimit as error:
        if plugin != "auto":
            raise
        choices = without_libraries(choices, str(error))
        progress(choices[0].line)
        return _build_or_keep(flavour, onnx, out_dir, inputs, choices, force=force, progress=progress)


def _build_or_keep(
    flavour: Flavour,
    onnx: Path,
    out_dir: Path,
    inputs: dict[str, Any],
    choices: tuple[PluginChoice, ...],
    *,
    force: bool,
    progress: Callable[[str], None],
) -> BuiltEngine:
    """Build one engine with these libraries, unless it is there."""
    plugins = tuple(one for choice in choices if (one := choice.record()) is not None)
    kind = f"{flavour.name}.plugin" if plugins else flavour.name
    engine = out_dir / f"{onnx.stem}.{kind}.engine"
    inputs = {**inputs, "plugins": plugins}
    lines = tuple(choice.line for choice in choices)
    reason = "a rebuild was asked for" if force else _why_rebuild(engine, inputs)
    if not reason:
        for choice in choices:
            copy_library(choice, out_dir)
        progress(f"{engine.name}: kept, nothing changed since it was built")
        return BuiltEngine(engine, read_record(engine), reused=True, plugins=lines)
    sm = inputs["sm"]
    progress(f"{engine.name}: building with {flavour.name} {flavour.version} for SM{sm[0]} ({reason})")
    plan, measured = _build_plan(
        flavour, onnx, sms=sm, precision=inputs["precision"], workspace_mib=inputs["workspace_mib"], choices=choices
    )
    fields = {"schema": 1, **inputs, **measured, "edgecomp_version": __version__}
    record = msgspec.convert(fields, EngineRecord)
    for choice in choices:
        copy_library(choice, out_dir)
    _write_pair(engine, plan, record)
    warned = f", {len(record.warnings)} warnings" if record.warnings else ""
    progress(f"{engine.name}: {record.size_bytes} bytes in {record.seconds:.1f} s{warned}")
    return BuiltEngine(engine, record, reused=False, plugins=lines)


def _require_target_runs(precision: str, target: Target, runtime: str) -> None:
    """Refuse a type that the hardware has not; TensorRT says so late in the build, or not at all."""
    if runtime == "rtx" and target.sm == _TURING and precision == "fp32":
        raise TargetMismatch(
            f"TensorRT for RTX has no fp32 matrix product for {target.name} (SM{target.sm}; tried with 1.7.1), and the "
            "graph is fp32; full TensorRT has it: build where that GPU and TensorRT are, with --runtime tensorrt"
        )
    if precision != "fp32" and precision not in target.precisions:
        raise TargetMismatch(
            f"{target.name} (SM{target.sm}) does not run {precision}; it runs {', '.join(target.precisions)}. "
            f"Export the model with one of these"
        )


def _why_rebuild(engine: Path, inputs: dict[str, object]) -> str:
    """Return the reason why the engine that is there cannot be kept, or "" when it can."""
    if not engine.is_file():
        return "there is none yet"
    try:
        record = read_record(engine)
    except BuildError as error:
        return str(error)
    changed = [name for name, value in inputs.items() if getattr(record, name) != value]
    if changed:
        return f"changed: {', '.join(changed)}"
    if file_sha256(engine) != record.sha256:
        return "the file is not the one that its record describes"
    return ""


def _build_plan(
    flavour: Flavour,
    onnx: Path,
    *,
    sms: tuple[int, ...],
    precision: str,
    workspace_mib: int,
    choices: tuple[PluginChoice, ...],
) -> tuple[memoryview, dict[str, object]]:
    """Return the plan, and the fields of its record that are known only after building."""
    if not onnx.is_file():
        raise BuildError(f"there is no file {onnx}; export the model first")
    start = time.monotonic()
    logger = collecting_logger(flavour)
    builder = flavour.module.Builder(logger)
    with loaded_plugins(builder, choices):
        network = create_network(flavour, builder)
        parser = parse_onnx(flavour, network, logger, onnx, content=graph_for_plugins(flavour, onnx, choices))
        require_static(network, onnx)
        require_precision(flavour, network, onnx, precision)
        merges = require_plugin_layers(flavour, network, onnx, choices)
        config = create_config(flavour, builder, sms=sms, precision=precision, workspace_mib=workspace_mib)
        serialized = builder.build_serialized_network(network, config)
        known = {
            "num_layers": network.num_layers,
            "layer_types": count_layer_types(network),
            "merges": merges,
            "inputs": network_inputs(network),
            "outputs": network_outputs(network),
        }
        del parser, network  # the parser owns the weights until here, and plugin layers go before their library
    if serialized is None:
        errors = "; ".join(logger.errors[-_ERRORS_SHOWN:]) or "the builder gives no reason"
        raise BuildError(f"{onnx.name} does not build with {flavour.name} {flavour.version}: {errors}")
    plan = memoryview(serialized).cast("B")
    return plan, {
        "seconds": round(time.monotonic() - start, 3),
        "size_bytes": plan.nbytes,
        "sha256": hashlib.sha256(plan).hexdigest(),
        "warnings": tuple(logger.warnings),
        **known,
    }


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
            f"{engine} cannot be written ({plan.nbytes} bytes): {error.strerror}; free space, or choose another folder"
        ) from error
    finally:
        new_plan.unlink(missing_ok=True)
        new_sidecar.unlink(missing_ok=True)


def _write(path: Path, content: Any) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
