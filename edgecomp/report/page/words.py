"""Text from files that are not trusted, made safe to look at, for a table in Markdown and for a cell in a CSV."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

__all__ = ["csv_cell", "file_label", "joined", "markdown", "shown", "slug"]

_LONGEST = 160
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # control, format (bidi too), surrogates, separators of lines
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|~$!&])")
_STARTS = re.compile(r"^(\d*)([#+=.)-])")  # what begins a heading, a list or a rule
_LINKS = re.compile(r"(?i)(https?|ftp|mailto)(:)|(www)(\.)")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # the wide forms too


def shown(text: object, *, longest: int = _LONGEST) -> str:
    """Return a text on one line in which no character hides, turns others round or ends the line.

    Blanks become one space, characters that cannot be seen their number (`U+202E`), and what is longer is cut.
    """
    letters = []
    for letter in re.sub(r"[ \t\r\n\f\v]+", " ", str(text)).strip():
        hides = unicodedata.category(letter) in _HIDDEN
        letters.append(f"\\u{ord(letter):04x}" if hides else letter)
        if len(letters) > longest:
            return "".join(letters[: longest - 1]) + "\u2026"
    return "".join(letters)


def joined(*parts: object) -> str:
    """Return what is not empty, with commas between."""
    return ", ".join(text for text in map(shown, parts) if text)


def markdown(text: str) -> str:
    """Return a text as Markdown that means the text itself, in a table's cell as well."""
    escaped = _MARKDOWN.sub(r"\\\1", shown(text, longest=10_000))
    return _STARTS.sub(r"\1\\\2", _LINKS.sub(r"\1\3\\\2\4", escaped))


def csv_cell(text: str) -> str:
    """Return a text that no spreadsheet takes for a formula."""
    plain = shown(text, longest=10_000)
    return f"'{plain}" if plain.startswith(_FORMULA) else plain


def slug(text: str, taken: set[str]) -> str:
    """Return a name for a file or an anchor that is not among `taken`, and put it there."""
    base = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60].strip("-") or "part"
    name, number = base, 2
    while name in taken:
        name, number = f"{base}-{number}", number + 1
    taken.add(name)
    return name


def file_label(path: Path, base: Path | None) -> str:
    """Return a file's name as a page says it: below the folder that was given, never an absolute path."""
    return shown(path.relative_to(base).as_posix() if base is not None else path.name)
