"""How `profile` measures one model: the plan, and a runner that is opened, warmed up and timed."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgecomp.api._torch import TORCH
from edgecomp.engines import load_flavour
from edgecomp.errors import EdgecompError, InvalidSpec, UnknownName
from edgecomp.images import PixelType, read_image, to_pixels
from edgecomp.profiles.latency import (
    LatencyProfile,
    Mode,
    Stage,
    measure_latency,
    percentile_name,
    queries_needed,
    require_mode,
    require_percent,
)
from edgecomp.profiles.monitor import Monitor
from edgecomp.profiles.peak import begin_peak, read_peak_mib
from edgecomp.profiles.recognise import target_of
from edgecomp.profiles.stability import judge_state
from edgecomp.profiles.state import energy_per_run_mj
from edgecomp.resources import photograph_path
from edgecomp.runners import Array, Runner, require_threads, runner_names
from edgecomp.runners.layers import require_profiler
from edgecomp.specs.preprocess import Preprocess

__all__ = ["Plan", "command_of", "measure_opened", "short_of", "target_named", "time_preprocessing", "utc_now"]

_LONGEST_S = 3600
_MOST_RUNS = 100_000  # where no more are asked for
_MOST_ASKED = 10_000_000
_ENGINES = ("tensorrt", "rtx")


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked of `profile`; see there.

    Attributes:
        percentile: the one that is asked for; 0: none in particular.
        runs: least samples.
        cuda_graph: launch engines as one CUDA graph.
        per_layer: ask the runtime's profiler for each layer.
        ablate: time graphs that end after each block.
        original: time the PyTorch original, too.
        weights, backbone_weights, then_weights: what torch's models are made of again.
        stages: time preprocessing and copies by themselves.
    """

    runner: str = "onnxruntime"
    threads: int = 0
    duration_s: float = 3.0
    runs: int = 20
    warmup_s: float = 2.0
    mode: Mode = "single-stream"
    streams: int = 1
    percentile: float = 0.0
    cuda_graph: bool = False
    stages: bool = True
    original: bool = False
    per_layer: bool = False
    ablate: bool = False
    weights: str = "random"
    backbone_weights: str = "random"
    then_weights: str = "random"

    def require(self) -> None:
        """Refuse what cannot be measured, before anything is loaded."""
        if not 0 < self.duration_s <= _LONGEST_S:
            raise InvalidSpec(f"duration {self.duration_s} s is not above 0 and at most {_LONGEST_S} s")
        if not 0 <= self.warmup_s <= _LONGEST_S:
            raise InvalidSpec(f"warm-up {self.warmup_s} s is not from 0 (none) to {_LONGEST_S} s")
        if not 1 <= self.runs <= _MOST_ASKED:
            raise InvalidSpec(f"{self.runs} runs are not from 1 to {_MOST_ASKED:,}; a result holds a sample at least")
        if self.percentile:
            require_percent(self.percentile)
        require_threads(self.threads)
        require_mode(self.mode, self.streams)
        if self.runner not in (*runner_names(), TORCH):
            raise UnknownName("runner", self.runner, (*runner_names(), TORCH))
        if self.per_layer:
            require_profiler(self.runner)
        if self.ablate and self.runner == TORCH:
            raise InvalidSpec("--ablate with runner torch: it cuts graphs; use onnxruntime, or an engine's runner")
        if self.cuda_graph and self.runner not in _ENGINES:
            raise InvalidSpec(
                f"--cuda-graph with runner {self.runner}: a CUDA graph records what TensorRT launches on the GPU, and "
                f"{'nothing is launched on one there' if self.runner in ('onnxruntime', TORCH) else 'it has its own'}; "
                "leave it out, or use --runner tensorrt or rtx"
            )

    @property
    def on_gpu(self) -> bool:
        """The runner uses a GPU."""
        return self.runner in (*_ENGINES, "onnxruntime-cuda")


