"""What a question's words tell a router: counts and switches, in any script, without a model."""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import numpy.typing as npt

__all__ = ["WORD_SIGNALS", "read_words"]

#: What `read_words` returns, in this order: how many words, and 1 where the text has one of a kind.
WORD_SIGNALS = ("words", "negation", "counting", "reasoning", "detail")

_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")
_JOINERS = "\u00ad\u200c\u200d"  # soft hyphen, zero-width non-joiner and joiner
_MOST = 10_000  # characters that are read, some 2,000 words: a bound on time
_KINDS = (  # the founding notes' lists; English alone
    re.compile(r"\bnot\b|n['\u2019]t\b"),
    re.compile(r"\bhow many\b|\bcount\b|\bnumber\b"),
    re.compile(r"\bwhy\b|\bbecause\b|\breason\b"),
    re.compile(r"\bsmall\b|\btext\b|\bcorner\b|\bbackground\b"),
)


def read_words(text: str) -> npt.NDArray[np.float32]:
    """Return the signals of a text, (1, 5), as `WORD_SIGNALS` names them; an empty text gives zeros.

    Words are runs of letters, digits and underscores of any script, with their marks, joiners and apostrophes; a
    script that writes no spaces counts as one word a run. Negation, counting, reasoning and detail know English words
    alone. Of a text the first 10,000 characters are read, each run of blanks counted as one.
    """
    lowered = " ".join(text.casefold().split())[:_MOST]
    joined = "".join(letter for letter in lowered if not _joins(letter))
    found = [float(len(_WORD.findall(joined))), *(float(bool(kind.search(lowered))) for kind in _KINDS)]
    return np.array([found], np.float32)


def _joins(letter: str) -> bool:
    r"""Say whether a character belongs to the letter before it: vowel signs and accents, which `\w` does not match."""
    return letter in _JOINERS or unicodedata.category(letter).startswith("M")
