"""Contract 10: exporting twice gives the same bytes, also in a new process with another hash seed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from conftest import Smoke

import edgecomp
from edgecomp import api
from edgecomp.bundle import MANIFEST
from edgecomp.specs import load_recipe

_EXPORT = """
import sys
from edgecomp import api
method, preset, budgets, batches, out = sys.argv[1:]
batch = tuple(map(int, batches.split(",")))
api.export(method, preset=preset, budget=budgets.split(","), batch=batch, stem=False, router="none", seed=0, out=out)
"""


def test_exporting_twice_gives_the_same_bytes(sampled_method, bundle_of, tmp_path):
    smokes = [Smoke(sampled_method, preset) for preset in load_recipe(sampled_method).smoke_presets]
    fewest = min(len(smoke.budgets) * len(smoke.batches) for smoke in smokes)  # graphs
    smoke = next(smoke for smoke in smokes if len(smoke.budgets) * len(smoke.batches) == fewest)
    first = bundle_of(smoke).path
    again = tmp_path / "again"
    budgets, batches = (",".join(map(str, numbers)) for numbers in (smoke.budgets, smoke.batches))
    root = str(Path(edgecomp.__file__).parent.parent)
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    command = [sys.executable, "-c", _EXPORT, smoke.method, smoke.preset, budgets, batches, str(again)]
    subprocess.run(command, env=environment, check=True, timeout=300)
    names = sorted(path.name for path in again.iterdir())
    assert names == sorted(path.name for path in first.iterdir() if path.is_file())
    assert [name for name in names if (first / name).read_bytes() != (again / name).read_bytes()] == []


def test_exporting_over_the_same_request_does_nothing(smokes, bundle_of):
    smoke = smokes[0]
    bundle = bundle_of(smoke)
    before = (bundle.path / MANIFEST).stat().st_mtime_ns
    words = {"preset": smoke.preset, "budget": smoke.budgets, "batch": smoke.batches, "stem": False, "router": "none"}
    report = api.export(smoke.method, **words, seed=0, out=bundle.path)
    assert report.reused
    assert report.manifest == bundle.manifest
    assert (bundle.path / MANIFEST).stat().st_mtime_ns == before
