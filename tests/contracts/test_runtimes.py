"""Contract 8: every runner gives what the original's goldens say."""

from __future__ import annotations

import pytest

from edgecomp import api
from edgecomp.errors import RunError
from edgecomp.runners import runner_names

_RUNNERS = [name if name == "onnxruntime" else pytest.param(name, marks=pytest.mark.gpu) for name in runner_names()]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("runner", _RUNNERS)
def test_runner_equals_the_goldens(smoke, bundle_of, runner, threads):
    bundle = bundle_of(smoke)
    _require_provider(runner)
    report = api.parity(bundle.path, runner=runner, threads=threads)
    assert report, report.worst
    assert (report.runner, report.threads) == (runner, threads)
    assert report.tolerance == smoke.tolerance
    expected = {
        (bucket.model, case, spec.name)
        for bucket in bundle.manifest.buckets
        for case in ("seeded", "photo")
        for spec in bucket.outputs
    }
    assert {(row.model, row.case, row.output) for row in report.outputs} == expected
    assert len(report.outputs) == len(expected)
    assert all(row.difference.not_finite == 0 for row in report.outputs)


def test_a_provider_that_is_absent_is_an_error(smokes, bundle_of):
    """No runner falls back to another in silence."""
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("ONNX Runtime's CUDA provider is there")
    with pytest.raises(RunError, match="has no CUDAExecutionProvider"):
        api.parity(bundle_of(smokes[0]).path, runner="onnxruntime-cuda")


def _require_provider(runner):
    import onnxruntime

    if runner == "onnxruntime-cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip(f"ONNX Runtime {onnxruntime.__version__} here has no CUDAExecutionProvider (onnxruntime-gpu)")
