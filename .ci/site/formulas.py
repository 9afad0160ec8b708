"""Formulas become MathML while the site is built: readers need no script, and an error fails the build.

Pages and docstrings write `$...$` within a line and `$$...$$` around lines of their own. The extension
arithmatex finds them, and MathML Core, which every current browser shows, is put in their place. A formula
outside the delimiters, or in another notation, is a warning, which `mkdocs build --strict` does not pass.
"""

import html
import logging
import re

from math_core import LatexError, LatexToMathML

log = logging.getLogger(f"mkdocs.hooks.{__name__}")

_CONVERTER = LatexToMathML(fancy_error=False)
_FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">(?P<latex>.*?)</(?P=tag)>', re.DOTALL)
_VERBATIM = re.compile(r"<(pre|code|script|style|math)\b.*?</\1>|<[^>]*>", re.DOTALL)
_UNCONVERTED = re.compile(r"\\[A-Za-z]+|:math:|\.\. [a-z-]+::|\w::\s|\$[^\s\d]")


def on_page_content(page_html, *, page, **_):
    """Converts the formulas of a page, and warns of those that are left."""

    def convert(found):
        is_block = found["tag"] == "div"
        latex = html.unescape(found["latex"]).strip()[2:-2]  # without \( and \), or \[ and \]
        try:
            math = _CONVERTER.convert_with_local_state(latex, displaystyle=is_block)
        except LatexError as error:
            log.warning("%s: the formula %r is not understood: %s", page.file.src_uri, latex, error)
            return found[0]
        return f'<div class="formula">{math}</div>' if is_block else math

    converted = _FORMULA.sub(convert, page_html)
    text = html.unescape(_VERBATIM.sub(" ", converted))
    for left in _UNCONVERTED.finditer(text):
        around = " ".join(text[max(0, left.start() - 40) : left.end() + 40].split())
        log.warning(
            "%s: %r looks like a formula; write it as $...$: ...%s...", page.file.src_uri, left[0], around
        )
    return converted
