"""Every precision of every method: held to the original, stored in its type, built, and refused where it must be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from conftest import SEED, Smoke

from edgecomp import api
from edgecomp.bundle import WEIGHTS, open_bundle
from edgecomp.engines import installed_flavours
from edgecomp.errors import InvalidSpec, TargetMismatch
from edgecomp.runners.chain import open_graph
from edgecomp.specs import load_recipe, method_names

ROOT = Path(__file__).resolve().parents[2]
BYTES = {"fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}
QUICK = {
    ("adaptive-lookupvit", "int8"),
    ("lookupvit", "fp16"),
    ("lookupvit", "fp8"),
    ("attention-pruning", "int8"),
    ("tome", "fp16"),
}
CASES = [
    pytest.param(method, precision, marks=() if (method, precision) in QUICK else pytest.mark.slow)
    for method in method_names()
    for precision in BYTES
]


def preset_of(method, precision, assembled):
    """Return the first smoke preset that has what the precision needs: linear layers, where it is a quantised one."""
    for preset in load_recipe(method).smoke_presets:
        weights = assembled(Smoke(method, preset)).models[0].parameters()
        if precision not in ("int8", "fp8") or any(w.ndim == 2 and min(w.shape) >= 16 for w in weights):
            return preset
    return pytest.skip("no preset of this method has a linear layer to quantise")


def stored_bytes(bundle):
    """Return the bytes of weights and constants of all graphs of the first batch, without the gaps between them.

    Another batch folds constants of its own, which at test size outweigh what is learned.
    """
    lengths = {}
    for graph in bundle.manifest.graphs:
        if graph.batch == bundle.manifest.buckets[0].batch:
            for tensor in onnx.load(bundle.path / graph.model, load_external_data=False).graph.initializer:
                if tensor.external_data:
                    place = {entry.key: entry.value for entry in tensor.external_data}
                    assert place["location"] == WEIGHTS
                    lengths[place["offset"]] = int(place["length"])
    return sum(lengths.values())


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_a_precision_from_export_to_engine(name, precision, assembled, tmp_path):
    options = {"preset": preset_of(name, precision, assembled), "precision": precision, "seed": SEED}
    report = api.export(name, out=tmp_path / "bundle", **options)
    bundle = open_bundle(report.bundle)
    manifest = bundle.manifest
    assert report.parity
    assert report.parity.emulated == (precision in ("bf16", "fp8"))
    assert manifest.precision == precision
    assert {spec.dtype for graph in manifest.graphs for spec in graph.outputs} <= {"float32", "int32", "int64", "bool"}
    assert (manifest.samples is None) == (precision == "bf16")
    if manifest.parameters > 1000:
        assert stored_bytes(bundle) < manifest.parameters * (BYTES[precision] + 1)  # some are in the rest, or fp32
    again = api.parity(report.bundle)
    assert again
    assert [row.output for row in again.ties] == [row.output for row in report.parity.ties]
    if "rtx" not in installed_flavours():
        return
    target = "rtx-5090" if precision == "fp8" else "a10"
    built = api.build(report.bundle, target=target, runtime="rtx", plugin="off")
    graphs = {graph.model: graph for graph in manifest.graphs}
    for engine in built.engines:
        assert engine.record.precision == graphs[engine.record.model].precision
        assert set(engine.record.proof.islands) <= set(graphs[engine.record.model].islands)
    if precision == "fp8":
        with pytest.raises(TargetMismatch, match=r"a10 \(SM86\) does not run fp8"):
            api.build(report.bundle, target="a10", runtime="rtx")
        assert not (report.bundle / "engines" / "a10").exists()


VERIFY = """
import sys
sys.modules.update(dict.fromkeys(["torch", "torchvision", "timm", "transformers", "onnxscript"]))  # are not there
from edgecomp.cli import main
sys.argv[1:] = ["verify", sys.argv[1], "--target", "none"]
main()
"""


def test_a_type_without_kernels_is_verified_by_its_twin_without_torch(tmp_path):
    bundle = api.export("lookupvit", preset="smoke", budget=[4], precision="bf16", out=tmp_path / "bundle").bundle
    environment = {**os.environ, "EDGECOMP_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", VERIFY, bundle],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    assert "emulated: fp32 that rounds as bf16 does, max rel error" in lines["parity:"]
    assert "ONNX Runtime on the CPU has no kernels for bf16" in lines["profile:"]
    assert lines["parity"].split()[1] == "pass"
    assert lines["profile"].split()[1:3] == ["not", "applicable"]
    assert {name for name, line in lines.items() if "FAIL" in line} <= {
        "doctor",
        "verdict:",
    }  # it sees torch's metadata


@pytest.mark.slow
def test_the_seam_changes_no_bit_in_fp16(tmp_path):
    """A stem hands over fp32; what was fp16 comes through it unchanged."""
    parts, whole = (
        api.export("evit", preset="smoke", budget=[5, 11], precision="fp16", stem=stem, out=tmp_path / str(stem)).bundle
        for stem in (True, False)
    )
    from edgecomp.parity import read_goldens

    image = read_goldens(parts)["input.photo.image"][:1]
    for kept in (5, 11):
        seen = []
        for folder in (parts, whole):
            bundle = open_bundle(folder)
            (bucket,) = bundle.select(budget=kept)
            assert bool(bucket.stem) == (folder is parts)
            with open_graph("onnxruntime", bundle, bucket, threads=1) as runner:
                seen.append(runner.infer({"image": image}))
        assert {name: array.tobytes() for name, array in seen[0].items()} == {
            name: array.tobytes() for name, array in seen[1].items()
        }


def test_a_method_without_layers_has_nothing_to_quantise(tmp_path):
    with pytest.raises(InvalidSpec, match=r"--precision int8: there is nothing to quantise.*export with fp16"):
        api.export("token-pooling", preset="smoke", budget=[5], precision="int8", out=tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
