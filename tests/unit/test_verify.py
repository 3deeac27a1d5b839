"""`edgecomp verify`: each stage with its verdict and reason, what is not repeated, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from made_result import made_result

from edgecomp import api
from edgecomp.api import _verify
from edgecomp.bundle import GOLDEN, MANIFEST, WEIGHTS, open_bundle
from edgecomp.engines import Flavour, installed_flavours, read_record
from edgecomp.errors import BundleError, InvalidSpec, MissingDependency, RunError, TargetMismatch, UnknownName
from edgecomp.lock import lock_path
from edgecomp.parity import ParityReport
from edgecomp.profiles.result import Result
from edgecomp.report.doctor import DoctorReport, Finding
from edgecomp.report.verify import Stage, VerifyReport, describe_verify

Cli = Callable[..., Any]
Edit = Callable[[Path, Callable[[dict[str, Any]], object]], None]

NAMES = ["hashes", "doctor", "plugin", "engines", "parity", "profile"]
MODEL = "model.m4.b1.onnx"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, in which nothing has passed yet; and a machine without a GPU."""
    monkeypatch.setenv("EDGECOMP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(_verify, "local_gpu_sm", lambda: None)
    return tmp_path / "cache"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Parity and profile that only count how often they are asked: what they do has tests of its own."""
    asked = {"parity": 0, "profile": 0}
    passing = {"max_rel": 1e-3, "min_cosine": 0.9, "derivation": "made up, for this test alone"}

    def parity(bundle: Path, **words: Any) -> ParityReport:
        asked["parity"] += 1
        open_bundle(bundle)
        difference = {
            "max_abs": 0.0, "max_rel": 1e-6, "cosine_mean": 1.0, "cosine_min": 1.0, "psnr": 99.0, "not_finite": 0,
            "worst": (0,), "got": 0.0, "expected": 0.0,
        }  # fmt: skip
        row = {"model": MODEL, "case": "seeded", "output": "x", "difference": difference, "failures": ()}
        fields = {"bundle": "b", "runner": "r", "version": "r 1", "threads": 0, "precision": "fp32"}
        return msgspec.convert({**fields, "tolerance": passing, "outputs": [row]}, ParityReport)

    def profile(bundle: Path, **words: Any) -> Result:
        asked["profile"] += 1
        return made_result()

    monkeypatch.setattr(_verify, "parity", parity)
    monkeypatch.setattr(_verify, "profile", profile)
    return asked


def stage(report: VerifyReport, name: str) -> Stage:
    (found,) = (one for one in report.stages if one.name == name)
    return found


def verdicts(report: VerifyReport) -> list[str]:
    return [one.verdict for one in report.stages]


# -- the way through -------------------------------------------------------------------------------------------


def test_without_a_gpu(bundle: Path, cli: Cli) -> None:
    """For real, through the command line: what does not apply says why, and the same command goes on from there."""
    said = cli("verify", bundle, "--duration", "0.02", "--threads", "1", "--json")
    assert said.code == 0, said.err
    document = json.loads(said.out)
    assert [one["name"] for one in document["stages"]] == NAMES
    assert [one["verdict"] for one in document["stages"]] == ["pass", "pass", *["not applicable"] * 2, "pass", "pass"]
    stages = {one["name"]: one for one in document["stages"]}
    assert stages["hashes"]["reason"].startswith("4 files as the manifest says; 52 tensors, all inside weights.data")
    assert stages["engines"]["reason"] == "there is no NVIDIA GPU on this machine, and --target names none"
    assert "there is no NVIDIA GPU on this machine" in stages["plugin"]["reason"]
    assert len(stages["parity"]["result"]["outputs"]) == 4
    assert {one["model"] for one in stages["profile"]["result"]["profiles"]} == {MODEL, "model.m9.b1.onnx"}
    assert (document["schema"], document["verdict"], document["target"]) == (1, "pass", "")
    assert document["digest"] == open_bundle(bundle).manifest.digest
    assert sum(one["seconds"] for one in document["stages"]) == pytest.approx(document["seconds"], rel=0.2, abs=0.5)
    again = cli("verify", bundle, "--duration", "0.02", "--threads", "1")
    assert again.code == 0
    lines = {line.split()[0]: line for line in again.out.splitlines() if line}
    assert lines["parity"].split()[1:] == ["pass", "earlier"]
    assert lines["profile"].split()[1:] == ["pass", "earlier"]
    assert "%" in lines["hashes"]
    assert "max rel error" in lines["parity:"]
    assert lines["verdict:"].startswith("verdict: pass (")
    assert not lock_path(bundle).exists()


def test_what_passed_is_not_repeated(bundle: Path, quick: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    words: dict[str, Any] = {"threads": 1}
    for _ in range(2):
        report = api.verify(bundle, **words)
        assert report
    assert quick == {"parity": 1, "profile": 1}
    assert [one.resumed for one in report.stages] == [False] * 4 + [True] * 2
    assert stage(report, "parity").result["outputs"][0]["model"] == MODEL  # the numbers are still there
    api.verify(bundle, threads=2)
    api.verify(bundle, threads=1, duration_s=1.0)
    assert quick == {"parity": 2, "profile": 3}
    api.verify(bundle, fresh=True, **words)
    assert quick == {"parity": 3, "profile": 4}
    machine = _verify.read_machine()
    other = msgspec.structs.replace(machine, versions={**machine.versions, "onnxruntime": "0.0.1"})
    monkeypatch.setattr(_verify, "read_machine", lambda: other)
    api.verify(bundle, **words)
    assert quick == {"parity": 4, "profile": 5}
    busy = msgspec.structs.replace(other, load_average=(9.0, 9.0, 9.0), governor="other", memory_available_gib=0.1)
    monkeypatch.setattr(_verify, "read_machine", lambda: busy)
    api.verify(bundle, **words)
    assert quick == {"parity": 4, "profile": 5}


def test_clock_that_goes_back(
    bundle: Path, quick: dict[str, int], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is decided by a time of day: not what is remembered, not a lock, not how long a stage took."""
    later = iter(range(2_000_000_000, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(later)))
    api.verify(bundle)
    for moment in (0, 4_000_000_000):
        for file in (*bundle.iterdir(), *(cache / "verify").iterdir()):
            os.utime(file, (moment, moment))
        report = api.verify(bundle)
        assert report
        assert min(one.seconds for one in report.stages) >= 0
    assert quick == {"parity": 1, "profile": 1}


def test_another_bundle_is_another_run(
    bundle: Path, quick: dict[str, int], edit_manifest: Edit, tmp_path: Path
) -> None:
    api.verify(bundle)
    copy = shutil.copytree(bundle, tmp_path / "copy")
    api.verify(copy)
    assert quick["parity"] == 1  # the same bytes elsewhere are the same bundle
    edit_manifest(copy, lambda raw: raw.update(notes=["another"]))
    api.verify(copy)
    assert quick["parity"] == 2


def test_what_failed_is_repeated(bundle: Path, quick: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path, **words: Any) -> ParityReport:
        raise RunError("the runner fell over 7 times")

    fine = _verify.parity
    monkeypatch.setattr(_verify, "parity", fail)
    report = api.verify(bundle)
    assert not report
    assert (stage(report, "parity").verdict, stage(report, "parity").reason) == ("fail", "the runner fell over 7 times")
    assert stage(report, "profile").verdict == "pass"  # and the rest is still told
    monkeypatch.setattr(_verify, "parity", fine)
    assert api.verify(bundle)
    assert quick == {"parity": 1, "profile": 1}


def test_interrupted_run_goes_on(bundle: Path, quick: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(folder: Path, **words: Any) -> Result:
        raise KeyboardInterrupt

    fine = _verify.profile
    monkeypatch.setattr(_verify, "profile", interrupt)
    with pytest.raises(KeyboardInterrupt):
        api.verify(bundle)
    assert not lock_path(bundle).exists()
    monkeypatch.setattr(_verify, "profile", fine)
    report = api.verify(bundle)
    assert (stage(report, "parity").resumed, stage(report, "profile").resumed) == (True, False)
    assert quick == {"parity": 1, "profile": 1}


def test_no_time_is_taken_of_a_twin(bundle: Path, edit_manifest: Edit, quick: dict[str, int]) -> None:
    edit_manifest(bundle, lambda raw: raw.update(precision="bf16", rest="bf16"))
    report = api.verify(bundle, target="none")
    assert report
    assert stage(report, "profile").verdict == "not applicable"
    assert "no kernels for bf16" in stage(report, "profile").reason
    assert quick == {"parity": 1, "profile": 0}


def test_missed_threshold_fails_by_name(
    bundle: Path, edit_manifest: Edit, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_verify, "profile", lambda *words, **more: made_result())
    edit_manifest(bundle, lambda raw: raw["recipe"]["tolerances"]["fp32"].update(max_rel=1e-12))
    said = cli("verify", bundle, "--threads", "1")
    assert said.code == 1
    assert "parity   FAIL" in said.out
    assert "4 outputs in onnxruntime" in said.out
    assert "above 1e-12" in said.out
    assert "verdict: FAIL" in said.out


CHOICE: dict[str, Any] = {
    "model": MODEL, "case": "photo", "number": 0, "where": "blocks.3", "kind": "set", "agreement": 0.6,
    "agreement_mean": 0.6, "flips": 1, "margin": 1e-6, "noise": 1e-5, "score_error": 1e-6, "score_limit": 1e-4,
    "worst": None, "failures": (),
}  # fmt: skip


@pytest.mark.parametrize(
    ("forced", "choice", "verdict", "text"),
    [
        ((), (), "pass", "2 outputs in r 1, max rel error 0.002 (allowed 0.01); 1 judged with the original's choices"),
        (("too far",), (), "fail", "rounding may decide a choice: model.m4.b1.onnx, photo, x, choices forced: too far"),
        (
            (),
            ("wrong",),
            "fail",
            "1 of 2 outputs in r 1, max rel error 1.3 (allowed 0.01): model.m4.b1.onnx, photo, x: off",
        ),
    ],
)
@pytest.mark.usefixtures("quick")
def test_close_calls_are_told_from_misses(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, forced: Any, choice: Any, verdict: str, text: str
) -> None:
    """An output that rounding may decide is judged with the choices forced, and is no miss in the words either."""

    def row(case: str, max_rel: float, failures: tuple[str, ...]) -> dict[str, Any]:
        difference = {
            "max_abs": max_rel, "max_rel": max_rel, "cosine_mean": 1.0, "cosine_min": 1.0, "psnr": 9.0,
            "not_finite": 0, "worst": (0,), "got": 0.0, "expected": 0.0,
        }  # fmt: skip
        return {"model": MODEL, "case": case, "output": "x", "difference": difference, "failures": failures}

    fields = {
        "bundle": "b", "runner": "r", "version": "r 1", "threads": 0, "precision": "fp16",
        "tolerance": {"max_rel": 0.01, "min_cosine": 0.9, "derivation": "made up, for this test alone"},
        "outputs": [row("seeded", 0.001, ()), row("photo", 1.3, ("off",))],
        "selection": [
            {"model": MODEL, "forced": [row("photo", 0.002, forced)], "choices": [{**CHOICE, "failures": choice}]}
        ],
    }  # fmt: skip
    monkeypatch.setattr(_verify, "parity", lambda *words, **more: msgspec.convert(fields, ParityReport))
    found = stage(api.verify(bundle), "parity")
    assert found.verdict == verdict
    assert text in found.reason


def test_conflict_fails_and_the_rest_still_runs(
    bundle: Path, quick: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = Finding("onnxruntime", "conflicting", "both are installed", "pip uninstall -y one")
    monkeypatch.setattr(_verify, "doctor", lambda: DoctorReport((finding,)))
    report = api.verify(bundle)
    assert not report
    assert stage(report, "doctor").reason == "onnxruntime: both are installed (pip uninstall -y one)"
    assert verdicts(report)[4:] == ["pass", "pass"]


# -- bundles that are not whole, or hostile -----------------------------------------------------------------------


def test_altered_file_stops_everything(bundle: Path, quick: dict[str, int], cli: Cli) -> None:
    api.verify(bundle)
    content = bytearray((bundle / WEIGHTS).read_bytes())
    content[5] ^= 1
    (bundle / WEIGHTS).write_bytes(content)
    said = cli("verify", bundle, "--json")  # though all of it has passed before
    assert said.code == 1
    stages = json.loads(said.out)["stages"]
    assert f"{WEIGHTS} has sha256" in stages[0]["reason"]
    assert [one["verdict"] for one in stages] == ["fail", *["not reached"] * 5]
    assert quick == {"parity": 1, "profile": 1}


def put_model(bundle: Path, edit_manifest: Edit, change: Callable[[Any], object]) -> None:
    """Alter a graph, and forge the manifest so that it fits."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(bundle / MODEL, load_external_data=False)
    change(model)
    content = model.SerializeToString()
    (bundle / MODEL).write_bytes(content)

    def resize(raw: dict[str, Any]) -> None:
        entry = next(entry for entry in raw["files"] if entry["name"] == MODEL)
        entry.update(size=len(content), sha256=hashlib.sha256(content).hexdigest())

    edit_manifest(bundle, resize)


def external(model: Any) -> Any:
    return next(tensor for tensor in model.graph.initializer if tensor.external_data)


def _set(**values: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for entry in external(model).external_data:
            entry.value = values.get(entry.key, entry.value)

    return change


def _in_an_attribute(model: Any) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Constant" or node.attribute)
    node.attribute.add(name="hidden", type=4).t.CopyFrom(external(model))
    _set(location="../secret")(model)
    moved = external(model)
    node.attribute[-1].t.CopyFrom(moved)
    _set(location=WEIGHTS)(model)


def _in_a_sparse_tensor(model: Any) -> None:
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(external(model))
    for entry in sparse.values.external_data:
        entry.value = "../secret" if entry.key == "location" else entry.value


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_set(location="../secret"), f"{MODEL} reads weights from '../secret'"),
        (_set(location="/etc/passwd"), f"{MODEL} reads weights from '/etc/passwd'"),
        (_set(location=GOLDEN), f"{MODEL} reads weights from '{GOLDEN}'"),
        (_set(location=""), f"{MODEL} reads weights from ''"),
        (_set(offset=str(1 << 40)), f"at {1 << 40} of {WEIGHTS}, which has"),
        (_set(offset="-8"), f"at -8 of {WEIGHTS}"),
        (_set(length="9" * 30), f"reads {'9' * 30} bytes at"),
        (_in_an_attribute, "reads weights from '../secret'"),
        (_in_a_sparse_tensor, "reads weights from '../secret'"),
    ],
)
def test_graph_that_reads_beyond_its_weights(
    bundle: Path, quick: dict[str, int], edit_manifest: Edit, change: Callable[[Any], None], text: str, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_bytes(bytes(1 << 16))
    put_model(bundle, edit_manifest, change)
    report = api.verify(bundle)
    assert verdicts(report) == ["fail", *["not reached"] * 5]
    assert text in stage(report, "hashes").reason
    with pytest.raises(BundleError) as caught:
        api.pack(bundle, out=tmp_path / "x.zip")
    assert text in str(caught.value)
    assert quick["parity"] == 0


def test_runtime_refuses_a_path_that_leaves_the_folder_too(bundle: Path, edit_manifest: Edit, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes((bundle / WEIGHTS).read_bytes())
    put_model(bundle, edit_manifest, _set(location="../secret"))
    with pytest.raises(RunError, match="ONNX Runtime cannot load"):
        api.parity(bundle, budget=4)


@pytest.mark.parametrize("content", [b"", b"\x08", b"\xff" * 64, b"\x3a\xff\xff\xff\xff\x0f"])
def test_graph_that_is_no_onnx(bundle: Path, edit_manifest: Edit, content: bytes) -> None:
    (bundle / MODEL).write_bytes(content)

    def resize(raw: dict[str, Any]) -> None:
        entry = next(entry for entry in raw["files"] if entry["name"] == MODEL)
        entry.update(size=len(content), sha256=hashlib.sha256(content).hexdigest())

    edit_manifest(bundle, resize)
    reason = stage(api.verify(bundle), "hashes").reason
    assert MODEL in reason
    assert "cannot be read" in reason or "is truncated or no ONNX file" in reason


@pytest.mark.parametrize("header", [struct.pack("<Q", 1 << 63), struct.pack("<Q", 200 << 20), b"", b"\0" * 8])
def test_golden_file_whose_header_lies(bundle: Path, edit_manifest: Edit, header: bytes) -> None:
    """It says that it is larger than the file, or than memory; nothing is allocated for it."""
    content = header + (bundle / GOLDEN).read_bytes()[len(header) :] if header else b""
    (bundle / GOLDEN).write_bytes(content)

    def resize(raw: dict[str, Any]) -> None:
        entry = next(entry for entry in raw["files"] if entry["name"] == GOLDEN)
        entry.update(size=len(content), sha256=hashlib.sha256(content).hexdigest())

    edit_manifest(bundle, resize)
    report = api.verify(bundle)
    assert (stage(report, "parity").verdict, stage(report, "profile").verdict) == ("fail", "fail")
    assert f"{GOLDEN} cannot be read" in stage(report, "parity").reason


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda raw: raw["buckets"][0]["inputs"][0].update(shape=[1, 3, 1 << 20, 1 << 20]), "is not between 1 and"),
        (lambda raw: raw["buckets"][0]["outputs"][0].update(shape=[1, 0, 4]), "is not between 1 and 2147483647"),
        (lambda raw: raw["buckets"][0]["outputs"][0].update(shape=[1, -4, 4]), "is not between 1 and 2147483647"),
        (lambda raw: raw.update(image_size=1 << 30), f"images of {1 << 30} pixels"),
        (lambda raw: raw["preprocess"].update(size=1 << 30), f"images of {1 << 30} pixels"),
        (lambda raw: raw["preprocess"].update(crop=1e-9), "(resized to 64000000000) are above 8192"),
    ],
)
def test_size_that_nothing_could_hold(
    bundle: Path, edit_manifest: Edit, change: Callable[[dict[str, Any]], object], text: str
) -> None:
    edit_manifest(bundle, change)
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle)
    assert text in str(caught.value)
    assert "export the bundle again" in str(caught.value)


def test_golden_file_that_is_too_large_is_not_hashed(bundle: Path, edit_manifest: Edit) -> None:
    with (bundle / GOLDEN).open("r+b") as file:
        file.truncate(9 << 30)  # sparse

    def resize(raw: dict[str, Any]) -> None:
        next(entry for entry in raw["files"] if entry["name"] == GOLDEN).update(size=9 << 30)

    edit_manifest(bundle, resize)
    assert f"{GOLDEN} has {9 << 30} bytes, above {8 << 30}" in stage(api.verify(bundle), "hashes").reason


@pytest.mark.parametrize("kind", ["file", "folder", "dangling", "pipe"])
def test_link_or_pipe_among_the_engines(bundle: Path, quick: dict[str, int], kind: str) -> None:
    place = bundle / "engines" / "t4"
    place.mkdir(parents=True)
    name = place / "model.m4.b1.rtx.json"
    if kind == "pipe":
        os.mkfifo(name)  # reading it would wait for ever
    else:
        name.symlink_to({"file": "/etc/passwd", "folder": "/etc", "dangling": "/nowhere"}[kind])
    report = api.verify(bundle)
    assert f"engines/t4/{name.name} is a link, pipe, socket or device" in stage(report, "hashes").reason


def test_nothing_in_the_bundle_says_that_it_has_passed(bundle: Path, quick: dict[str, int], cache: Path) -> None:
    api.verify(bundle)
    (state,) = (cache / "verify").iterdir()
    (bundle / "profiles").mkdir()
    shutil.copy(state, bundle / "profiles" / "verify.json")
    shutil.rmtree(cache)
    assert api.verify(bundle)
    assert quick == {"parity": 2, "profile": 2}


@pytest.mark.parametrize("content", [b"", b"[]", b'{"parity: onnxruntime, 0 threads": 1}', b"\xff"])
def test_state_that_is_damaged_is_not_believed(
    bundle: Path, quick: dict[str, int], cache: Path, content: bytes
) -> None:
    api.verify(bundle)
    (state,) = (cache / "verify").iterdir()
    state.write_bytes(content)
    assert api.verify(bundle)
    assert quick == {"parity": 2, "profile": 2}


def test_cache_that_cannot_be_written(bundle: Path, quick: dict[str, int], cache: Path) -> None:
    cache.write_text("a file in its place")
    report = api.verify(bundle)
    assert report
    assert "parity is not remembered: " in report.notes[0]
    assert str(cache) in report.notes[0]
    assert "note: parity is not remembered" in describe_verify(report)


# -- words ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "error", "text"),
    [
        ({"target": "orin"}, UnknownName, "no target 'orin'; did you mean 'orin-n"),
        ({"runner": "tensorflow"}, UnknownName, "no runner 'tensorflow'"),
        ({"threads": -1}, InvalidSpec, "threads=-1 is not between 0"),
        ({"duration_s": 0}, InvalidSpec, "duration 0 s is not above 0"),
        ({"plugin": "always"}, UnknownName, "no --plugin 'always'"),
    ],
)
def test_wrong_words_run_nothing(
    bundle: Path, quick: dict[str, int], words: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as caught:
        api.verify(bundle, **words)
    assert text in str(caught.value)
    assert quick == {"parity": 0, "profile": 0}


def test_no_bundle_is_bad_input(tmp_path: Path, cli: Cli) -> None:
    for place in (tmp_path / "absent", tmp_path):
        said = cli("verify", place)
        assert (said.code, said.out) == (2, "")
        assert f"{place} " in said.err


def test_several_targets_of_one_gpu_have_to_be_named(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_verify, "local_gpu_sm", lambda: 87)
    monkeypatch.setattr("edgecomp.api._build.local_gpu_sm", lambda: 87)
    with pytest.raises(TargetMismatch, match=r"this GPU is SM87, and so are agx-orin-32, .*; name one"):
        api.verify(bundle)


def test_library_inside_the_bundle_is_not_loaded(bundle: Path, quick: dict[str, int]) -> None:
    library = bundle / "engines" / "t4" / "evil.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"\x7fELF")
    sha256 = hashlib.sha256(b"\x7fELF").hexdigest()
    link = bundle.parent / "harmless.so"
    link.symlink_to(library)
    for word in (library, link, bundle / "engines" / "." / "t4" / ".." / "t4" / "evil.so"):
        for allowed in ([], [sha256[:11]], ["0" * 64]):
            with pytest.raises(InvalidSpec) as caught:
                api.verify(bundle, target="t4", plugin=str(word), allow_plugin=allowed)
            assert f"came inside the bundle (sha256 {sha256})" in str(caught.value)
            with pytest.raises(InvalidSpec, match=f"came inside the bundle .sha256 {sha256}"):
                api.build(bundle, target="t4", plugin=str(word), allow_plugin=allowed)
    report = api.verify(bundle, target="none", plugin=str(library), allow_plugin=[sha256[:12]])
    assert stage(report, "hashes").verdict == "pass"


# -- engines ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A TensorRT 10.14 that is here and builds whatever is asked for, by writing engines as `build` does."""
    monkeypatch.setattr(_verify, "choose_flavour", lambda target, runtime: "tensorrt")
    monkeypatch.setattr(_verify, "load_flavour", lambda name: Flavour("tensorrt", "10.14.1", None))


def put_engines(bundle: Path, *, version: str = "10.14.1", sm: int = 87, **fields: Any) -> list[Path]:
    manifest = open_bundle(bundle).manifest
    hashes = {entry.name: entry.sha256 for entry in manifest.files}
    folder = bundle / "engines" / "orin-nano"
    folder.mkdir(parents=True, exist_ok=True)
    plans = []
    for graph in manifest.graphs:
        plan = folder / f"{Path(graph.model).stem}.tensorrt.engine"
        plan.write_bytes(b"a plan")
        record = {
            "schema": 1, "model": graph.model, "onnx_sha256": hashes[graph.model], "weights_sha256": hashes[WEIGHTS],
            "target": "orin-nano", "runtime": "tensorrt", "runtime_version": version, "sm": [sm], "precision": "fp32",
            "workspace_mib": 0, "seconds": 1.0, "num_layers": 3, "size_bytes": 6, "warnings": [], "inputs": [],
            "sha256": hashlib.sha256(b"a plan").hexdigest(), "outputs": [], "edgecomp_version": "0.1.0", **fields,
        }  # fmt: skip
        plan.with_suffix(".json").write_text(json.dumps(record))
        plans.append(plan)
    return plans


@pytest.mark.usefixtures("tensorrt", "quick")
def test_engines_that_are_there(bundle: Path) -> None:
    put_engines(bundle)
    report = api.verify(bundle, target="orin-nano", build_engines=False)
    assert report
    assert stage(report, "engines").reason == "2 engines are there, of TensorRT 10.14.1 and this bundle"
    assert report.notes == ("the engines were not run: parity and latency are those of onnxruntime",)
    assert report.target == "orin-nano"


HERE = "here is TensorRT 10.14.1 for orin-nano (SM87)"


@pytest.mark.usefixtures("tensorrt", "quick")
@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"version": "10.3.0"}, f"is of TensorRT 10.3.0 for orin-nano (SM87), and {HERE}"),
        ({"sm": 89}, f"is of TensorRT 10.14.1 for orin-nano (SM89), and {HERE}"),
        ({"onnx_sha256": "a" * 64}, "model.m4.b1.tensorrt.engine was built from another bundle"),
        ({"weights_sha256": "a" * 64}, "model.m9.b1.tensorrt.engine was built from another bundle"),
        ({"sha256": "a" * 64}, "and its record says aaaaaaaaaaaa"),
        ({"schema": 99}, "has schema 99"),
    ],
)
def test_plan_that_does_not_belong_here_is_refused(bundle: Path, fields: dict[str, Any], text: str, cli: Cli) -> None:
    put_engines(bundle, **fields)
    said = cli("verify", bundle, "--target", "orin-nano", "--no-build", "--json")
    assert said.code == 1
    reason = json.loads(said.out)["stages"][3]["reason"]
    assert text in reason
    assert "leave out --no-build" in reason


