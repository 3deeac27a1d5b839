"""The examples run: on generated data, for the real one is not in the repository."""

from __future__ import annotations

import gzip
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
FASHION = ROOT / "examples" / "fashion_mnist"
REAL = Path("/usr/share/datasets/fashion-mnist")


def run(script: str, *words: object, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FASHION / script), *map(str, words)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in the layout of Fashion-MNIST."""
    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    for prefix in ("t10k", "train"):
        images = rng.integers(0, 256, (64, 28, 28), dtype=np.uint8)
        for name, values in (("images-idx3", images), ("labels-idx1", np.arange(64, dtype=np.uint8) % 10)):
            header = struct.pack(f">{1 + values.ndim}I", 0x0800 + values.ndim, *values.shape)
            (folder / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes()))
    return folder


def test_weights_are_small() -> None:
    assert (FASHION / "weights.safetensors").stat().st_size < 3 << 20


def test_table_is_written_between_the_marks(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("onnxruntime")
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table.py writes from here -->\nold\n<!-- to here -->\nafter\n")
    done = run("table.py", "--data", data, "--r", 4, "--batch", 8, "--limit", 16, "--write", page, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("<!-- to here -->\nafter\n")
    assert "old" not in text
    assert "16 test images" in text
    (row,) = re.findall(r"^\| tome .*$", text, re.MULTILINE)
    assert row.split(" | ")[1:3] == ["4", "25"]
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["page.md"]


def write_part(part: str, data: Path, folder: Path, *words: object) -> str:
    """Return what pruning.py puts between the marks of a part."""
    page, begin, end = folder / "page.md", f"<!-- pruning.py writes {part} from here -->", "<!-- to here -->"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    sizes = ["--budget", 13, "--batch", 8, "--limit", 16, "--draws", 1, "--epochs", 1]
    done = run("pruning.py", "--data", data, "--parts", part, *sizes, *words, "--write", page, folder=folder)
    assert done.returncode == 0, done.stderr
    before, _, rest = page.read_text().partition(begin)
    text, _, after = rest.partition(end)
    assert (before, after) == ("before\n", "\nafter\n")
    assert "old" not in text
    assert sorted(entry.name for entry in folder.iterdir()) == ["page.md"]
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    return text


@pytest.mark.slow
def test_pruning_inside(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("onnxruntime")
    text = write_part("inside", data, tmp_path, "--methods", "random", "--schedules")
    rows = [line.split(" | ")[:3] for line in text.splitlines() if re.match(r"\| (random|pooling)", line)]
    assert rows == [
        ["| random", "49, 32, 32, 21, 13, 13", "13"],
        ["| pooling", "49, 49, 12, 12, 12, 12", "12"],
    ]


@pytest.mark.slow
def test_pruning_after(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("onnxruntime")
    text = write_part("after", data, tmp_path, "--methods", "visionzip")
    assert "16 test images, readouts fitted on 64 training images" in text
    rows = [line.split(" | ")[:2] for line in text.splitlines() if line.startswith("| ")]
    assert rows[1:] == [["| plain", "49"], ["| visionzip", "13"], ["| pooling", "12"]]


def test_places_of_the_patches(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    done = run("pruning.py", "--data", data, "--parts", "places", "--limit", 16, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "16 test images" in done.stdout
    assert len(re.findall(r"^\| row \d( \| [\d.]+){7} \|$", done.stdout, re.MULTILINE)) == 7
    assert len(re.findall(r"seed \d: \d+", done.stdout)) == 3


def test_training_runs(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    done = run(
        "train.py", "--data", data, "--epochs", 1, "--threads", 1, "--out", tmp_path / "w.safetensors", folder=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "top-1 on 64 test images" in done.stdout
    assert (tmp_path / "w.safetensors").stat().st_size == (FASHION / "weights.safetensors").stat().st_size


@pytest.mark.parametrize("kind", ["noise", "real", "absent"])
def test_a_resampler_is_trained_saved_and_exported(kind: str, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("onnxruntime")
    folder = {"noise": data, "real": REAL, "absent": tmp_path / "nowhere"}[kind]
    if kind == "real" and not REAL.is_dir():
        pytest.skip(f"there is no Fashion-MNIST in {REAL}; apt-get install dataset-fashion-mnist brings it")
    done = run("resampler.py", "--data", folder, "--out", tmp_path / "out", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    if kind == "absent":
        assert done.stdout.startswith(f"skipped: there is no Fashion-MNIST in {folder}")
        assert list(tmp_path.iterdir()) == []
        return
    top1 = float(re.findall(r"9 of 49 tokens: ([\d.]+)%", done.stdout)[0])
    assert top1 > (75 if kind == "real" else 0)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "out.safetensors"]
    assert (tmp_path / "out" / "model.m9.b1.onnx").is_file()


@pytest.mark.slow
def test_policy_is_trained_and_held_to_fixed(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("onnxruntime")
    shorter = ("--images", 64, "--epochs", 1, "--calibrate", 16, "--limit", 16, "--others")
    done = run("policy.py", "--data", data, *shorter, "--out", tmp_path / "policy.safetensors", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "logits of 64 training images in 3 buckets" in done.stdout
    assert "16 test images" in done.stdout
    tables = [[line for line in part.splitlines() if line[:1] == "|"] for part in done.stdout.split("\n\n")[-2:]]
    assert [row.split(" | ")[0] for row in tables[0][2:]] == [
        "| plain", "| `fixed` 12", "| `fixed` 24", "| `fixed` 36", "| policy",
    ]  # fmt: skip
    assert [row.split(" | ")[0] for row in tables[1][2:]] == ["| `fixed`", "| policy"]
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)
    assert float(tables[1][-1].split(" | ")[1]) <= 24
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["policy.safetensors"]
    assert (tmp_path / "policy.safetensors").stat().st_size == (FASHION / "policy.safetensors").stat().st_size
