"""The wheel holds the package and its data, and works in a clean environment, which has no torch, from any folder."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from edgecomp import __version__

ROOT = Path(__file__).resolve().parents[1]
DIST_INFO = f"edgecomp-{__version__}.dist-info"
#: Folders of a checkout that are data, and where the wheel has them.
DATA = {
    "export/": "edgecomp/_data/export/",
    "engines/": "edgecomp/_data/engines/",
    "profiles/published/": "edgecomp/_data/profiles/published/",
    "profiles/targets/": "edgecomp/_data/profiles/targets/",
}
NO_NETWORK = re.compile(r"NewConnectionError|NameResolutionError|Network is unreachable|name resolution", re.IGNORECASE)


def run(*words: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program as a user would, who has no checkout on the path."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(
        list(map(str, words)), cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def build(folder: Path, out: Path, *kinds: str) -> None:
    done = run(sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir", out, folder=folder)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def members(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        assert len(names) == len(set(names))
        return {name: archive.read(name) for name in names}


def the_one(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


@pytest.fixture(scope="module")
def repository() -> tuple[str, ...]:
    """What git tracks, and what is new and not ignored, as paths with `/`."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so what belongs to the repository is not known")
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return tuple(name for name in sorted(filter(None, listed.split("\0"))) if (ROOT / name).is_file())


