"""What a name or a reason must not hold, because it is written into tables, pages, logs and paths."""

from __future__ import annotations

import re
import unicodedata

# Joiners are part of words in Hindi, Persian and others; other format characters are not seen, or turn text around.
_JOINERS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format, surrogate, line and paragraph separator
# What a spreadsheet runs when it opens a table. After + - @ it needs a call, a link or another program.
_FORMULA = re.compile(r"=|[+\-@].*(\w\(|[|!])")


def name_fault(name: str) -> str | None:
    """Why a class or a photo cannot have this name, None where it can: `'a\\nb' holds the control character U+000A`."""
    if found := _unseen(name):
        return f"{name!r} holds {found}"
    if _FORMULA.match(name):
        return f"{name!r} begins like a formula, which a spreadsheet would run"
    return None


def one_line(text: str) -> str:
    """A reason that a person wrote, on one line.

    Raises:
        ValueError: it holds a character that is not seen or that turns text around; says which.
    """
    line = " ".join(text.split())
    if found := _unseen(line):
        raise ValueError(f"holds {found}; write it without")
    return line


def markdown(text: str) -> str:
    """Text as it is seen, for a line or a table cell of a markdown page."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", " ".join(text.split()))


def _unseen(text: str) -> str | None:
    for character in text:
        if unicodedata.category(character) in _UNSEEN and character not in _JOINERS:
            code = f"U+{ord(character):04X}"
            if unicodedata.category(character) == "Cc":
                return f"the control character {code}"
            return f"the invisible character {code} ({unicodedata.name(character, 'no name').lower()})"
    return None
