"""Files that appear whole or not at all, and documents that are read whole or refused by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec
import pytest

from edgecomp.errors import EdgecompError, RunError
from edgecomp.files import encode_document, read_content, read_document, require_folder, write_whole


class Note(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    schema: Literal[2] = 2
    kind: Literal["edgecomp note"] = "edgecomp note"
    words: tuple[str, ...]


def read(path: Path) -> Note:
    return read_document(path, Note, noun="note", verb="edgecomp jot", again="jot it again", largest=200)


def test_a_document_comes_back_as_it_was_written(tmp_path: Path) -> None:
    note = Note(words=("one", "two"))
    path = write_whole(tmp_path / "a" / "b.json", encode_document(note), noun="note")
    assert read(path) == note
    assert sorted(file.name for file in path.parent.iterdir()) == ["b.json"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"kind": "edgecomp note", "sch', "truncated or no JSON"),
        (b"\xff\xfe", "truncated or no JSON"),
        (b"[" * 150, "its kind is 'missing'"),
        (b"[1, 2]", "its kind is 'missing'"),
        (b'{"kind": "shopping list"}', "no note of `edgecomp jot`: its kind is 'shopping list'"),
        (b'{"kind": "edgecomp note", "schema": 7}', "is of schema 7, and this edgecomp reads 2"),
        (b'{"kind": "edgecomp note", "schema": 2, "words": [3]}', "damaged or was edited"),
        (b'{"kind": "edgecomp note", "schema": 2, "words": [], "more": 1}', "more"),
        (b" " * 201, "has 201 bytes, more than any note"),
    ],
)
def test_what_is_no_such_document_is_refused_by_name(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"x\.json") as caught:
        read(path)
    assert said in str(caught.value)


def test_a_folder_is_asked_without_a_trace(tmp_path: Path) -> None:
    require_folder(tmp_path / "a" / "b", noun="note")
    require_folder(Path(), noun="note")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").write_text("no folder")
    with pytest.raises(EdgecompError, match=r"note cannot be written to .*b: Not a directory; name another place"):
        require_folder(tmp_path / "a" / "b", noun="note")


def test_a_deep_document_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_bytes(b'{"more":' + b"[" * 100_000)
    with pytest.raises(RunError, match=r"deep\.json is truncated or no JSON"):
        read_document(path, Note, noun="note", verb="edgecomp jot", again="jot it again", largest=1 << 20)


def test_an_absent_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"note .*gone\.json cannot be read: No such file"):
        read_content(tmp_path / "gone.json", noun="note", largest=10)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(EdgecompError, match=r"note .*x\.json cannot be written: No space left on device"):
        write_whole(path, b"new", noun="note")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(EdgecompError, match="cannot be written"):
        write_whole(tmp_path / "file" / "x.json", b"new", noun="note")
