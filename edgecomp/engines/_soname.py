"""Gives a loaded shared library a second name, without a compiler and without touching its folder.

The TensorRT-RTX wheel ships only `libtensorrt_rtx.so.1`, yet its ONNX parser calls `dlopen("libtensorrt_rtx.so")`
when it meets a plugin, and the process aborts when that fails. The dynamic loader answers such a call from the
libraries in memory, by their SONAME. So a shared object of a few hundred bytes is written here, with no code and
no symbols: its SONAME is the missing name, and its one NEEDED entry is the library that is loaded already.
It is loaded RTLD_LOCAL: RTLD_GLOBAL would also work, but it would put the symbols of TensorRT-RTX before those of a
full TensorRT that the same process imports later, and both libraries export `createInferBuilder_INTERNAL`.

Source: System V gABI, chapter 5 ("Dynamic Section"); glibc `_dl_map_object`, which compares SONAMEs first.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import struct
import sys
import tempfile
from pathlib import Path

from edgecomp.errors import BuildError

__all__ = ["provide_soname"]

_MACHINES = {"x86_64": 62, "aarch64": 183}  # e_machine of the ELF header
_PT_LOAD, _PT_DYNAMIC, _PT_GNU_STACK = 1, 2, 0x6474E551
_READ_WRITE = 6  # older glibc relocates the dynamic section in place; nothing here is ever executed
_PAGE = 0x10000  # the largest page of either machine
_DT_NULL, _DT_NEEDED, _DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_STRSZ, _DT_SYMENT, _DT_SONAME = 0, 1, 4, 5, 6, 10, 11, 14
_HEADER, _PROGRAM_HEADER, _SYMBOL, _DYNAMIC = 64, 56, 24, 16  # bytes of each structure


def provide_soname(name: str, needed: str) -> None:
    """Make the loaded library `needed` answer to `name` as well, in this process.

    Does nothing where `name` is answered already, for example by a system-wide installation that is in use.

    Args:
        name: the SONAME that somebody will ask the dynamic loader for.
        needed: the SONAME of the library that is loaded and should answer.
    """
    if not sys.platform.startswith("linux") or _is_loaded(name):
        return
    if not _is_loaded(needed):
        raise BuildError(f"{needed} is not loaded, so it cannot answer to {name}; import its Python module first")
    content = _shared_object(name, needed)
    _load_from_memory(name, content)
    if not _is_loaded(name):
        _load_from_file(name, content)
    if not _is_loaded(name):
        raise BuildError(
            f"the dynamic loader takes no second name {name} for {needed}; put a symbolic link of that name "
            f"into a folder on LD_LIBRARY_PATH before the program starts"
        )


def _is_loaded(name: str) -> bool:
    try:
        ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return False
    return True


def _load_from_memory(name: str, content: bytes) -> None:
    """Load `content` from an anonymous file of the kernel; leaves the work undone where there is none."""
    try:
        descriptor = os.memfd_create(name)
    except (AttributeError, OSError):
        return
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(content)
        ctypes.CDLL(f"/proc/self/fd/{descriptor}", mode=ctypes.RTLD_LOCAL)
    except OSError:
        os.close(descriptor)
    # On success the descriptor stays open. The loader remembers that path, and would take another library
    # that is loaded from a reused descriptor number for this one.


def _load_from_file(name: str, content: bytes) -> None:
    """Load `content` from a file in a folder of its own, which is gone again afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="edgecomp-"))
    try:
        path = folder / name
        path.write_bytes(content)
        ctypes.CDLL(str(path), mode=ctypes.RTLD_LOCAL)
    except OSError as error:
        raise BuildError(f"a shared object cannot be loaded from {folder.parent}: {error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _shared_object(name: str, needed: str) -> bytes:
    """Return an ELF64 shared object with a SONAME, one NEEDED entry and nothing else."""
    machine = platform.machine()
    if machine not in _MACHINES:
        raise BuildError(f"no shared object can be written for {machine!r}; known: {', '.join(_MACHINES)}")
    strings = b"\0" + name.encode() + b"\0" + needed.encode() + b"\0"
    program_headers = 3
    symbols_at = _HEADER + program_headers * _PROGRAM_HEADER
    hash_at = symbols_at + _SYMBOL  # the one symbol is the null symbol
    hashes = struct.pack("<5I", 1, 1, 0, 0, 0)  # one bucket, one chain, both empty; then padding to 8 bytes
    hashes += b"\0" * (-len(hashes) % 8)
    dynamic_at = hash_at + len(hashes)
    entries = 8
    strings_at = dynamic_at + entries * _DYNAMIC
    size = strings_at + len(strings)
    dynamic = (
        (_DT_SONAME, 1),
        (_DT_NEEDED, 1 + len(name.encode()) + 1),
        (_DT_HASH, hash_at),
        (_DT_STRTAB, strings_at),
        (_DT_SYMTAB, symbols_at),
        (_DT_STRSZ, len(strings)),
        (_DT_SYMENT, _SYMBOL),
        (_DT_NULL, 0),
    )
    identification = b"\x7fELF" + bytes([2, 1, 1, 0]) + b"\0" * 8  # 64 bits, little-endian, version 1, System V
    shared_object_type = 3
    header = identification + struct.pack(
        "<HHIQQQIHHHHHH",
        *(shared_object_type, _MACHINES[machine], 1, 0, _HEADER, 0, 0),  # no entry point, no section headers
        *(_HEADER, _PROGRAM_HEADER, program_headers, 0, 0, 0),
    )
    headers = (
        _program_header(_PT_LOAD, 0, size, _PAGE),
        _program_header(_PT_DYNAMIC, dynamic_at, entries * _DYNAMIC, 8),
        _program_header(_PT_GNU_STACK, 0, 0, 16),  # without it the loader wants an executable stack
    )
    body = b"\0" * _SYMBOL + hashes + b"".join(struct.pack("<qQ", *entry) for entry in dynamic) + strings
    return header + b"".join(headers) + body


def _program_header(kind: int, offset: int, size: int, alignment: int) -> bytes:
    return struct.pack("<IIQQQQQQ", kind, _READ_WRITE, offset, offset, offset, size, size, alignment)
