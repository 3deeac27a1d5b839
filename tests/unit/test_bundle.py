"""A bundle opens only when it is whole, and is replaced in one step or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgecomp import bundle as module
from edgecomp.bundle import GOLDEN, MANIFEST, SCHEMA, WEIGHTS, Bundle, new_bundle, open_bundle
from edgecomp.errors import BundleError, EdgecompError, InvalidSpec

Edit = Callable[[Path, Callable[[dict[str, Any]], object]], None]
Cli = Callable[..., Any]

MODEL = "model.m4.b1.onnx"
FILES = (MODEL, "model.m9.b1.onnx", WEIGHTS, GOLDEN)


def refused(path: Path) -> str:
    with pytest.raises(BundleError) as caught:
        open_bundle(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


# -- opening ------------------------------------------------------------------------------------------------


def test_whole_bundle_opens(exported: Path) -> None:
    opened = open_bundle(exported)
    assert opened.manifest.schema == SCHEMA
    assert {entry.name: entry.role for entry in opened.manifest.files} == {
        MODEL: "model",
        "model.m9.b1.onnx": "model",
        WEIGHTS: "weights",
        GOLDEN: "golden",
    }
    assert {file.name for file in exported.iterdir()} == {MANIFEST, *FILES}
    assert opened.file(WEIGHTS).size == (exported / WEIGHTS).stat().st_size
    with pytest.raises(BundleError, match=r"no file 'router\.onnx'"):
        opened.file("router.onnx")


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_missing_file(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    assert name in refused(bundle)


@pytest.mark.parametrize("name", ["extra.onnx", ".DS_Store", "router.onnx", "weights.data2"])
def test_added_file(bundle: Path, name: str) -> None:
    (bundle / name).write_bytes(b"x")
    text = refused(bundle)
    assert name in text
    assert "added" in text


@pytest.mark.parametrize("name", FILES)
def test_truncated_file(bundle: Path, name: str) -> None:
    size = (bundle / name).stat().st_size
    os.truncate(bundle / name, size - 1)
    text = refused(bundle)
    assert name in text
    assert f"has {size - 1} bytes and the manifest says {size}" in text


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("position", [0, -1])
def test_one_flipped_bit(bundle: Path, name: str, position: int) -> None:
    before = hashlib.sha256((bundle / name).read_bytes()).hexdigest()
    flip(bundle / name, position)
    text = refused(bundle)
    assert name in text
    assert before[:12] in text
    assert open_bundle(bundle, verify=False).manifest.files  # sizes and names alone still fit


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every leaf of a JSON document, one of each list."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in _paths(item, (*path, key))]
    if isinstance(value, list) and value:
        return _paths(value[-1], (*path, len(value) - 1))
    return [path]


def test_every_altered_field_of_the_manifest_is_seen(bundle: Path) -> None:
    original = json.loads((bundle / MANIFEST).read_bytes())
    paths = [path for path in _paths(original) if path[0] not in ("kind", "schema")]
    assert len(paths) > 80
    for path in paths:
        raw = json.loads((bundle / MANIFEST).read_bytes())
        parent = raw
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = "altered"
        (bundle / MANIFEST).write_text(json.dumps(raw))
        assert "does not match its own digest" in refused(bundle), path
        (bundle / MANIFEST).write_text(json.dumps(original))
    assert open_bundle(bundle)


def test_layout_of_the_json_does_not_matter(bundle: Path) -> None:
    raw = json.loads((bundle / MANIFEST).read_bytes())
    (bundle / MANIFEST).write_text(json.dumps(dict(reversed(raw.items())), indent=7))
    assert open_bundle(bundle)


@pytest.mark.parametrize("schema", [SCHEMA + 1, 99, 0, -1, "1", None, True, 1.5])
def test_other_schema_is_refused_by_its_number(bundle: Path, schema: object, edit_manifest: Edit) -> None:
    edit_manifest(bundle, lambda raw: raw.update(schema=schema, new_field={}))
    text = refused(bundle)
    assert f"has schema {schema!r} and this edgecomp reads up to {SCHEMA}" in text
    assert "upgrade edgecomp" in text


def _add_file(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda raw: raw["files"].append({**raw["files"][0], "name": name})


def _rename(old: str, new: str) -> Callable[[dict[str, Any]], object]:
    def change(raw: dict[str, Any]) -> None:
        for entry in raw["files"]:
            entry["name"] = new if entry["name"] == old else entry["name"]
        for bucket in raw["buckets"]:
            bucket["model"] = new if bucket["model"] == old else bucket["model"]

    return change


def _point_bucket(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda raw: raw["buckets"][0].update(model=name)


ESCAPES = ["../outside.onnx", "/etc/passwd", "sub/model.onnx", "..", ".", "", "a\\..\\b", "x\0y", "-rf", "~root", "ü"]


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.parametrize("change", [_add_file, lambda name: _rename(MODEL, name), _point_bucket])
def test_name_that_leaves_the_folder(
    bundle: Path, name: str, change: Callable[[str], Callable[[dict[str, Any]], object]], edit_manifest: Edit
) -> None:
    (bundle.parent / "outside.onnx").write_bytes((bundle / MODEL).read_bytes())
    edit_manifest(bundle, change(name))
    text = refused(bundle)
    assert f"the manifest names {name!r}, which leaves the folder" in text


def test_symlinked_file(bundle: Path) -> None:
    outside = bundle.parent / "outside.onnx"
    (bundle / MODEL).rename(outside)
    (bundle / MODEL).symlink_to(outside)
    assert f"{MODEL} is a link" in refused(bundle)


def test_symlinked_manifest(bundle: Path) -> None:
    outside = bundle.parent / "outside.json"
    (bundle / MANIFEST).rename(outside)
    (bundle / MANIFEST).symlink_to(outside)
    assert f"holds no {MANIFEST}" in refused(bundle)


def test_symlinked_folder(bundle: Path) -> None:
    (bundle / "engines").symlink_to(bundle.parent)
    assert "engines is a link" in refused(bundle)


def test_pipe_in_the_place_of_a_file(bundle: Path) -> None:
    (bundle / WEIGHTS).unlink()
    os.mkfifo(bundle / WEIGHTS)
    assert f"{WEIGHTS} is a pipe" in refused(bundle)  # and reading it would wait for ever


def test_foreign_folder(bundle: Path) -> None:
    (bundle / "notes").mkdir()
    assert "folder notes does not belong there" in refused(bundle)


def test_what_later_verbs_write_is_allowed(bundle: Path) -> None:
    for name in ("engines", "parity", "profiles"):
        (bundle / name / "rtx-4090").mkdir(parents=True)
        (bundle / name / "rtx-4090" / "anything.json").write_text("{}")
    assert open_bundle(bundle)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"not json", b'{"kind": NaN}', b"[" * 200_000, b"\x00" * 100]
)
def test_manifest_that_is_not_json(bundle: Path, content: bytes) -> None:
    (bundle / MANIFEST).write_bytes(content)
    assert f"{MANIFEST} is not JSON" in refused(bundle)


@pytest.mark.parametrize("content", [b"[]", b"1", b"null", b"{}", b'{"kind": "other", "schema": 1}'])
def test_manifest_of_another_kind(bundle: Path, content: bytes) -> None:
    (bundle / MANIFEST).write_bytes(content)
    assert "is not of an edgecomp bundle" in refused(bundle)


def test_huge_manifest_is_not_read(bundle: Path) -> None:
    with (bundle / MANIFEST).open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    assert "is larger than 16777216 bytes" in refused(bundle)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda raw: raw.pop("opset"), "missing required field `opset`"),
        (lambda raw: raw.update(opset="twenty"), "Expected `int`, got `str` - at `$.opset`"),
        (lambda raw: raw.update(surprise=1), "unknown field `surprise`"),
        (lambda raw: raw["recipe"].update(level="E9"), "'E9'"),
        (lambda raw: raw["buckets"][0]["budget"].update(tokens_in=0), "tokens_in"),
    ],
)
def test_manifest_that_is_not_as_its_schema_says(
    bundle: Path, change: Callable[[dict[str, Any]], object], text: str, edit_manifest: Edit
) -> None:
    edit_manifest(bundle, change)
    said = refused(bundle)
    assert f"is not as schema {SCHEMA} says" in said
    assert text in said


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda raw: raw["files"].append(raw["files"][0]), "names a file twice or has no bucket"),
        (_point_bucket("unhashed.onnx"), "does not hash 'unhashed.onnx'"),
        (_add_file("unused.onnx"), "gives no use to 'unused.onnx'"),
        (
            lambda raw: raw["files"].remove(next(f for f in raw["files"] if f["name"] == GOLDEN)),
            f"does not hash {GOLDEN!r}",
        ),
        (lambda raw: raw.update(buckets=[]), "gives no use to 'model.m4.b1.onnx', 'model.m9.b1.onnx'"),
    ],
)
def test_manifest_that_does_not_fit_itself(
    bundle: Path, change: Callable[[dict[str, Any]], object], text: str, edit_manifest: Edit
) -> None:
    edit_manifest(bundle, change)
    assert text in refused(bundle)


def test_not_a_bundle(tmp_path: Path) -> None:
    assert f"holds no {MANIFEST}" in refused(tmp_path)
    assert "is not a folder" in refused(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    assert "is not a folder" in refused(tmp_path / "file")


@pytest.mark.parametrize(("budget", "count"), [(4, 1), ("9", 1), ("25%", 1), (None, 2), ("56.25%", 1)])
def test_select(exported: Path, budget: str | int | None, count: int) -> None:
    assert len(open_bundle(exported).select(budget=budget)) == count


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"budget": 5}, "has no budget 5; it has 4, 9"),
        ({"budget": "50%"}, "has no budget 50%; it has 4, 9"),
        ({"budget": "many"}, "budget 'many' is neither a count nor a percentage"),
        ({"budget": "inf%"}, "budget 'inf%' is not above 0% and at most 100%"),
        ({"budget": "nan%"}, "budget 'nan%' is not above 0%"),
        ({"budget": "-25%"}, "budget '-25%' is not above 0%"),
        ({"batch": 3}, "has no batch 3; it has 1"),
    ],
)
def test_select_what_is_not_there(exported: Path, words: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        open_bundle(exported).select(**words)
    assert text in str(caught.value)


# -- writing ------------------------------------------------------------------------------------------------


def leftovers(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.name.startswith("."))


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3), EdgecompError("no")])
def test_error_inside_leaves_the_old_bundle_whole(bundle: Path, error: BaseException) -> None:
    before = contents(bundle)
    with pytest.raises(type(error)):  # noqa: PT012, SIM117 - the error is raised inside the other block
        with new_bundle(bundle, force=True) as work:
            (work / WEIGHTS).write_bytes(b"half")
            raise error
    assert contents(bundle) == before
    assert leftovers(bundle.parent) == []
    assert open_bundle(bundle)


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_error_inside_leaves_nothing_where_nothing_was(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):  # noqa: PT012, SIM117 - likewise
        with new_bundle(tmp_path / "a" / "b" / "out", force=False) as work:
            assert work.parent == tmp_path / "a" / "b"
            raise error
    assert list(tmp_path.iterdir()) == []


def test_force_exchanges_in_one_step(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = contents(bundle), {}
    exchange = module._exchange

    def watch(one: Path, other: Path) -> bool:
        seen["before"] = contents(bundle)
        done = exchange(one, other)
        seen["after"] = contents(bundle)
        return done

    monkeypatch.setattr(module, "_exchange", watch)
    with new_bundle(bundle, force=True) as work:
        (work / MANIFEST).write_text("{}")
        assert contents(bundle) == before
    assert seen == {"before": before, "after": {MANIFEST: hashlib.sha256(b"{}").hexdigest()}}
    assert [file.name for file in bundle.iterdir()] == [MANIFEST]
    assert leftovers(bundle.parent) == []


def test_force_without_an_exchange_in_the_kernel(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_exchange", lambda one, other: False)
    with new_bundle(bundle, force=True) as work:
        (work / "new").write_text("new")
    assert [file.name for file in bundle.iterdir()] == ["new"]
    assert leftovers(bundle.parent) == []


def test_failing_rename_brings_the_old_bundle_back(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, replace = contents(bundle), os.replace
    monkeypatch.setattr(module, "_exchange", lambda one, other: False)

    def fail_on_the_new_one(source: Path, target: Path) -> None:
        if str(source).endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error", str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_on_the_new_one)
    with pytest.raises(EdgecompError, match="Input/output error"), new_bundle(bundle, force=True) as work:
        (work / "new").write_text("new")
    assert contents(bundle) == before
    assert leftovers(bundle.parent) == []


@pytest.mark.parametrize("force", [False, True])
def test_folder_that_edgecomp_did_not_make_is_never_replaced(tmp_path: Path, force: bool) -> None:
    out = tmp_path / "holidays"
    out.mkdir()
    (out / "beach.jpg").write_text("dear to somebody")
    with pytest.raises(EdgecompError, match=r"holidays is not empty \(beach.jpg\)"), new_bundle(out, force=force):
        raise AssertionError
    assert (out / "beach.jpg").read_text() == "dear to somebody"


@pytest.mark.parametrize("force", [False, True])
def test_file_or_link_in_its_place(tmp_path: Path, exported: Path, force: bool) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(exported)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link", "dangling"):
        with (
            pytest.raises(EdgecompError, match=f"{name} is a file or a link"),
            new_bundle(tmp_path / name, force=force),
        ):
            raise AssertionError
    assert (tmp_path / "file").read_text() == "x"
    assert not (tmp_path / "nowhere").exists()


def test_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with new_bundle(tmp_path / "out", force=False) as work:
        (work / "x").write_text("x")
    assert (tmp_path / "out" / "x").read_text() == "x"
    assert leftovers(tmp_path) == []


def test_another_bundle_needs_force(bundle: Path) -> None:
    with pytest.raises(EdgecompError, match="holds another bundle; give --force"), new_bundle(bundle, force=False):
        raise AssertionError


def test_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(EdgecompError, match="file, which is a file"), new_bundle(tmp_path / "file" / "out", force=True):
        raise AssertionError
    with (
        pytest.raises(EdgecompError, match=r"/proc/edgecomp.*(could not be written|cannot be written to)"),
        new_bundle(Path("/proc/edgecomp/out"), force=False),
    ):
        raise AssertionError
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with (
        pytest.raises(EdgecompError, match=f"the folder {tmp_path} cannot be written to"),
        new_bundle(tmp_path / "sub" / "out", force=False),
    ):
        raise AssertionError


def test_read_only_file_system(tiny_disk: Callable[[int], Path]) -> None:
    folder = tiny_disk(64)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    with pytest.raises(EdgecompError) as caught, new_bundle(folder / "out", force=False):
        raise AssertionError
    assert f"the folder {folder} cannot be written to" in str(caught.value)


def test_full_disk_while_weights_are_written(bundle: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgecomp.export.passes import WeightsFile

    def fail(self: WeightsFile, data: memoryview, *, user: str) -> tuple[int, int]:
        raise OSError(errno.ENOSPC, "No space left on device", str(self.path))

    monkeypatch.setattr(WeightsFile, "place", fail)
    before = contents(bundle)
    said = cli("export", "--method", "lookupvit", "--preset", "smoke", "--seed", 1, "--out", bundle, "--force")
    assert (said.code, said.out) == (2, "")
    assert f"bundle {bundle} could not be written: the disk is full" in said.err
    assert said.err.count("\n") == 1
    assert contents(bundle) == before
    assert leftovers(bundle.parent) == []


@pytest.mark.parametrize("size_kib", [100, 320])  # too small for the weights; for the goldens behind them
def test_full_disk(tiny_disk: Callable[[int], Path], cli: Cli, size_kib: int) -> None:
    folder = tiny_disk(size_kib)
    said = cli("export", "--method", "lookupvit", "--preset", "smoke", "--out", folder / "out")
    assert (said.code, said.out) == (2, "")
    assert f"bundle {folder}/out could not be written: the disk is full" in said.err
    assert list(folder.iterdir()) == []


def test_seal_round_trips(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    sealed = module.seal(bundle, manifest, {entry.name: entry.role for entry in manifest.files})
    assert msgspec.to_builtins(sealed) == msgspec.to_builtins(manifest)
    assert isinstance(open_bundle(bundle), Bundle)


# -- killed -------------------------------------------------------------------------------------------------

WRITER = """
    import os, shutil, sys, time
    from pathlib import Path
    from edgecomp import bundle as module
    from edgecomp.bundle import new_bundle

    stage, out, source = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])

    def stop(here):
        if here == stage:
            print("here", flush=True)
            time.sleep(60)

    exchange, sync = module._exchange, module._sync
    def slow_exchange(one, other):
        stop("before the exchange")
        done = exchange(one, other)
        stop("after the exchange")
        return done
    def slow_sync(path):
        stop("while syncing")
        sync(path)
    module._exchange, module._sync = slow_exchange, slow_sync
    try:
        with new_bundle(out, force=True) as work:
            stop("empty")
            for file in source.iterdir():
                shutil.copy(file, work)
                stop("half")
    except KeyboardInterrupt:
        sys.exit(130)
