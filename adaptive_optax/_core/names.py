"""Display of names of arms, tasks and metrics, which may contain any character."""

from __future__ import annotations

import unicodedata

_JOINERS = "\u200c\u200d"  # zero-width, but needed in Persian and in emoji
_BLANK = "\u115f\u1160\u2800\u3164\uffa0"  # letters and symbols without ink
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def visible(text: str) -> str:
    r"""Escapes what a page or a terminal would obey or hide: escapes, line breaks, right-to-left marks.

    Such characters are written as in Python source. A text with no visible character is escaped as a whole.

    Examples:
        >>> visible("red \x1b[31m"), visible("\u200b")
        ('red \\x1b[31m', '\\u200b')
    """
    shown = "".join(character if _is_harmless(character) else repr(character)[1:-1] for character in text)
    if text and not any(_has_ink(character) for character in shown):
        return ascii(shown)[1:-1].replace(" ", "\\x20")
    return shown


def as_cell(text: str) -> str:
    """Makes text safe for a spreadsheet: visible, and prefixed with an apostrophe if it would be a formula.

    Examples:
        >>> as_cell("=1+1"), as_cell("adam")
        ("'=1+1", 'adam')
    """
    return ("'" if text.startswith(_FORMULA) else "") + visible(text)


def shortened(name: str, length: int) -> str:
    """Fits a name on one line by omitting its middle; `length` is in letters of average width."""
    name = visible(" ".join(name.split()))
    widths = [_width(character) for character in name]
    if sum(widths) <= length:
        return name
    first, last, left = 0, len(name), length - 1.0
    while first < last:
        at = first if first <= len(name) - last else last - 1
        left -= widths[at]
        if left < 0:
            break
        first, last = (first + 1, last) if at == first else (first, at)
    return f"{name[:first]}…{name[last:]}"


def _is_harmless(character: str) -> bool:
    return character.isprintable() or character in _JOINERS or unicodedata.category(character) == "Zs"


def _has_ink(character: str) -> bool:
    return unicodedata.category(character)[0] in "LNPSC" and character not in _BLANK + _JOINERS


def _width(character: str) -> float:
    """A generous estimate of a character's width, in letters of average width."""
    if unicodedata.east_asian_width(character) in "WF" or character in "mwMW@%":
        return 1.9
    return 0.0 if unicodedata.combining(character) else 1.3 if character.isupper() else 1.0
