"""Result files of every kind that a report is made of, small and the same each time."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import msgspec
from made_result import MACHINE, made_profile, made_result

from edgecomp.estimates.efficiency import Efficiency
from edgecomp.estimates.memory import MemoryVerdict
from edgecomp.estimates.peaks import Rate
from edgecomp.estimates.roofline import Estimate as RooflineEstimate
from edgecomp.estimates.roofline import KernelTime
from edgecomp.evaluation import Comparison as BesidePlain
from edgecomp.evaluation import Estimate, Evaluation, GraphScore
from edgecomp.profiles.comparison import Agreement as Alike
from edgecomp.profiles.comparison import Comparison, Contestant
from edgecomp.profiles.latency import LatencyProfile, Stage
from edgecomp.profiles.ratios import Ratio
from edgecomp.profiles.result import LayerTime, MemoryUse, Result, RoutedTime, Subject, write_result
from edgecomp.report.calibrate import BucketUse, CalibrationReport
from edgecomp.report.estimate import EstimateReport, graph_estimate
from edgecomp.report.evaluate import EvaluationReport
from edgecomp.search.result import Agreement, Figure, Limits, Measured, PrecisionVerdict, Row, SearchResult
from edgecomp.specs.manifest import RouterRecord

__all__ = ["calibration", "comparison", "estimate", "evaluation", "inside_result", "many_kinds", "samples", "search"]


def samples(base_us: float, *, count: int = 60, seed: int = 0) -> list[float]:
    """Return times with a tail."""
    chance = random.Random(seed)
    return [base_us * (1 + abs(chance.gauss(0, 0.04)) + 0.5 * (chance.random() < 0.02)) for _ in range(count)]


@functools.cache
def _timed(base_us: float, seed: int) -> LatencyProfile:
    return made_profile(samples(base_us, seed=seed))


def inside_result(
    name: str = "tome-vit", *, batches: tuple[int, ...] = (1,), shaky: str = "", **changes: Any
) -> Result:
    """Return a result of a compressor inside a host, with the plain model, layers, stages, memory and a router."""
    profiles: list[LatencyProfile] = []
    for batch in batches:
        for role, kept, factor in (("plain", 0, 1.0), ("bucket", 98, 0.7), ("bucket", 49, 0.5), ("router", 0, 0.01)):
            model = f"model.m{kept}.b{batch}.onnx" if role == "bucket" else f"{role}.b{batch}.onnx"
            words: dict[str, Any] = {"model": model, "role": role, "tokens_in": 196 if kept else 0, "tokens_out": kept}
            words |= {"batch": batch, "is_steady": model != shaky, "warmup_runs": 40}
            words |= {"host_peak_mib": 300.0 + kept, "load_us": 4e5, "first_us": 8e4} if role != "router" else {}
            if role == "bucket":
                words["stages"] = (Stage("encoder", 50_000 * factor, "by layers"), Stage("merge", 900.0, "by layers"))
            profiles.append(msgspec.structs.replace(_timed(60_000 * factor * batch, kept + batch), **words))
    layers = tuple(
        LayerTime(one.model, f"/blocks.{b}/MatMul", "MatMul", f"blocks.{b}.mlp", f"blocks.{b}", one.p50_us / 14, 1 / 12)
        for one in profiles
        if one.role != "router"
        for b in range(12)
    )
    fields: dict[str, Any] = {
        "subject": Subject(name, "a" * 64, name.partition("-")[0], "inside", "vit_small_patch16_224", "fp32", "", 224),
        "layers": layers,
        "routing": tuple(RoutedTime(one.model, one.batch, 0.6, 43.0, 30.0, 42.0) for one in profiles if one.tokens_out),
        "memory": (MemoryUse((98,), False, 300.5, 350.0), MemoryUse((49, 98), True, 340.5, 420.0)),
        "notes": ("a note of the measurement",),
    }
    return made_result(*profiles, **(fields | changes))


def evaluation(bundle: str = "tome-vit", data: str = "fashion", **changes: Any) -> EvaluationReport:
    """Return what `evaluate --json` prints: plain, two buckets, of which one is no faster."""
    near = BesidePlain(
        Estimate(0.001, -0.002, 0.004), 3, 2, Estimate(0.99, 0.98, 0.995), Estimate(1.0, 0.97, 1.02), "no difference"
    )
    far = BesidePlain(
        Estimate(0.02, 0.01, 0.03), 30, 10, Estimate(0.93, 0.92, 0.94), Estimate(0.6, 0.58, 0.63), "faster"
    )
    rows = (("plain.b8.onnx", 4.0, None), ("model.m25.b8.onnx", 4.0, near), ("model.m9.b8.onnx", 2.4, far))
    scores = tuple(
        GraphScore(model, 850, Estimate(0.85, 0.83, 0.87), None, 0, Estimate(ms, ms - 0.1, ms + 0.1), (ms,) * 8, versus)
        for model, ms, versus in rows
    )
    fields: dict[str, Any] = {
        "bundle": bundle,
        "data": data,
        "layout": "IDX files",
        "found": 10_000,
        "seed": 0,
        "runner": "onnxruntime",
        "version": "onnxruntime 1.27.0",
        "threads": 1,
        "machine": MACHINE,
        "kept": {"plain.b8.onnx": 49.0, "model.m25.b8.onnx": 25.0, "model.m9.b8.onnx": 9.0},
        "flops": {"plain.b8.onnx": 100, "model.m25.b8.onnx": 80, "model.m9.b8.onnx": 60},
        "plain": "plain.b8.onnx",
        "max_drop": None,
        "notes": (),
        "evaluation": Evaluation(1000, 8, 10, scores),
    }
    return EvaluationReport(**(fields | changes))


def calibration() -> CalibrationReport:
    """Return what `calibrate --json` prints."""
    router = RouterRecord("difficulty", {}, False, (), (0.2,), None, ())
    buckets = (BucketUse(49, 100, 160, 30.0, 0.9), BucketUse(98, 156, 96, 42.0, 1.0))
    return CalibrationReport("routed-vit", router, (0.5,), buckets, 0.6, 35.1, "onnxruntime", 1, 1, ())


def search(**changes: Any) -> SearchResult:
    """Return a search's document: plain and two candidates on the front, a baseline beaten, one skipped."""

    def row(name: str, role: Any, kept: int, ms: float, value: float, state: Any, **more: Any) -> Row:
        p99 = Figure(ms * 1100, ms * 1050, None, is_indicative=True)
        taken = Measured(
            source="measured", where="local", p50_us=Figure(ms * 1000, ms * 990, ms * 1010), p99_us=p99, samples=60
        )
        words = {"method": name.partition(" ")[0], "precision": "fp32", "tokens_in": 196, "tokens_out": kept}
        agreement = Agreement(value, max(0.0, value - 0.01), min(1.0, value + 0.01), 256)
        given = {"measured": taken, "agreement": agreement, "latency_us": ms * 1000, "meets": ms < 40}
        return Row(name=name, role=role, state=state, **(words | given | more))

    rows = (
        row("plain fp32", "plain", 196, 60.0, 1.0, "front"),
        row("tome m98 fp32", "candidate", 98, 40.0, 0.97, "front"),
        row("tome m49 fp32", "candidate", 49, 30.0, 0.9, "front"),
        row("random m98 fp32", "baseline", 98, 41.0, 0.8, "dominated", by=("tome m98 fp32",)),
        row(
            "tome m24 fp32",
            "candidate",
            24,
            0.0,
            0.0,
            "skipped",
            why="fewer tokens than m49, which misses",
            measured=None,
        ),
    )
    nothing = {"latency_us": None, "agreement": None, "meets": False}
    rows = (*rows[:-1], msgspec.structs.replace(rows[-1], **nothing))
    fields: dict[str, Any] = {
        "created": "2026-11-22T12:30:00Z",
        "edgecomp": "0.1.0",
        "command": ("edgecomp", "search", "--method", "tome"),
        "method": "tome",
        "preset": "inside",
        "backbone": "vit_small_patch16_224",
        "batch": 1,
        "target": "local",
        "runner": "onnxruntime 1.27.0",
        "threads": 1,
        "duration_s": 1.0,
        "machine": MACHINE,
        "limits": Limits(max_p50_ms=35.0),
        "latency_of": "p50",
        "agreement_of": "same class as the plain model on 256 images",
        "is_proxy": False,
        "rows": rows,
        "winner": "tome m49 fp32",
        "closest": "",
        "verdict": "tome m49 fp32 meets the limit",
        "stopped": ("nothing smaller can win",),
        "precisions": (PrecisionVerdict("fp32", "chosen", "the fastest that passes parity"),),
        "recipe": "",
        "folder": "tome-search",
        "measuring_s": 10.0,
        "total_s": 15.0,
        "notes": (),
    }
    return SearchResult(**(fields | changes))