"""
STAGES = ["empty", "half", "while syncing", "before the exchange", "after the exchange"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_killed_at_any_moment(
    bundle: Path, tmp_path: Path, stage: str, sent: signal.Signals, edit_manifest: Edit
) -> None:
    old = open_bundle(bundle).manifest.notes
    other = shutil.copytree(bundle, tmp_path / "other")
    edit_manifest(other, lambda raw: raw.update(notes=["the new one"]))
    writer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), stage, str(bundle), str(other)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "here\n"
    writer.send_signal(sent)
    writer.communicate(timeout=60)
    assert writer.returncode == (130 if sent == signal.SIGINT else -signal.SIGKILL)
    assert open_bundle(bundle).manifest.notes == (("the new one",) if stage == "after the exchange" else old)
    if sent == signal.SIGINT:
        assert leftovers(tmp_path) == []


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_killed_export_leaves_the_old_bundle(bundle: Path, sent: signal.Signals) -> None:
    before = contents(bundle)
    words = ["export", "--method", "lookupvit", "--preset", "smoke", "--seed", "7", "--out", str(bundle), "--force"]
    export = subprocess.Popen(
        [sys.executable, "-m", "edgecomp", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 120
    while not leftovers(bundle.parent) and time.monotonic() < end and export.poll() is None:
        time.sleep(0.02)
    assert leftovers(bundle.parent), export.communicate()
    export.send_signal(sent)
    out, err = export.communicate(timeout=120)
    assert contents(bundle) == before
    assert open_bundle(bundle)
    assert out == ""
    if sent == signal.SIGINT:
        assert export.returncode == 130
        assert err == "interrupted; nothing half-written was left\n"
        assert leftovers(bundle.parent) == []


def test_interrupted_while_torch_is_imported(tmp_path: Path) -> None:
    words = ["export", "--method", "lookupvit", "--preset", "smoke", "--out", str(tmp_path / "out")]
    script = (
        "import builtins, os, signal, sys\n"
        "real = builtins.__import__\n"
        "def spy(name, *rest, **more):\n"
        "    if name == 'torch': os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(name, *rest, **more)\n"
        "builtins.__import__ = spy\n"
        "from edgecomp.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr == "interrupted; nothing half-written was left\n"
    assert list(tmp_path.iterdir()) == []
