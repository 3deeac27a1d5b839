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
    network_inputs,
    network_outputs,
    parse_onnx,
    require_precision,
    require_static,
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
    """An engine on disk; `reused` tells that it was there already and nothing was built."""

    path: Path
    record: EngineRecord
    reused: bool


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
    force: bool = False,
    progress: Callable[[str], None],
) -> BuiltEngine:
    """Build `<out_dir>/<stem of onnx>.<runtime>.engine`, a raw plan, and its record beside it.

    An engine that is there is kept when its record names the same inputs and its hash is the recorded one. The
    files appear at once and whole, also when the build is interrupted.

    Args:
        onnx: the graph; its external data lies in the same folder.
        out_dir: where the engine goes; made when it is missing.
        target: the device that the engine is for.
        runtime: "tensorrt", "rtx" or "auto".
        precision: the word that the graph was exported with. It does not change the graph's types: it is checked.
        onnx_sha256: hash of the graph, from the bundle's manifest.
        weights_sha256: hash of the external data, or "" where there is none.
        workspace_mib: the most scratch memory for a layer; 0 leaves the builder's own limit.
        force: build even when nothing changed.
        progress: receives a line for each step.
    """
    if workspace_mib < 0:
        raise BuildError(f"workspace_mib={workspace_mib} is negative; give MiB, or 0 for the builder's own limit")
    flavour = load_flavour(choose_flavour(target, runtime))
    _require_target_runs(precision, target, flavour.name)
    engine = out_dir / f"{onnx.stem}.{flavour.name}.engine"
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
    reason = "a rebuild was asked for" if force else _why_rebuild(engine, inputs)
    if not reason:
        progress(f"{engine.name}: kept, nothing changed since it was built")
        return BuiltEngine(engine, read_record(engine), reused=True)
    progress(f"{engine.name}: building with {flavour.name} {flavour.version} for SM{target.sm} ({reason})")
    plan, measured = _build_plan(flavour, onnx, sms=(target.sm,), precision=precision, workspace_mib=workspace_mib)
    fields = {"schema": 1, **inputs, **measured, "edgecomp_version": __version__}
    record = msgspec.convert(fields, EngineRecord)
    _write_pair(engine, plan, record)
    warned = f", {len(record.warnings)} warnings" if record.warnings else ""
    progress(f"{engine.name}: {record.size_bytes} bytes in {record.seconds:.1f} s{warned}")
    return BuiltEngine(engine, record, reused=False)


def _require_target_runs(precision: str, target: Target, runtime: str) -> None:
    """Refuse a type that the hardware has not; TensorRT says so late in the build, or not at all."""
    if runtime == "rtx" and target.sm == _TURING and precision == "fp32":
        raise TargetMismatch(
            f"TensorRT for RTX has no fp32 matrix product for {target.name} (SM{target.sm}; tried with 1.7.1), and the "
            f"graph is fp32; full TensorRT has it: build on a machine with that GPU and TensorRT, with --runtime tensorrt"
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
    flavour: Flavour, onnx: Path, *, sms: tuple[int, ...], precision: str, workspace_mib: int
) -> tuple[memoryview, dict[str, object]]:
    """Return the plan, and the fields of its record that are known only after building."""
    if not onnx.is_file():
        raise BuildError(f"there is no file {onnx}; export the model first")
    start = time.monotonic()
    logger = collecting_logger(flavour)
    builder = flavour.module.Builder(logger)
    network = create_network(flavour, builder)
    parser = parse_onnx(flavour, network, logger, onnx)
    require_static(network, onnx)
    require_precision(flavour, network, onnx, precision)
    config = create_config(flavour, builder, sms=sms, precision=precision, workspace_mib=workspace_mib)
    serialized = builder.build_serialized_network(network, config)
    del parser  # it owns the weights until here
    if serialized is None:
        errors = "; ".join(logger.errors[-_ERRORS_SHOWN:]) or "the builder gives no reason"
        raise BuildError(f"{onnx.name} does not build with {flavour.name} {flavour.version}: {errors}")
    plan = memoryview(serialized).cast("B")
    return plan, {
        "seconds": round(time.monotonic() - start, 3),
        "num_layers": network.num_layers,
        "size_bytes": plan.nbytes,
        "sha256": hashlib.sha256(plan).hexdigest(),
        "warnings": tuple(logger.warnings),
        "inputs": network_inputs(network),
        "outputs": network_outputs(network),
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