def comparison(**changes: Any) -> Comparison:
    """Return what `compare --json` prints: a base, a faster model, one that is no faster, one of a file."""
    ratios = {
        "plain": None,
        "tome": Ratio(0.6, 0.58, 0.62, "faster", "paired", 30),
        "evit": Ratio(0.99, 0.95, 1.03, "no difference", "paired", 30),
        "old": Ratio(0.8, 0.7, 0.9, "faster", "unpaired", 30),
    }
    found = [
        Contestant(
            name=name,
            source="result" if name == "old" else "bundle",
            model="model.onnx",
            runner="onnxruntime 1.27.0",
            threads=1,
            batch=1,
            tokens_out=0 if ratio is None else 49,
            precision="fp32",
            flops=10**9,
            size_bytes=10**7,
            latency_us=Estimate(1000.0, 990.0, 1010.0),
            samples_us=(1000.0,) * 30,
            ratio=ratio,
            parity="pass" if name != "evit" else "FAIL: 3 values",
            agreement=Alike("tokens", 8, 0.97, 0.9, 0.95) if name in ("tome", "evit") else None,
        )
        for name, ratio in ratios.items()
    ]
    fields: dict[str, Any] = {
        "created": "2026-11-22T12:20:00Z",
        "edgecomp": "0.1.0",
        "command": ("edgecomp", "compare", "plain", "tome"),
        "base": "plain",
        "rounds": 30,
        "seed": 0,
        "settle_s": 0.1,
        "machine": MACHINE,
        "contestants": tuple(found),
    }
    return Comparison(**(fields | changes))