def measure_opened(
    plan: Plan,
    opened: Callable[[], Runner],
    inputs: Mapping[str, Array],
    *,
    model: str,
    batch: int,
    say: Callable[[str], None],
    is_first: bool = False,
    **described: Any,
) -> LatencyProfile:
    """Open a model and time it.

    Streams share the session of ONNX Runtime, and the model of torch: one copy of the weights, and one pool of
    `threads` threads, as a server would have it. Each stream has an engine of TensorRT of its own, since its context
    and its buffers serve one run at a time.

    Args:
        opened: loads the model; called once for each stream that cannot share.
        inputs: by name; those that the model does not take are left out.
        say: is told what a reader of the times must know of the outputs.
        is_first: nothing was loaded in this process before, so that the most memory it held is this model's.
        described: further fields of the profile.
    """
    _import_runtime(plan.runner)  # or the first model's time to load would be that of the package
    marks_peak, monitor = is_first and begin_peak(), Monitor()
    with ExitStack() as stack:
        begin = time.perf_counter_ns()
        first = stack.enter_context(opened())
        load_us = (time.perf_counter_ns() - begin) / 1000
        others = [stack.enter_context(opened()) if plan.runner in _ENGINES else first for _ in range(plan.streams - 1)]
        given = {name: inputs[name] for name in first.input_names}
        runs = [lambda one=one: one.infer(given) for one in (first, *others)]
        profile = measure_latency(
            runs[0],
            others=runs[1:],
            mode=plan.mode,
            batch=batch,
            model=model,
            runner=first.version,
            threads=plan.threads,
            duration_s=plan.duration_s,
            min_runs=plan.runs,
            max_runs=max(plan.runs, _MOST_RUNS),
            warmup_s=plan.warmup_s,
            percents=(plan.percentile,) if plan.percentile else (),
            watch=monitor,
        )
        peak = read_peak_mib() if marks_peak else None
        parts = _parts(first, given) if plan.stages else ()
        if odd := _not_finite(first.infer(given)):
            say(f"{model} gives NaN or Inf in {', '.join(odd)} on these inputs; its time may be another on good ones")
    watch = monitor.watch
    in_use = [state.gpu.memory_used_mib for state in (watch.before, watch.after) if state.gpu is not None]
    inferences = profile.num_samples * (plan.streams if plan.mode == "multi-stream" else 1)
    return msgspec.structs.replace(
        profile,
        load_us=load_us,
        watch=watch,
        stability=judge_state(
            watch.before,
            watch.after,
            watch,
            device="gpu" if plan.on_gpu else "cpu",
            times_us=profile.samples_us if plan.mode != "offline" else (),  # there streams end in any order
        ),
        energy_mj=energy_per_run_mj(watch, runs=inferences),
        host_peak_mib=peak,
        device_peak_mib=max((mib for mib in in_use if mib is not None), default=None) if plan.on_gpu else None,
        cuda_graph=plan.cuda_graph if plan.on_gpu else None,
        stages=parts,
        **described,
    )


def _import_runtime(runner: str) -> None:
    """Import what a runner runs on; whoever opens it says what is missing."""
    with suppress(ImportError, EdgecompError):
        if runner in _ENGINES:
            load_flavour(runner)
        else:
            importlib.import_module("edgecomp.export.retrace" if runner == TORCH else "onnxruntime")


def _not_finite(outputs: Mapping[str, Array]) -> list[str]:
    """Return the names of outputs with a NaN or an infinity."""
    return [name for name, value in outputs.items() if value.dtype.kind == "f" and not np.isfinite(value).all()]


def short_of(plan: Plan, profile: LatencyProfile) -> str:
    """Return what is missing for the percentile that was asked for; "" where nothing is, or none was."""
    needed, name = queries_needed(plan.percentile), percentile_name(plan.percentile)
    if not plan.percentile or profile.num_samples >= needed:
        return ""
    minutes = needed * profile.duration_s / profile.num_samples / 60
    way = (
        f"about {minutes:.1f} min here: --runs {needed}"
        if needed <= _MOST_ASKED
        else f"more than the {_MOST_ASKED:,} that one result can hold: it stays a figure to go by"
    )
    return (
        f"{name} of {profile.model} is indicative: it was asked for, and {profile.num_samples:,} samples do not carry "
        f"it; MLPerf's rules ask for {needed:,}, {way}"
    )


def command_of(subject: Path, plan: Plan, **words: Any) -> tuple[str, ...]:
    """Return the words that repeat the run, without those that say what is so anyway."""
    usual = msgspec.structs.asdict(Plan())
    given = {name: value for name, value in msgspec.structs.asdict(plan).items() if value != usual[name]}
    given |= {name: value for name, value in words.items() if value is not None}
    options = []
    for name, value in given.items():
        option = name.removesuffix("_s").replace("_", "-")
        if isinstance(value, bool):
            options.append(f"--{option}" if value else f"--no-{option}")
        else:
            # weights are a file of this machine, whose place is nobody's business
            options.append(f"--{option}={Path(value).name if name.endswith('weights') else value}")
    return ("edgecomp", "profile", subject.resolve().name, *options)


def target_named(plan: Plan, profile: LatencyProfile) -> str:
    """Return the target that was measured, or what stands for it in a folder of results."""
    state = profile.watch.before if profile.watch is not None else None
    gpu, jetson = (state.gpu, state.jetson) if state is not None else (None, None)
    name = gpu.name if gpu is not None else ""
    return target_of(
        gpu=f"{name} MIG" if gpu is not None and gpu.mig_instance else name,
        board=jetson.model if jetson is not None else "",
        memory_gib=(jetson.ram_total_mib or 0) / 1024 if jetson is not None else 0.0,
        power_mode=jetson.power_mode if jetson is not None else "",
        on_gpu=plan.on_gpu,
    )


def utc_now() -> str:
    """Return the time as results state it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")


def _parts(runner: Runner, given: dict[str, Array]) -> tuple[Stage, ...]:
    """Return what the parts of a run take, where the runner can tell."""
    time_parts = getattr(runner, "time_parts", None)
    if time_parts is None:
        return ()
    return tuple(Stage(name, us, how) for name, us, how in time_parts(given))


def time_preprocessing(preprocess: Preprocess, dtype: PixelType, *, runs: int = 21) -> Stage:
    """Return what one image takes from its file on: decoding, resizing, and the numbers that the model reads."""
    times = []
    for _ in range(runs):
        begin = time.perf_counter_ns()
        to_pixels(read_image(photograph_path()), preprocess, dtype)
        times.append(time.perf_counter_ns() - begin)
    return Stage("preprocessing", statistics.median(times) / 1000, "one photograph, decoded and resized on the CPU")
