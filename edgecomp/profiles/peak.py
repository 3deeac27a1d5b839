"""The most memory that this process held since a moment, by Linux' own mark of it."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["begin_peak", "read_peak_mib"]

_PROCESS = Path("/proc/self")
_MARK = "5"  # what resets the mark, by proc(5)


def begin_peak(process: Path = _PROCESS) -> bool:
    """Set the mark of the most resident memory to what is resident now; False where the system does not let it."""
    try:
        (process / "clear_refs").write_text(_MARK, encoding="ascii")
    except OSError:
        return False
    return True


def read_peak_mib(process: Path = _PROCESS) -> float | None:
    """Return the most MiB that were resident since `begin_peak`; None where the system does not tell."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB$", (process / "status").read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) / 1024 if found else None
