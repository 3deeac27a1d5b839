"""A bundle as one file: the same bytes each time, and nothing hostile comes out of one."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import stat
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import edgecomp
from edgecomp import api, archive
from edgecomp.bundle import GOLDEN, MANIFEST, WEIGHTS, digest_of, open_bundle
from edgecomp.errors import BundleError, EdgecompError, InvalidSpec
from edgecomp.remote.wheel import make_wheel
from edgecomp.resources import data_path

Cli = Callable[..., Any]
Edit = Callable[[Path, Callable[[dict[str, Any]], object]], None]
Parts = list[tuple[zipfile.ZipInfo, bytes]]

MODEL = "model.m4.b1.onnx"


def contents(folder: Path) -> dict[str, str]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def packed(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of `exported`; not to be written to."""
    return api.pack(exported, out=tmp_path_factory.mktemp("packed") / "good.edgecomp.zip").path


@pytest.fixture
def merging(bundle: Path, edit_manifest: Edit) -> Path:
    """A bundle with a node that the plugin could run: packing looks for it, and runs nothing."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(bundle / MODEL, load_external_data=False)
    model.graph.node.append(onnx.helper.make_node("TopKMerge", ["a"], ["b"], "merge", domain="edgecomp"))
    content = model.SerializeToString()
    (bundle / MODEL).write_bytes(content)
    edit_manifest(bundle, lambda raw: resize(raw, MODEL, content))
    return bundle


def resize(raw: dict[str, Any], name: str, content: bytes) -> None:
    """Let a manifest promise other bytes, as a forger would."""
    entry = next(entry for entry in raw["files"] if entry["name"] == name)
    entry.update(size=len(content), sha256=hashlib.sha256(content).hexdigest())


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Path]:
    """A folder that must hold nothing but the archive when the test ends: nothing was left, nothing escaped."""
    folder = tmp_path / "deep" / "here"
    folder.mkdir(parents=True)
    yield folder
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {
        "deep",
        "deep/here",
        "deep/here/bad.zip",
    }


def parts_of(path: Path) -> Parts:
    with zipfile.ZipFile(path) as good:
        return [(info, good.read(info)) for info in good.infolist()]


def forge(path: Path, parts: Parts) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as forged:
        warnings.simplefilter("ignore")  # of a name that stands there twice
        for info, content in parts:
            forged.writestr(info, content, info.compress_type)
    return path


def added(name: str, content: bytes = b"x", *, mode: int = 0, method: int = zipfile.ZIP_STORED) -> Any:
    info = zipfile.ZipInfo("placeholder")
    info.filename, info.external_attr, info.compress_type = name, mode << 16, method
    return info, content


def refused(path: Path, here: Path, **words: Any) -> str:
    with pytest.raises(EdgecompError) as caught:
        api.unpack(path, out=here / "out", **words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- pack ---------------------------------------------------------------------------------------------------


def test_same_bundle_same_bytes(exported: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copytree(exported, tmp_path / "other-name")
    for file in copy.iterdir():
        os.utime(file, (2_000_000_000, 2_000_000_000))  # a clock that is wrong
        file.chmod(0o600)
    monkeypatch.chdir(tmp_path)
    report = api.pack(copy)
    assert report.path == Path("other-name.edgecomp.zip")
    assert report.path.read_bytes() == packed.read_bytes()
    assert report.sha256 == hashlib.sha256(packed.read_bytes()).hexdigest()


def test_members_times_and_modes(packed: Path, exported: Path) -> None:
    with zipfile.ZipFile(packed) as opened:
        infos = opened.infolist()
        assert opened.testzip() is None
    names = [info.filename for info in infos]
    assert names == sorted(names)
    own = sorted(f"bundle/{file.name}" for file in exported.iterdir())
    assert names == ["README.md", *own, f"edgecomp-{edgecomp.__version__}-py3-none-any.whl"]
    assert {info.date_time for info in infos} == {(1980, 1, 1, 0, 0, 0)}
    assert {stat.filemode(info.external_attr >> 16) for info in infos} == {"-rw-r--r--"}
    assert {info.compress_type for info in infos} == {zipfile.ZIP_STORED}


def test_there_and_back(packed: Path, exported: Path, tmp_path: Path) -> None:
    report = api.unpack(packed, out=tmp_path / "a" / "b")
    assert report.bundle == tmp_path / "a" / "b" / "bundle"
    assert contents(report.bundle) == contents(exported)
    assert open_bundle(report.bundle).manifest.digest == report.digest
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    again = api.pack(report.bundle, out=tmp_path / "again.zip")
    assert again.path.read_bytes() == packed.read_bytes()


def test_unzip_gives_the_same(packed: Path, tmp_path: Path) -> None:
    api.unpack(packed, out=tmp_path / "ours")
    with zipfile.ZipFile(packed) as opened:
        opened.extractall(tmp_path / "theirs")
    (tmp_path / "theirs" / make_wheel().name).unlink()  # it stays in the archive
    assert contents(tmp_path / "theirs") == contents(tmp_path / "ours")


def test_large_archives_are_read_too(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form for more than 2 GiB, without writing so much."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    report = api.pack(exported, out=tmp_path / "large.zip")
    monkeypatch.undo()
    assert b"PK\6\6" in report.path.read_bytes()[-200:]
    assert contents(api.unpack(report.path, out=tmp_path / "out").bundle) == contents(exported)


def test_readme_says_what_to_do(merging: Path, tmp_path: Path) -> None:
    report = api.pack(merging, out=tmp_path / "m.zip")
    with zipfile.ZipFile(report.path) as opened:
        text = opened.read("README.md").decode()
    manifest = open_bundle(merging).manifest
    for word in ("# lookupvit (smoke)", manifest.digest, MODEL, "edgecomp verify bundle", "max rel 2e-05"):
        assert word in text
    assert "edgecomp plugin build topk_merge --sm" in text
    wheel = make_wheel().name
    assert "edgecomp verify BUNDLE --on ssh://" in text
    assert f"unzip ARCHIVE.zip {wheel}" in text
    assert report.members[wheel] == len(make_wheel().content)
    assert text.count(f"/pip install './{wheel}[ort") == 3
    assert "pip install 'edgecomp" not in text, "no index has it"
    assert "photo.jpg" in text
    for file in data_path("engines", "plugins", "topk_merge").iterdir():
        assert report.members[f"plugins/topk_merge/{file.name}"] == file.stat().st_size
    out = api.unpack(report.path, out=tmp_path / "out").out
    source = data_path("engines", "plugins", "topk_merge", "kernel.cu")
    assert (out / "plugins" / "topk_merge" / "kernel.cu").read_bytes() == source.read_bytes()


def test_commands_of_the_readme_exist(packed: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(packed) as opened:
        text = opened.read("README.md").decode()
    assert "plugin" not in text
    verbs = {line.split()[1] for line in text.splitlines() if line.startswith("edgecomp ")}
    assert verbs == {"bundle", "doctor", "verify", "build", "run"}
    said = subprocess.run(
        [sys.executable, "-m", "edgecomp", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert [verb for verb in verbs if f"  {verb} " not in said] == []


def test_another_file_in_the_way(bundle: Path, packed: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "x.zip"
    out.write_text("dear to somebody")
    said = cli("bundle", "pack", bundle, "--out", out)
    assert (said.code, said.out) == (2, "")
    assert f"--out {out} is another file; give --force" in said.err
    assert out.read_text() == "dear to somebody"
    assert cli("bundle", "pack", bundle, "--out", out, "--force").code == 0
    assert "unchanged, the same bytes were there" in cli("bundle", "pack", bundle, "--out", out).out
    assert out.read_bytes() == packed.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "x.zip"]
    with pytest.raises(EdgecompError, match="lies in the bundle itself"):
        api.pack(bundle, out=bundle / "x.zip")
    with pytest.raises(EdgecompError, match="is a folder, a link or a device"):
        api.pack(bundle, out=tmp_path)


def test_file_that_changes_while_it_is_packed(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swap(out: Path, members: Any, **words: Any) -> bool:
        content = bytearray((bundle / WEIGHTS).read_bytes())
        content[-1] ^= 1
        (bundle / WEIGHTS).write_bytes(content)
        return written(out, members, **words)

    written = archive.write_archive
    monkeypatch.setattr(archive, "write_archive", swap)
    with pytest.raises(BundleError, match=f"{WEIGHTS} was changed while it was packed"):
        api.pack(bundle, out=tmp_path / "x.zip")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


# -- engines, timing caches and libraries ---------------------------------------------------------------------


def add_engine(bundle: Path, *, library: bytes = b"") -> Path:
    """Put an engine beside a bundle as `build` does, without building."""
    manifest = open_bundle(bundle).manifest
    folder = bundle / "engines" / "t4"
    folder.mkdir(parents=True)
    plan = folder / "model.m4.b1.tensorrt.engine"
    plan.write_bytes(b"a plan")
    hashes = {entry.name: entry.sha256 for entry in manifest.files}
    plugins = []
    if library:
        (folder / "topk.so").write_bytes(library)
        plugins = [
            {"name": "topk_merge", "op": "TopkMerge", "version": "1", "library": "topk.so", "sm": [75],
             "sha256": hashlib.sha256(library).hexdigest(), "tensorrt": "10.3.0", "cuda": "12.6"}
        ]  # fmt: skip
    record = {
        "schema": 1, "model": MODEL, "onnx_sha256": hashes[MODEL], "weights_sha256": hashes[WEIGHTS], "target": "t4",
        "runtime": "tensorrt", "runtime_version": "10.3.0", "sm": [75], "precision": "fp32", "workspace_mib": 0,
        "seconds": 1.0, "num_layers": 3, "size_bytes": 6, "sha256": hashlib.sha256(b"a plan").hexdigest(),
        "warnings": [], "inputs": [], "outputs": [], "edgecomp_version": "0.1.0", "plugins": plugins,
    }  # fmt: skip
    plan.with_suffix(".json").write_text(json.dumps(record))
    (folder / "builder.timing").write_bytes(b"times")
    return plan


def test_timing_caches_come_along_and_engines_on_request(bundle: Path, tmp_path: Path) -> None:
    plan = add_engine(bundle)
    report = api.pack(bundle, out=tmp_path / "a.zip")
    assert [name for name in report.members if "/engines/" in name] == ["bundle/engines/t4/builder.timing"]
    assert "1 engines were left out" in report.notes[0]
    full = api.pack(bundle, out=tmp_path / "b.zip", with_engines=True)
    assert "bundle/engines/t4/model.m4.b1.tensorrt.engine" in full.members
    plain = api.unpack(full.path, out=tmp_path / "plain")
    assert "2 files of engines stayed in the archive" in plain.notes[0]
    assert [file.name for file in (plain.bundle / "engines" / "t4").iterdir()] == ["builder.timing"]
    taken = api.unpack(full.path, out=tmp_path / "taken", with_engines=True)
    assert (taken.bundle / "engines" / "t4" / plan.name).read_bytes() == b"a plan"
    plan.write_bytes(b"altered")
    again = api.pack(bundle, out=tmp_path / "c.zip", with_engines=True)
    assert "was not built from this bundle, or was altered since" in again.notes[0]
    assert not [name for name in again.members if name.endswith(".engine")]


def test_forced_forms_come_along(bundle: Path, tmp_path: Path) -> None:
    (bundle / "parity").mkdir()
    for name in ("model.m4.b1.forced.onnx", "model.m4.b1.forced.json", "board.json", ".model.forced.onnx"):
        (bundle / "parity" / name).write_bytes(name.encode())
    report = api.pack(bundle, out=tmp_path / "a.zip")
    names = ["model.m4.b1.forced.json", "model.m4.b1.forced.onnx"]
    assert [name for name in report.members if "/parity/" in name] == [f"bundle/parity/{name}" for name in names]
    taken = api.unpack(report.path, out=tmp_path / "out").bundle / "parity"
    assert {file.name: file.read_bytes() for file in taken.iterdir()} == {name: name.encode() for name in names}


def test_library_comes_out_only_by_its_hash(bundle: Path, tmp_path: Path, cli: Cli) -> None:
    add_engine(bundle, library=b"\x7fELF code")
    packed = api.pack(bundle, out=tmp_path / "a.zip", with_engines=True).path
    sha256 = hashlib.sha256(b"\x7fELF code").hexdigest()
    words = ["bundle", "unpack", packed, "--with-engines", "--out", tmp_path / "out"]
    for more in ([], ["--allow-plugin", "0" * 12]):
        said = cli(*words, *more)
        assert said.code == 2
        assert f"topk.so is a compiled plugin (sha256 {sha256})" in said.err
        assert f"--allow-plugin {sha256[:12]}" in said.err
        assert not (tmp_path / "out").exists()
    with pytest.raises(InvalidSpec, match="--allow-plugin ff is no sha256"):
        api.unpack(packed, out=tmp_path / "out", allow_plugin=["ff"])
    assert not (api.unpack(packed, out=tmp_path / "without").bundle / "engines" / "t4" / "topk.so").exists()
    assert cli(*words, "--allow-plugin", sha256[:12].upper()).code == 0
    assert (tmp_path / "out" / "bundle" / "engines" / "t4" / "topk.so").read_bytes() == b"\x7fELF code"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("stray.so", "engines/t4/stray.so belongs to no plan"),
        ("stray.json", "engines/t4/stray.json belongs to no plan"),
        ("stray.engine", "stray.json of engine stray.engine cannot be read"),
    ],
)
def test_stray_file_among_engines(packed: Path, here: Path, name: str, text: str) -> None:
    bad = forge(here / "bad.zip", [*parts_of(packed), added(f"bundle/engines/t4/{name}", b"{}")])
    assert text in refused(bad, here, with_engines=True, allow_plugin=["0" * 12])


# -- hostile archives -----------------------------------------------------------------------------------------

NAMES = [
    "../evil", "/etc/evil", "bundle/../../evil", "bundle\\..\\evil", "C:evil", "C:\\evil", "bundle/sub/evil",
    "bundle/.hidden", "bundle/", "bundle", "", "bundle/engines/../evil", "bundle/engines/t4/evil.sh",
    "bundle/profiles/verify.json", "plugins/../x/y", "plugins/a/b/c", "README.md/x", "evil.onnx", "bundle/x\0y",
    "bundle/" + "x" * 300, "bundle/ü", "~root", "-rf", "bundle//x",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_name_that_does_not_belong_there(packed: Path, here: Path, name: str) -> None:
    bad = forge(here / "bad.zip", [*parts_of(packed), added(name)])
    assert f"{name[:200]!r} is not expected there, or leaves the folder" in refused(bad, here)


@pytest.mark.parametrize(
    ("mode", "what"),
    [(stat.S_IFLNK, "a link"), (stat.S_IFDIR, "a folder"), (stat.S_IFIFO, "a device"), (stat.S_IFCHR, "a device")],
)
def test_what_is_no_file(packed: Path, here: Path, mode: int, what: str) -> None:
    bad = forge(here / "bad.zip", [*parts_of(packed), added("bundle/extra.onnx", b"/etc/passwd", mode=mode | 0o777)])
    assert f"'bundle/extra.onnx' is {what}" in refused(bad, here)


@pytest.mark.parametrize("name", ["bundle/manifest.json", "bundle/Manifest.json", "README.md", "readme.md"])
def test_name_that_stands_there_twice(packed: Path, here: Path, name: str) -> None:
    said = refused(forge(here / "bad.zip", [*parts_of(packed), added(name)]), here)
    assert f"{name!r} stands there twice" in said or f"{name!r} is not expected" in said


def test_bomb(packed: Path, here: Path) -> None:
    zeros = added("plugins/a/zeros", bytes(8 << 20), method=zipfile.ZIP_DEFLATED)
    bad = forge(here / "bad.zip", [*parts_of(packed), zeros])
    assert "'plugins/a/zeros' is compressed or encrypted (method 8, " in refused(bad, here)


def entries(content: bytes) -> dict[str, int]:
    """Where each entry of the table begins, by name."""
    found, at = {}, content.find(b"PK\1\2")
    while at >= 0:
        length = struct.unpack_from("<H", content, at + 28)[0]
        found[content[at + 46 : at + 46 + length].decode()] = at
        at = content.find(b"PK\1\2", at + 46)
    return found


@pytest.mark.parametrize(
    ("field", "kind", "value", "text"),
    [
        (8, "<H", 1, "is compressed or encrypted"),  # the flag of encryption
        (24, "<L", 0xFFFFFF00, "is compressed or encrypted"),  # larger than what is stored
        (20, "<2L", (0xF0000000, 0xF0000000), "has 4026531840 bytes by the table"),
        (42, "<L", 0, "two members share bytes, as in a bomb"),
        (10, "<H", 99, "is compressed or encrypted (method 99"),
    ],
)
def test_table_that_lies(packed: Path, here: Path, field: int, kind: str, value: Any, text: str) -> None:
    content = bytearray(packed.read_bytes())
    at = entries(bytes(content))[f"bundle/{WEIGHTS}"]
    struct.pack_into(kind, content, at + field, *(value if isinstance(value, tuple) else (value,)))
    (here / "bad.zip").write_bytes(content)
    assert text in refused(here / "bad.zip", here)


def replace(parts: Parts, name: str, content: bytes) -> Parts:
    return [(info, content if info.filename == name else old) for info, old in parts]


def test_broken_crc(packed: Path, here: Path) -> None:
    content = packed.read_bytes()
    at = content.index(b"# lookupvit")
    (here / "bad.zip").write_bytes(content[:at] + b"$" + content[at + 1 :])
    assert "is damaged: Bad CRC-32 for file 'README.md'" in refused(here / "bad.zip", here)


def test_wrong_hash_with_the_right_crc(packed: Path, here: Path, exported: Path) -> None:
    altered = bytearray((exported / WEIGHTS).read_bytes())
    altered[100] ^= 1
    bad = forge(here / "bad.zip", replace(parts_of(packed), f"bundle/{WEIGHTS}", bytes(altered)))
    sha256 = open_bundle(exported).file(WEIGHTS).sha256
    assert f"bundle/{WEIGHTS} has sha256 " in (said := refused(bad, here))
    assert sha256[:12] in said


def test_other_size_than_the_manifest_says(packed: Path, here: Path, exported: Path) -> None:
    size = (exported / GOLDEN).stat().st_size
    bad = forge(here / "bad.zip", replace(parts_of(packed), f"bundle/{GOLDEN}", b"short"))
    assert f"bundle/{GOLDEN} has 5 bytes and the manifest says {size}" in refused(bad, here)


def test_missing_and_added_files(packed: Path, here: Path) -> None:
    parts = parts_of(packed)
    bad = forge(here / "bad.zip", [part for part in parts if part[0].filename != f"bundle/{MODEL}"])
    assert f"lacks 'bundle/{MODEL}'" in refused(bad, here)
    forge(bad, [*parts, added("bundle/extra.onnx")])
    assert "should not have 'bundle/extra.onnx'" in refused(bad, here)
    forge(bad, [part for part in parts if part[0].filename != f"bundle/{MANIFEST}"])
    assert f"holds no bundle/{MANIFEST}" in refused(bad, here)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"files": 1}', b"[" * 100_000, b"\xff"])
def test_manifest_that_is_none(packed: Path, here: Path, content: bytes) -> None:
    bad = forge(here / "bad.zip", replace(parts_of(packed), f"bundle/{MANIFEST}", content))
    assert f"bundle/{MANIFEST} is not a bundle's" in refused(bad, here)


def test_manifest_that_names_what_is_outside(packed: Path, here: Path) -> None:
    parts = parts_of(packed)
    raw = json.loads({info.filename: old for info, old in parts}[f"bundle/{MANIFEST}"])
    raw["files"][0]["name"] = "../../evil"
    raw["digest"] = digest_of(raw)
    bad = forge(here / "bad.zip", replace(parts, f"bundle/{MANIFEST}", json.dumps(raw).encode()))
    assert "lacks 'bundle/../../evil'" in refused(bad, here)


def test_altered_manifest(packed: Path, here: Path) -> None:
    parts = parts_of(packed)
    raw = json.loads({info.filename: old for info, old in parts}[f"bundle/{MANIFEST}"])
    raw["seed"] = 7
    bad = forge(here / "bad.zip", replace(parts, f"bundle/{MANIFEST}", json.dumps(raw).encode()))
    assert "does not match its own digest" in refused(bad, here)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda content: b"", "(0 bytes) does not end as a zip does"),
        (lambda content: b"#!/bin/sh\n" + content, "something was put before, behind or into it"),
        (lambda content: content + b"\0" * 22, "does not end as a zip does"),
        (lambda content: content[:-2] + b"\x05\x00abcde", "does not end as a zip does"),
        (lambda content: content[: len(content) // 2], "does not end as a zip does"),
        (lambda content: content[:-22] + b"PK\6\7" + bytes(16) + content[-22:], "no table where it says"),
        (lambda content: content[:-14] + b"\xff\xff\xff\xff" + content[-10:], "a table of 65535 members"),
        (lambda content: content[:-6] + b"\1\0\0\0" + content[-2:], "something was put before"),
        (lambda content: b"not a zip at all, but long enough", "does not end as a zip does"),
    ],
)
def test_what_is_no_archive(packed: Path, here: Path, change: Callable[[bytes], bytes], text: str) -> None:
    (here / "bad.zip").write_bytes(change(packed.read_bytes()))
    assert text in refused(here / "bad.zip", here)


def test_too_many_members(here: Path) -> None:
    bad = forge(here / "bad.zip", [added(f"plugins/a/{k}", b"") for k in range(10_001)])
    assert "has a table of 10001 members" in refused(bad, here)


def test_flipped_bits_never_leave_a_half(packed: Path, exported: Path, tmp_path: Path) -> None:
    """200 archives with one to three wrong bytes: the bundle comes out as it was, or nothing does."""
    good, draw = packed.read_bytes(), random.Random(0)
    table, expected, whole = good.find(b"PK\1\2"), contents(exported), 0
    with zipfile.ZipFile(packed) as opened:
        wheel = opened.getinfo(make_wheel().name)  # which is not read: wrong bits in it change nothing
    unread = range(wheel.header_offset, wheel.header_offset + 30 + len(wheel.filename) + wheel.file_size)
    read = [place for place in range(len(good)) if place not in unread]
    for _ in range(200):
        content = bytearray(good)
        for _ in range(draw.randint(1, 3)):  # half of them in the table, which is small
            place = draw.randrange(table, len(good)) if draw.random() < 0.5 else draw.choice(read)
            content[place] = draw.randrange(256)
        (tmp_path / "bad.zip").write_bytes(content)
        try:
            out = api.unpack(tmp_path / "bad.zip", out=tmp_path / "out").bundle
        except EdgecompError:
            assert [path.name for path in tmp_path.iterdir()] == ["bad.zip"]
            continue
        assert contents(out) == expected
        shutil.rmtree(tmp_path / "out")
        whole += 1
    assert whole < 100  # unread fields of the table: times, versions, rights


# -- where it goes --------------------------------------------------------------------------------------------


def test_place_that_is_taken(
    packed: Path, tmp_path: Path, bundle: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path)
    before = contents(bundle)
    for place, text in (("bundle", "is not empty"), ("file", "is a file or a link"), ("link", "is a file or a link")):
        said = cli("bundle", "unpack", packed, "--out", tmp_path / place)
        assert (said.code, said.out) == (2, "")
        assert f"--out {tmp_path / place} {text}" in said.err
    assert contents(bundle) == before
    monkeypatch.chdir(tmp_path)
    assert "next       edgecomp verify good/bundle" in cli("bundle", "unpack", packed).out
    shutil.copy(packed, tmp_path / "noending")
    assert "noending gives no name for the folder" in cli("bundle", "unpack", "noending").err
    assert "is not a file; `edgecomp bundle pack` makes one" in cli("bundle", "unpack", "absent.zip").err


def test_full_disk(
    packed: Path, bundle: Path, tiny_disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tiny_disk(200)
    with pytest.raises(EdgecompError, match=r"needs \d+ bytes and .*disk0 has \d+ free; nothing was written"):
        api.unpack(packed, out=disk / "out")
    monkeypatch.setattr(archive, "_require_space", lambda out, table: None)  # it fills up while it is written to
    with pytest.raises(EdgecompError, match="could not be written: the disk is full"):
        api.unpack(packed, out=disk / "out")
    with pytest.raises(EdgecompError, match=r"x\.zip could not be written: the disk is full"):
        api.pack(bundle, out=disk / "x.zip")
    assert list(disk.iterdir()) == []


def test_the_wheel_stays_in_the_archive(packed: Path, tmp_path: Path) -> None:
    """It is code, and edgecomp is installed where it unpacks."""
    report = api.unpack(packed, out=tmp_path / "out", with_engines=True)
    wheel = make_wheel().name
    assert wheel in zipfile.ZipFile(packed).namelist()
    assert wheel not in report.members
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["README.md", "bundle"]
