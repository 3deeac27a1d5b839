"""What an export of a reduced precision is calibrated with, and what it says of its numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from edgecomp import api
from edgecomp.compressors import compressor_class
from edgecomp.errors import EdgecompError
from edgecomp.report.export import describe_export
from edgecomp.report.profile import describe_profile
from edgecomp.specs import load_recipe


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of lookupvit at test size, of which one layer gives numbers near the end of fp16."""
    torch.manual_seed(0)
    model = compressor_class("lookupvit").from_recipe(load_recipe("lookupvit"), 4, preset="smoke")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = next(
        name for name in state if re.search(r"blocks\.1\..*(fc1|mlp|up|0)\.weight$", name) and state[name].ndim == 2
    )
    state[name] *= 3e4
    path = tmp_path_factory.mktemp("weights") / "large.safetensors"
    save_file(state, path)
    return path


def test_what_comes_near_to_the_end_of_fp16_is_named_with_its_cure(large: Path, tmp_path: Path) -> None:
    words = {"preset": "smoke", "budget": [4], "precision": "fp16", "weights": large}
    report = api.export("lookupvit", out=tmp_path / "out", **words)
    risks = [note for note in report.manifest.notes if "fp16 ends at 65504" in note]
    assert risks
    assert all("blocks.1" in note or "mlp" in note for note in risks)
    cures = sorted({name for note in risks for name in re.findall(r"--fp32 '([^']+)'", note)})
    cured = api.export("lookupvit", out=tmp_path / "cured", fp32=cures, **words)
    assert [note for note in cured.manifest.notes if "fp16 ends" in note] == []
    assert cured.manifest.fp32 == tuple(cures)
    (bucket,) = cured.manifest.buckets
    kept = {name: reason for name, reason in bucket.islands.items() if name in cures}
    assert kept
    assert all(reason == f"asked: {name}" for name, reason in kept.items())


def test_scales_come_from_the_images_that_are_given(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (80, 70), (number * 80, 20, 200)).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("no image")
    words = {"preset": "smoke", "budget": [4], "precision": "int8", "rest": "fp32", "calibration": folder}
    report = api.export("lookupvit", out=tmp_path / "out", calibration_images=2, **words)
    samples = report.manifest.samples
    assert samples is not None
    assert (samples.source, samples.count) == ("images of pictures", 2)
    assert str(tmp_path) not in report.bundle.joinpath("manifest.json").read_text()
    assert "2 calibration images are few; 16 or more make scales that hold for others" in report.manifest.notes
    text = describe_export(report)
    assert re.search(
        r"precision  int8, the rest fp32; opset 20; \d+ linear layers quantised; scales from 2 inputs", text
    )
    assert api.export("lookupvit", out=tmp_path / "out", calibration_images=2, **words).reused
    profile = api.profile(report.bundle, duration_s=0.02)
    ((model, types),) = profile.types.items()
    assert (model, profile.subject.precision) == ("model.m4.b1.onnx", "int8")
    assert types["int8"] == len(report.manifest.buckets[0].quantized)
    assert f"int8 in the file; ONNX Runtime runs its matrix products in int8 ({types['int8']})" in describe_profile(
        profile
    )
    Image.new("RGB", (80, 70)).save(folder / "0.png")
    with pytest.raises(EdgecompError, match="--force"):
        api.export("lookupvit", out=tmp_path / "out", calibration_images=2, **words)


def test_modules_are_named_as_the_documents_and_the_refusal_name_them(tmp_path: Path) -> None:
    words = {"preset": "smoke", "budget": [3], "precision": "fp16"}
    with pytest.raises(EdgecompError, match=r"--fp32 'blocks\.77' fits no module.* may begin at any dot") as refused:
        api.export("tome", out=tmp_path / "none", fp32=["blocks.77"], **words)
    listed = re.search(r"modules are for example ([^;]+);", str(refused.value))
    assert listed is not None
    shown = listed[1].split(", ")
    assert len(shown) == 5
    report = api.export("tome", out=tmp_path / "out", fp32=[*shown, "blocks.2.mlp", "blocks.*.attn.proj"], **words)
    reasons = list(report.manifest.buckets[0].islands.values())
    assert {f"asked: {pattern}" for pattern in shown} <= set(reasons)
    inside = [pattern for pattern in shown if ".blocks.2.mlp." in pattern]
    assert reasons.count("asked: blocks.2.mlp") == 5 - 2 * len(inside), "two products, two biases, the activation"
    assert reasons.count("asked: blocks.*.attn.proj") == 12 - 2 * sum(one.endswith("attn.proj") for one in shown)