def estimate(**changes: Any) -> EstimateReport:
    """Return what `estimate --per-op --json` prints: a plain model of two kernels a block."""
    kernels = tuple(
        KernelTime(f"/blocks.{b}/{kind}", f"blocks.{b}", kind, "model", 2, flops, moved, 1.0, us, bound)
        for b in range(3)
        for kind, flops, moved, us, bound in (
            ("matmul", 10**8, 10**6, 30.0, "compute"),
            ("attention", 10**7, 10**6, 20.0, "memory"),
            ("elementwise", 0, 10**6, 10.0, "memory"),
        )
    )
    made = RooflineEstimate(
        "orin-nano-super", "fp16", 1, 150.0, 180.0, 216.0, 0.2, "compute", 90.0, 80.0, 10.0, 5.0, 0.0, 0.0, 33 * 10**7,
        9 * 10**6, 10**7, 10**6, kernels, {"fp16": Rate(17.0, "stated", "a page")}, "edgecomp's own fit",
    )  # fmt: skip
    memory = MemoryVerdict("fits", 10**7, 10**6, 10**8, 2 * 10**8, 6 * 10**9, 8 * 10**9, "nothing")
    graph = graph_estimate(made, memory, model="plain.onnx", role="plain", per_op=True)
    half = msgspec.structs.replace(made, mid_us=90.0, low_us=75.0, high_us=108.0)
    less = graph_estimate(half, memory, model="model.m49.onnx", role="bucket", kept=49, plain=made)
    fields: dict[str, Any] = {
        "path": "somewhere/tome-vit",
        "target": "orin-nano-super",
        "title": "Jetson Orin Nano 8GB Super",
        "graphs": (graph, less),
        "efficiency": Efficiency(0.5, 0.4, 0.7, 3.0, 4096.0),
        "efficiency_from": "edgecomp's own fit",
        "error": 0.2,
        "findings": (),
        "notes": (),
        "bandwidth_gb_s": 102.0,
    }
    return EstimateReport(**(fields | changes))


def many_kinds(folder: Path) -> Path:
    """Write two results of one group, one of another machine, and a document of every other kind; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_result(inside_result(), folder / "tome.json")
    write_result(inside_result("evit-vit", shaky="model.m98.b1.onnx"), folder / "evit.json")
    elsewhere = msgspec.structs.replace(MACHINE, cpu="another processor")
    write_result(inside_result(machine=elsewhere), folder / "elsewhere.json")
    others = {"evaluated": evaluation(), "calibrated": calibration(), "searched": search()}
    others |= {"compared": comparison(), "estimated": estimate()}
    for name, value in others.items():
        (folder / f"{name}.json").write_bytes(msgspec.json.encode(value))
    return folder
