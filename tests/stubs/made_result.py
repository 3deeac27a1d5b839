"""Results as `edgecomp profile` would write them, from samples that a test chooses."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any
from unittest import mock

import msgspec

from edgecomp.profiles.latency import LatencyProfile, measure_latency
from edgecomp.profiles.machine import Machine
from edgecomp.profiles.result import Result, Subject

__all__ = ["MACHINE", "made_profile", "made_result"]

MACHINE = Machine(
    cpu="cpu",
    cores=4,
    governor="performance",
    load_average=(0.0, 0.0, 0.0),
    memory_gib=8.0,
    memory_available_gib=4.0,
    os="Linux",
    python="CPython 3.10.0",
    gpu="",
    gpu_driver="",
    versions={"numpy": "2.0"},
)


def made_profile(samples_us: Iterable[float] = (1000.0,) * 20, **changes: Any) -> LatencyProfile:
    """Return the profile of a graph whose runs took so long."""
    samples = list(samples_us)
    ends = iter([0, *itertools.accumulate(round(us * 1000) for us in samples)])
    now = [0]

    def run() -> None:
        now[0] = next(ends)

    next(ends)
    given = {"model": "model.m4.b1.onnx", "runner": "onnxruntime 1.27.0", "threads": 1, "batch": 1}
    count = len(samples)
    # where torch is loaded a collection takes half a second, and tests make hundreds of these
    with mock.patch("gc.collect"):
        profile = measure_latency(
            run, **given, warmup_runs=0, duration_s=0, min_runs=count, max_runs=count, clock=lambda: now[0]
        )
    described = {"role": "bucket", "tokens_in": 16, "tokens_out": 4, "precision": "fp32", "flops": 1_280_000}
    return msgspec.structs.replace(profile, **{**described, **changes})


def made_result(*profiles: LatencyProfile, **changes: Any) -> Result:
    """Return a result that holds these profiles; one of 20 equal samples where there are none."""
    fields: dict[str, Any] = {
        "created": "2026-11-22T12:00:00Z",
        "edgecomp": "0.1.0",
        "command": ("edgecomp", "profile", "small"),
        "target": "cpu",
        "subject": Subject(name="small", digest="d" * 64, method="lookupvit", preset="smoke", precision="fp32"),
        "machine": MACHINE,
        "profiles": profiles or (made_profile(),),
    }
    return Result(**{**fields, **changes})
