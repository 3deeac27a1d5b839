"""`edgecomp profile`: how long a bundle's bucket takes here."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgecomp.api._parity import require_threads
from edgecomp.api._progress import Progress, silent
from edgecomp.bundle import golden_key, open_bundle
from edgecomp.errors import InvalidSpec
from edgecomp.parity import read_goldens
from edgecomp.profiles.latency import measure_latency
from edgecomp.profiles.machine import read_machine
from edgecomp.report.profile import ProfileReport
from edgecomp.runners import open_runner

__all__ = ["profile"]


def profile(
    bundle: str | Path,
    *,
    runner: str = "onnxruntime",
    duration_s: float = 3.0,
    threads: int = 0,
    budget: str | int | None = None,
    batch: int | None = None,
    progress: Progress = silent,
) -> ProfileReport:
    """Measure the latency of each bucket, and of the plain model where the bundle has one.

    Each is warmed up until it is steady, then timed run after run on the seeded golden input; raw samples are kept.

    Args:
        bundle: the folder.
        runner, threads, budget, batch: as in `parity`.
        duration_s: least seconds to measure each graph for, above 0 and at most 3600.
        progress: takes one line for each graph.

    Raises:
        BundleError, InvalidSpec, MissingDependency, RunError: as in `parity`.
    """
    if not 0 < duration_s <= 3600:
        raise InvalidSpec(f"duration {duration_s} s is not above 0 and at most 3600 s")
    require_threads(threads)
    opened = open_bundle(Path(bundle))
    buckets = opened.select(budget=budget, batch=batch)
    graphs = [(bucket.model, bucket.batch, bucket.inputs) for bucket in buckets]
    if budget is None:
        graphs += [
            (plain.model, plain.batch, plain.inputs) for plain in opened.manifest.plain if batch in (None, plain.batch)
        ]
    goldens = read_goldens(opened.path)
    machine = read_machine()
    profiles = []
    for model, size, specs in graphs:
        progress(f"timing {model} in {runner}")
        inputs = {
            spec.name: np.ascontiguousarray(goldens[golden_key("input", "seeded", spec.name)][:size]) for spec in specs
        }
        with open_runner(runner, opened.path / model, threads=threads) as loaded:
            measured = measure_latency(
                lambda: loaded.infer(inputs),  # noqa: B023 - called before the loop goes on
                batch=size,
                model=model,
                runner=loaded.version,
                threads=threads,
                machine=machine,
                duration_s=duration_s,
            )
        profiles.append(measured)
    return ProfileReport(str(bundle), tuple(profiles))
