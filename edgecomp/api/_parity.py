"""`edgecomp parity`: a bundle's graphs against the goldens of the original."""

from __future__ import annotations

import os
from pathlib import Path

from edgecomp.api._progress import Progress, silent
from edgecomp.bundle import Bucket, PlainGraph, open_bundle
from edgecomp.errors import InvalidSpec
from edgecomp.parity import OutputParity, ParityReport, check_bucket, read_goldens
from edgecomp.runners import open_runner

__all__ = ["parity", "require_threads"]


def parity(
    bundle: str | Path,
    *,
    runner: str = "onnxruntime",
    threads: int = 0,
    budget: str | int | None = None,
    batch: int | None = None,
    progress: Progress = silent,
) -> ParityReport:
    """Run a bundle's buckets on the golden inputs and compare with the original's outputs.

    Args:
        bundle: the folder.
        runner: `onnxruntime` or `onnxruntime-cuda`.
        threads: CPU threads; 0: as many as the runtime chooses.
        budget: only the bucket that keeps so many tokens (a count or a percentage); None: all, and the plain model.
        batch: only this batch size; None: all.
        progress: takes one line for each bucket.

    Returns:
        the report; `bool(report)` is the verdict. A missed threshold is a result, not an error.

    Raises:
        BundleError: the bundle is not whole. InvalidSpec: it has no such bucket.
        MissingDependency, RunError: the runner cannot run here.
    """
    require_threads(threads)
    opened = open_bundle(Path(bundle))
    manifest = opened.manifest
    graphs: list[Bucket | PlainGraph] = list(opened.select(budget=budget, batch=batch))
    if budget is None:
        graphs += [graph for graph in manifest.plain if batch in (None, graph.batch)]
    goldens, tolerance = read_goldens(opened.path), manifest.recipe.tolerances[manifest.precision]
    rows: list[OutputParity] = []
    version = ""
    for graph in graphs:
        progress(f"{graph.model} in {runner}")
        with open_runner(runner, opened.path / graph.model, threads=threads) as loaded:
            rows.extend(check_bucket(loaded, graph, goldens, tolerance))
            version = loaded.version
    return ParityReport(str(bundle), runner, version, threads, manifest.precision, tolerance, tuple(rows))


def require_threads(threads: int) -> None:
    """Refuse a number of threads that would only bring this machine down."""
    most = max(64, 2 * (os.cpu_count() or 1))
    if not 0 <= threads <= most:
        raise InvalidSpec(f"threads={threads} is not between 0 (the runtime's choice) and {most} on this machine")
