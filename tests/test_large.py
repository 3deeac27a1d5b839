"""Full size: what the smoke presets cannot show. `.ci/full` runs these."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgecomp import api
from edgecomp.engines import installed_flavours
from edgecomp.specs import load_recipe, method_names

pytestmark = pytest.mark.slow

FULL_SIZE = [
    (method, preset)
    for method in method_names()
    for preset in load_recipe(method).presets
    if not preset.startswith("smoke")
]


@pytest.mark.skipif("rtx" not in installed_flavours(), reason="TensorRT for RTX is not installed")
@pytest.mark.parametrize(("method", "preset"), FULL_SIZE)
def test_every_preset_goes_the_whole_way(method: str, preset: str, tmp_path: Path) -> None:
    report = api.export(method, preset=preset, out=tmp_path / "bundle")
    assert report
    for threads in (1, 2):
        assert api.parity(report.bundle, threads=threads)
    for target in ("a10", "rtx-5090"):
        assert api.build(report.bundle, target=target).engines


def test_a_model_above_2_gib_exports_and_runs(tmp_path: Path) -> None:
    """Protobuf ends at 2 GiB; weights lie outside the graph. Takes about 12 GiB of memory."""
    params = {"embed_dim": 2048, "depth": 10, "mlp_ratio": 8.0}
    report = api.export("lookupvit", image_size=64, budget=[9], params=params, out=tmp_path / "large")
    assert report.weights_bytes > 2 << 30
    assert api.parity(report.bundle)