@pytest.fixture(scope="module")
def built(repository: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `direct/*.whl`, from the tree, and `sdist/*.tar.gz` with the wheel that is made from it."""
    for name in ("build", "hatchling"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed; pip install -e '.[dev]' brings it")
    base = tmp_path_factory.mktemp("wheel")
    for name in repository:
        (base / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, base / "tree" / name)
    build(base / "tree", base / "direct", "--wheel")
    build(base / "tree", base / "sdist")
    return base


@pytest.fixture(scope="module")
def installed(built: Path) -> Path:
    """The `bin` folder of a clean environment with the wheel and what it requires."""
    environment = built / "clean"
    done = run(sys.executable, "-m", "venv", environment, folder=built)
    assert done.returncode == 0, done.stdout + done.stderr
    pip = environment / "bin" / "pip"
    done = run(pip, "install", "--quiet", the_one(built / "direct", "*.whl"), folder=built)
    if done.returncode and NO_NETWORK.search(done.stdout + done.stderr):
        pytest.skip("no package index can be reached, so a clean environment cannot be filled")
    assert done.returncode == 0, done.stdout + done.stderr
    return environment / "bin"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


def expected_members(repository: tuple[str, ...]) -> set[str]:
    shipped = r"edgecomp/.*\.py|edgecomp/py\.typed|edgecomp/report/templates/.*"
    package = {name for name in repository if re.fullmatch(shipped, name)}
    data = {
        name.replace(source, place, 1)
        for source, place in DATA.items()
        for name in repository
        if name.startswith(source)
    }
    info = {f"{DIST_INFO}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    return package | data | info


def test_wheel_holds_exactly_the_package_and_its_data(repository: tuple[str, ...], built: Path) -> None:
    found = members(the_one(built / "direct", "*.whl"))
    expected = expected_members(repository)
    assert sorted(found.keys() - expected) == [], "in the wheel, and not meant to be"
    assert sorted(expected - found.keys()) == [], "missing from the wheel"
    for name in (
        "edgecomp/__init__.py",
        "edgecomp/py.typed",
        "edgecomp/report/templates/page.html",
        "edgecomp/_data/export/recipes/lookupvit.toml",
        "edgecomp/_data/export/ops/tensorrt-10.toml",
        "edgecomp/_data/export/photograph/photograph.jpg",
        "edgecomp/_data/engines/README.md",
        "edgecomp/_data/engines/plugins/topk_merge/kernel.cu",
        "edgecomp/_data/engines/plugins/topk_merge/plugin.toml",
        "edgecomp/_data/engines/runtime/edgecomp_runtime.h",
        "edgecomp/_data/profiles/targets/t4.toml",
    ):
        assert name in found
    assert not [name for name in found if re.search(r"(^|/)(tests|benchmarks|examples|results|__pycache__)/", name)]


def test_files_of_the_wheel_are_those_of_the_checkout(repository: tuple[str, ...], built: Path) -> None:
    found = members(the_one(built / "direct", "*.whl"))
    for place in ("edgecomp/bundle.py", "export/photograph/photograph.jpg", "profiles/targets/t4.toml"):
        shipped = place if place.startswith("edgecomp/") else f"edgecomp/_data/{place}"
        assert found[shipped] == (ROOT / place).read_bytes()


def test_metadata_asks_for_no_torch_and_declares_the_licence(built: Path) -> None:
    found = members(the_one(built / "direct", "*.whl"))
    metadata = found[f"{DIST_INFO}/METADATA"].decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: ") and "extra ==" not in line]
    assert not [line for line in required if re.search(r"torch|onnx|tensorrt|timm|transformers", line)]
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.10" in metadata
    assert b"edgecomp = edgecomp.cli:main" in found[f"{DIST_INFO}/entry_points.txt"]
    assert found[f"{DIST_INFO}/WHEEL"].count(b"Tag: py3-none-any") == 1


def test_sdist_makes_the_same_wheel(repository: tuple[str, ...], built: Path) -> None:
    direct, through_sdist = (members(the_one(built / way, "*.whl")) for way in ("direct", "sdist"))
    assert direct == through_sdist
    with tarfile.open(the_one(built / "sdist", "*.tar.gz")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "edgecomp/py.typed", "export/recipes/lookupvit.toml"} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "profiles/results/"))]


def test_installs_without_torch(installed: Path, elsewhere: Path) -> None:
    code = (
        "import importlib.util, edgecomp\n"
        "print(edgecomp.__file__)\n"
        "print([n for n in ('torch', 'timm', 'onnx', 'onnxruntime', 'tensorrt') if importlib.util.find_spec(n)])"
    )
    done = run(installed / "python", "-c", code, folder=elsewhere)
    assert done.returncode == 0, done.stderr
    file, heavy = done.stdout.splitlines()
    assert Path(file).is_relative_to(installed.parent)
    assert heavy == "[]"


def test_version(installed: Path, elsewhere: Path) -> None:
    done = run(installed / "edgecomp", "--version", folder=elsewhere)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"edgecomp {__version__}\n", "")


@pytest.mark.parametrize(
    ("noun", "file"),
    [("methods", "export/recipes/*.toml"), ("targets", "profiles/targets/*.toml")],
)
def test_lists_what_the_data_folders_hold(installed: Path, elsewhere: Path, noun: str, file: str) -> None:
    done = run(installed / "edgecomp", "list", noun, folder=elsewhere)
    assert done.returncode == 0, done.stderr
    first_words = {line.split()[0] for line in done.stdout.splitlines() if line.strip()}
    names = {path.stem for path in ROOT.glob(file)}
    assert names
    assert names <= first_words


def test_module_lists_backbones(installed: Path, elsewhere: Path) -> None:
    done = run(installed / "python", "-m", "edgecomp", "list", "backbones", folder=elsewhere)
    assert done.returncode == 0, done.stderr
    assert "vit_small_patch16_224" in done.stdout


# -- the verbs of a board -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle as one file, made here, where torch is."""
    pytest.importorskip("torch")
    from edgecomp import api

    folder = tmp_path_factory.mktemp("packed")
    bundle = api.export("lookupvit", preset="smoke", budget=[4], out=folder / "small").bundle
    return api.pack(bundle, out=folder / "small.edgecomp.zip").path


@pytest.fixture(scope="module")
def with_runtime(built: Path, installed: Path) -> Path:
    """The `bin` folder of an environment of its own that has ONNX Runtime as well, and no torch."""
    environment = built / "with-runtime"
    shutil.copytree(installed.parent, environment, symlinks=True)
    python = environment / "bin" / "python"
    done = run(python, "-m", "pip", "install", "--quiet", "onnxruntime", folder=built)
    if done.returncode and NO_NETWORK.search(done.stdout + done.stderr):
        pytest.skip("no package index can be reached, so onnxruntime cannot be installed")
    assert done.returncode == 0, done.stdout + done.stderr
    return python.parent


def said_json(bin_folder: Path, *words: str | Path, folder: Path) -> dict[str, Any]:
    done = run(bin_folder / "python", "-m", "edgecomp", *words, "--json", folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_every_verb_of_a_board_runs_without_torch(with_runtime: Path, packed: Path, elsewhere: Path) -> None:
    """From the one file to outputs, in an environment with numpy, ONNX Runtime and a few small packages."""
    code = "import importlib.util as u; print([n for n in ('torch', 'onnx', 'timm', 'tensorrt') if u.find_spec(n)])"
    assert run(with_runtime / "python", "-c", code, folder=elsewhere).stdout == "[]\n"
    unpacked = said_json(with_runtime, "bundle", "unpack", packed, "--out", "here", folder=elsewhere)
    assert unpacked["bundle"] == "here/bundle"
    bundle = Path("here") / "bundle"
    verified = said_json(with_runtime, "verify", bundle, "--duration", "0.05", "--threads", "1", folder=elsewhere)
    assert verified["verdict"] == "pass"
    verdicts = {stage["name"]: stage["verdict"] for stage in verified["stages"]}
    assert [verdicts[name] for name in ("hashes", "doctor", "parity", "profile")] == ["pass"] * 4
    parity = said_json(with_runtime, "parity", bundle, "--threads", "1", folder=elsewhere)
    assert {row["model"] for row in parity["outputs"]} == {"model.m4.b1.onnx"}
    assert not [row for row in parity["outputs"] if row["failures"]]
    profile = said_json(with_runtime, "profile", bundle, "--duration", "0.05", "--threads", "1", folder=elsewhere)
    assert profile["profiles"][0]["percentiles"]["p50"]["us"] > 0
    run_ = said_json(with_runtime, "run", bundle, "--out", "out.safetensors", "--threads", "1", folder=elsewhere)
    assert run_["model"] == "model.m4.b1.onnx"
    assert (elsewhere / "out.safetensors").stat().st_size > 100
    again = said_json(with_runtime, "bundle", "pack", bundle, "--out", "again.zip", folder=elsewhere)
    assert (elsewhere / "again.zip").read_bytes() == packed.read_bytes()
    assert (
        again["digest"]
        == unpacked["digest"]
        == said_json(with_runtime, "inspect", bundle, folder=elsewhere)["manifest"]["digest"]
    )


def test_verbs_say_what_a_board_is_missing(installed: Path, packed: Path, elsewhere: Path) -> None:
    said_json(installed, "bundle", "unpack", packed, "--out", "here", folder=elsewhere)
    bundle = Path("here") / "bundle"
    for words, package, extra in (
        (["parity", bundle], "onnxruntime", "ort"),
        (["run", bundle], "onnxruntime", "ort"),
        (["profile", bundle], "onnxruntime", "ort"),
        (["build", bundle, "--target", "a10"], "tensorrt_rtx", "rtx"),
        (["check", bundle, "--target", "a10"], "onnx", "export"),
    ):
        done = run(installed / "edgecomp", *words, folder=elsewhere)
        assert (done.returncode, done.stdout) == (2, ""), words
        assert f"{package!r}" in done.stderr
        assert f"pip install 'edgecomp[{extra}]'" in done.stderr
        assert "Traceback" not in done.stderr
    done = run(installed / "edgecomp", "verify", bundle, folder=elsewhere)
    assert done.returncode == 1  # it could not be proven
    assert "parity: the runner 'onnxruntime' needs the package 'onnxruntime'" in done.stdout
    assert "pip install 'edgecomp[ort]'" in done.stdout
    assert re.search(r"^hashes +pass", done.stdout, re.MULTILINE)


def test_doctor_says_that_torch_is_missing(installed: Path, elsewhere: Path) -> None:
    done = run(installed / "edgecomp", "doctor", folder=elsewhere)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^missing +torch ", done.stdout, re.MULTILINE)
    assert re.search(r"pip install 'edgecomp\[(cpu|export)\]'", done.stdout)


def test_export_names_the_extra_that_it_needs(installed: Path, elsewhere: Path) -> None:
    done = run(installed / "edgecomp", "export", "--method", "lookupvit", folder=elsewhere)
    assert done.returncode == 2
    assert "edgecomp[cpu]" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(elsewhere.iterdir()) == []
