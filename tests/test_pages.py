"""The code on the README and on the pages of the site runs, block after block, as a reader would run it."""

import contextlib
import importlib.util
import unittest
from pathlib import Path

import pytest
from sybil import Document
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parents[1]
CODE = [
    p for p in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if "```python" in p.read_text()
]


@pytest.mark.parametrize("page", CODE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a block may write a report
    document = Document.parse(str(page), PythonCodeBlockParser(), SkipParser())
    document.namespace |= {"__name__": "__main__", "installed": importlib.util.find_spec}
    examples = list(document.examples())
    assert examples
    for example in examples:
        with contextlib.suppress(unittest.SkipTest):  # raised by skip: next if(...)
            example.evaluate()
