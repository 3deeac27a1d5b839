"""Where the data of edgecomp lies, and the only place that reads the environment.

The root folders `export/`, `engines/` and `profiles/` of a checkout hold data and native code. A wheel
ships them as `edgecomp/_data/...`, so an installed package looks beside this file and a checkout
(or an editable install of it) looks one folder up.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path

__all__ = [
    "cache_dir",
    "config_dir",
    "data_path",
    "gpus_are_in_bus_order",
    "photograph_path",
    "says_each_step",
    "source_digest",
    "visible_gpus",
]

_PACKAGE = Path(__file__).resolve().parent
_SHIPPED = _PACKAGE / "_data"


def data_path(*parts: str) -> Path:
    """Return the path of a data file or folder, for example `data_path("export", "recipes")`."""
    root = _SHIPPED if _SHIPPED.is_dir() else _PACKAGE.parent
    return root.joinpath(*parts)


def photograph_path() -> Path:
    """Return the photograph that ships with edgecomp (`export/photograph/README.md` states its origin)."""
    return data_path("export", "photograph", "photograph.jpg")


def cache_dir() -> Path:
    """Return the user's cache folder for edgecomp: `EDGECOMP_CACHE_DIR`, or the system's usual place."""
    import platformdirs

    named = os.environ.get("EDGECOMP_CACHE_DIR", "")
    return Path(named) if named else Path(platformdirs.user_cache_dir("edgecomp"))


def config_dir() -> Path:
    """Return the user's folder for what is to be kept: `EDGECOMP_CONFIG_DIR`, or the system's usual place."""
    import platformdirs

    named = os.environ.get("EDGECOMP_CONFIG_DIR", "")
    return Path(named) if named else Path(platformdirs.user_config_dir("edgecomp"))


def says_each_step() -> bool:
    """Say whether long verbs write each step to stderr as a line, also where that is no terminal (`--on` has it so)."""
    return os.environ.get("EDGECOMP_PROGRESS", "") == "lines"


def visible_gpus() -> str | None:
    """Return `CUDA_VISIBLE_DEVICES`, by which a user says which GPUs a process sees; None where all are."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def gpus_are_in_bus_order() -> bool:
    """Say whether CUDA numbers the GPUs as nvidia-smi does; unless told to, it puts the fastest first."""
    return os.environ.get("CUDA_DEVICE_ORDER", "") == "PCI_BUS_ID"


@functools.cache  # as it was when it was read first: a long process may lose the right to read it
def source_digest() -> str:
    """Return the sha256 over edgecomp's own Python files, so that a changed edgecomp is never taken for the same."""
    digest = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*.py")):
        digest.update(str(file.relative_to(_PACKAGE)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()
