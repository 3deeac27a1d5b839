"""Memory of a process that serves a bundle: measured in a process of its own, which does nothing else."""

from __future__ import annotations

import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from edgecomp.bundle import open_bundle
from edgecomp.errors import RunError
from edgecomp.profiles.result import MemoryUse
from edgecomp.runners import Array
from edgecomp.runners.chain import open_graph
from edgecomp.serving.model import load

__all__ = ["measure_memory"]

_EVERY_S = 0.01  # between two looks at the process
_SERVED = b"served\n"


def measure_memory(
    bundle: Path,
    buckets: Sequence[int],
    request: Mapping[str, Array],
    *,
    runner: str,
    threads: int,
    share_weights: bool = False,
) -> MemoryUse | None:
    """Serve a request from each bucket in a fresh process; None where the system does not tell what that holds.

    Args:
        bundle: the folder.
        buckets: tokens kept by each bucket that is to be in memory; none: the plain model, which is loaded alone.
        request: the inputs by name, each with a batch of one.
        runner, threads, share_weights: as for `load`.

    Raises:
        RunError: the process failed.
    """
    if not Path("/proc/self/smaps_rollup").is_file():
        return None
    module = [sys.executable, "-m", "edgecomp.serving.memory"]
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "said").open("w+b") as said:
        np.savez(Path(folder) / "request.npz", **request)  # type: ignore[arg-type]
        how = [runner, str(threads), str(int(share_weights))]
        words = [f"{folder}/request.npz", str(bundle), *how, *map(str, buckets)]
        with subprocess.Popen([*module, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said) as process:
            assert process.stdout is not None
            try:
                peak = 0.0
                while not select.select([process.stdout], [], [], _EVERY_S)[0]:
                    peak = max(peak, _read_pss(process.pid))
                served = process.stdout.readline() == _SERVED
                held = _read_pss(process.pid) if served else 0.0
            finally:
                process.kill()
        said.seek(0)
        if not served:
            lines = said.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
            raise RunError(f"measuring the memory of {bundle} failed: {lines[-1]}; `edgecomp run` shows more")
    return MemoryUse(tuple(buckets), share_weights, held, max(peak, held))


def _read_pss(process: int) -> float:
    """Return a process's proportional set size in MiB; 0 of one that has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), 0.0)


def _serve() -> None:
    """Serve, as the process that is measured; say so and wait to be killed."""
    request, bundle, runner, threads, shared, *buckets = sys.argv[1:]
    with np.load(request) as inputs:
        named = dict(inputs)
    if not buckets:
        opened = open_bundle(Path(bundle))
        with open_graph(runner, opened, opened.manifest.plain[0], threads=int(threads)) as plain:
            plain.infer({name: named[name] for name in plain.input_names})
            _wait()
        return
    with load(bundle, runner=runner, threads=int(threads), share_weights=bool(int(shared))) as model:
        for tokens in buckets:
            model(named, budget=int(tokens))
        _wait()


def _wait() -> None:
    """Say that all was served, and hold it until the process is killed."""
    sys.stdout.buffer.write(_SERVED)
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    _serve()
