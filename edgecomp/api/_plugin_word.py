"""Which plugin library a build may load: none that came inside a bundle, unless its hash is trusted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgecomp.errors import InvalidSpec, UnknownName
from edgecomp.specs.origin import file_sha256

__all__ = ["require_plugin_word"]

_PLUGIN_WORDS = ("auto", "require", "off")


def require_plugin_word(folder: Path, word: str, allowed: Sequence[str]) -> None:
    """Refuse a library that came inside the bundle, unless its hash is allowed: a path does not name its content."""
    if word in _PLUGIN_WORDS:
        return
    library = Path(word)
    if not word.endswith(".so"):
        raise UnknownName("--plugin", word, _PLUGIN_WORDS, hint="A path that ends in .so names a library.")
    if folder.resolve() not in library.resolve().parents or not library.is_file():
        return
    sha256 = file_sha256(library)
    if not any(len(one) >= 12 and sha256.startswith(one.lower()) for one in allowed):
        raise InvalidSpec(
            f"--plugin {word} came inside the bundle (sha256 {sha256}) and would run with your rights; where you trust "
            f"it, give --allow-plugin {sha256[:12]}, else --plugin require compiles edgecomp's own"
        )