@pytest.mark.usefixtures("tensorrt", "quick")
def test_plan_that_is_missing_is_refused(bundle: Path) -> None:
    put_engines(bundle)[0].unlink()
    reason = stage(api.verify(bundle, target="orin-nano", build_engines=False), "engines").reason
    assert f"there is no model.m4.b1.tensorrt.engine in {bundle}/engines/orin-nano" in reason


@pytest.mark.usefixtures("quick")
def test_plans_that_cannot_be_used_here_are_named(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_engines(bundle, version="10.3.0")
    monkeypatch.setattr(_verify, "installed_flavours", lambda: ())
    report = api.verify(bundle)
    assert report
    assert stage(report, "engines").reason == (
        "there is no NVIDIA GPU on this machine, and --target names none; 2 plans are there, of TensorRT 10.3.0 for "
        "orin-nano (SM87), and not used: this machine has no TensorRT and no NVIDIA GPU"
    )


@pytest.mark.usefixtures("quick")
def test_no_tensorrt_here(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(target: Any, runtime: str) -> str:
        raise MissingDependency("tensorrt", needed_for="building an engine", extra="gpu")

    monkeypatch.setattr(_verify, "choose_flavour", missing)
    named = api.verify(bundle, target="h100")
    assert not named  # it was asked for by name
    assert "needs the package 'tensorrt'" in stage(named, "engines").reason
    monkeypatch.setattr(_verify, "local_gpu_sm", lambda: 90)
    monkeypatch.setattr(_verify, "local_target", lambda: _verify.load_target("h100"))
    found = api.verify(bundle)
    assert found
    assert stage(found, "engines").verdict == "not applicable"
    assert "needs the package 'tensorrt'" in stage(found, "engines").reason


@pytest.mark.usefixtures("quick")
@pytest.mark.skipif("rtx" not in installed_flavours(), reason="TensorRT for RTX is not installed")
def test_engines_are_built_where_missing_and_foreign(bundle: Path) -> None:
    """With the real builder: built, kept, and built again where the record names another version."""
    first = stage(api.verify(bundle, target="a10"), "engines")
    assert first.reason.startswith("2 built, 0 kept: TensorRT for RTX ")
    assert "for a10 (SM86); they cannot run here: there is no NVIDIA GPU" in first.reason
    assert len(first.result["engines"]) == 2
    second = stage(api.verify(bundle, target="a10"), "engines")
    assert second.reason.startswith("0 built, 2 kept")
    plan = bundle / "engines" / "a10" / "model.m4.b1.rtx.engine"
    version = read_record(plan).runtime_version
    raw = json.loads(plan.with_suffix(".json").read_bytes())
    plan.with_suffix(".json").write_text(json.dumps({**raw, "runtime_version": "1.2.3"}))
    third = stage(api.verify(bundle, target="a10"), "engines")
    assert third.reason.startswith("1 built, 1 kept")
    assert (
        f"{plan.name} is of TensorRT for RTX 1.2.3 for a10 (SM86), and here is TensorRT for RTX {version}"
        in third.reason
    )
    assert third.reason.endswith("built again")


@pytest.mark.usefixtures("tensorrt", "quick")
@pytest.mark.parametrize(
    ("plugin", "reason"),
    [
        ("auto", "--plugin auto: topk_merge is taken where a fitting one is compiled"),
        ("off", "--plugin off: topk_merge is not wanted"),
        ("require", "topk_merge compiled for SM87"),
    ],
)
def test_plugin(bundle: Path, edit_manifest: Edit, monkeypatch: pytest.MonkeyPatch, plugin: str, reason: str) -> None:
    from edgecomp.report.plugin import PluginBuild

    def compiled(name: str, *, sm: list[int], progress: Any) -> PluginBuild:
        return PluginBuild(name, None, 1, 1.0, reused=False)  # type: ignore[arg-type]

    onnx = pytest.importorskip("onnx")
    node = onnx.helper.make_node("TopKMerge", ["a"], ["b"], "merge", domain="edgecomp")
    put_model(bundle, edit_manifest, lambda model: model.graph.node.append(node))
    monkeypatch.setattr(_verify, "plugin_build", compiled)
    monkeypatch.setattr(_verify, "build", lambda *words, **more: pytest.fail("not asked for"))
    report = api.verify(bundle, target="orin-nano", plugin=plugin, build_engines=False)
    assert stage(report, "plugin").reason == reason
    assert stage(report, "plugin").verdict == ("pass" if plugin == "require" else "not applicable")
    assert (bundle / MANIFEST).is_file()
