"""The journal of a search: what was measured stays measured, whenever and however the search is ended.

JSON lines. The first says what every number depends on; each other is one record, synced to disk before the search goes
on. A process can be killed at any byte: what was being written then is a last line without its end, which is dropped
and done again. Limits are not in the first line, for no number depends on them: another limit goes on with the same
measurements.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal

import msgspec

from edgecomp.errors import EdgecompError, InvalidSpec, RunError
from edgecomp.profiles.machine import Machine
from edgecomp.search.result import Agreement, Measured

__all__ = ["Exported", "Journal", "Judged", "Record", "Refused", "RefusedFor", "Timed", "Where", "flat"]

_KIND: Final = "edgecomp search journal"
_SCHEMA: Final = 1


class Exported(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="exported"):
    """Graphs were exported into a bundle, in so many seconds."""

    names: tuple[str, ...]
    bundle: str
    seconds: float


class Timed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="measured"):
    """A candidate was measured, or estimated; `seconds` are this candidate's share where several hosts measured."""

    name: str
    value: Measured
    seconds: float
    flops: int = 0


class Judged(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="judged"):
    """A candidate's agreement was found; none where it cannot be told."""

    name: str
    value: Agreement | None
    seconds: float


RefusedFor = Literal["fails parity", "cannot be exported", "cannot be run"]


class Refused(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="refused"):
    """A candidate cannot be made or run. One that cannot be run is tried again when the search goes on."""

    name: str
    kind: RefusedFor
    why: str


class Where(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="where"):
    """The machine behind `--on`, which is known only once it has measured."""

    machine: Machine


Record = Exported | Timed | Judged | Refused | Where


class _First(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    kind: str
    schema: int
    of: dict[str, Any]


class Journal:
    """An open journal.

    Args:
        path: of the file; made where it is not there.
        of: what every number depends on; see `flat`.

    Raises:
        InvalidSpec: it is of another search; the text names the first field that differs, and both values.
        RunError: a line in it is damaged, or it is of another schema.
        EdgecompError: it cannot be read or written.
    """

    def __init__(self, path: Path, of: Mapping[str, Any]) -> None:
        self.path = path
        self.dropped = 0  # bytes of a line that was being written when the search was killed
        self.records: list[Record] = []
        try:
            self._file = path.open("a+b")  # as long as the search runs
            self._file.seek(0)
            content = self._file.read()
            whole = content[: content.rfind(b"\n") + 1]
            self.dropped = len(content) - len(whole)
            if self.dropped:
                self._file.truncate(len(whole))
        except OSError as error:
            raise EdgecompError(f"journal {path} cannot be used: {error.strerror}; name another --out") from None
        lines = whole.splitlines()
        if not lines:
            self._write(_First(_KIND, _SCHEMA, dict(of)))
            _sync_folder(path.parent)
            return
        try:
            self._require_same(lines[0], of)
            for number, line in enumerate(lines[1:], 2):
                self.records.append(self._read(number, line))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self._file.close()

    def add(self, record: Record) -> None:
        """Write a record, and return once it is on disk."""
        self._write(record)
        self.records.append(record)

    def _write(self, line: msgspec.Struct) -> None:
        try:
            self._file.write(msgspec.json.encode(line) + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise EdgecompError(
                f"journal {self.path} cannot be written: {error.strerror}; free space and run the same command again, "
                "it goes on from here"
            ) from None

    def _require_same(self, line: bytes, of: Mapping[str, Any]) -> None:
        try:
            first = msgspec.json.decode(line, type=_First)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise RunError(
                f"{self.path} is no journal of a search; --fresh begins anew, or name another --out"
            ) from None
        if first.kind != _KIND or first.schema != _SCHEMA:
            raise RunError(
                f"{self.path} is {first.kind!r} of schema {first.schema}, and this edgecomp writes {_KIND!r} of schema "
                f"{_SCHEMA}; --fresh begins anew"
            )
        here = msgspec.json.decode(msgspec.json.encode(dict(of)))  # as it would be read
        for field in dict.fromkeys((*first.of, *here)):
            old, new = first.of.get(field, "nothing"), here.get(field, "nothing")
            if old != new:
                raise InvalidSpec(
                    f"the search in {self.path.parent} was begun with {field} {_short(old)}, and this one has "
                    f"{_short(new)}: their numbers do not belong together. Name another --out, or give --fresh to "
                    "measure all of it again"
                )

    def _read(self, number: int, line: bytes) -> Record:
        try:
            record: Record = msgspec.json.decode(line, type=Record)
            return record
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RunError(f"{self.path}, line {number} is damaged ({error}); --fresh begins anew") from None


def flat(fields: Mapping[str, Any], *, above: str = "") -> dict[str, Any]:
    """Return nested fields by dotted names, so that the one that differs can be named."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        path = f"{above}.{name}" if above else name
        found |= flat(value, above=path) if isinstance(value, Mapping) else {path: value}
    return found


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
