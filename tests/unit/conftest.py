"""What the tests of bundles and of the command line share: exported bundles, and a way to call the command line."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from edgecomp.bundle import MANIFEST, digest_of


class Said(NamedTuple):
    """What a command line answered."""

    code: int
    out: str
    err: str


Cli = Callable[..., Said]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run `edgecomp WORDS` in this process, through its real entry point."""
    from edgecomp.cli import main

    def call(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["edgecomp", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        said = capsys.readouterr()
        return Said(int(exit_.value.code or 0), said.out, said.err)

    return call


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of lookupvit at test size, budgets 4 and 9; not to be written to."""
    pytest.importorskip("torch")
    from edgecomp import api

    return api.export("lookupvit", preset="smoke", out=tmp_path_factory.mktemp("exported") / "bundle").bundle


@pytest.fixture(scope="session")
def exported_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that takes tokens and a mask (perceiver); not to be written to."""
    pytest.importorskip("torch")
    from edgecomp import api

    out = tmp_path_factory.mktemp("exported_tokens") / "bundle"
    return api.export("perceiver", preset="smoke-idefics2", budget=[4], out=out).bundle


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A copy of `exported`, to be damaged."""
    return shutil.copytree(exported, tmp_path / "bundle")


@pytest.fixture
def edit_manifest() -> Callable[[Path, Callable[[dict[str, Any]], object]], None]:
    """Change a bundle's manifest and write it with the digest that fits, as a forger would."""

    def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
        file = bundle / MANIFEST
        raw = json.loads(file.read_bytes())
        change(raw)
        raw["digest"] = digest_of(raw)
        file.write_text(json.dumps(raw))

    return edit


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mount a file system of so many KiB; skipped where that is not allowed."""
    import subprocess

    mounted: list[Path] = []

    def mount(size_kib: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no program `mount` here")
        if done.returncode:
            pytest.skip(f"mounting a file system is not allowed here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)
