"""Every public name has a docstring and stands exactly once in the reference, under its public path.

Public is what the public modules re-export (`from ... import name as name`) or, if they re-export nothing,
define. Each fault is a warning, which `mkdocs build --strict` does not pass.
"""

import ast
import logging
import re
from collections import Counter
from pathlib import Path

import griffe

log = logging.getLogger(f"mkdocs.hooks.{__name__}")

ROOT = Path(__file__).parents[2]
MODULES = (
    "adaptive_optax",
    "adaptive_optax.integrations.flax",
    "adaptive_optax.integrations.orbax",
    "adaptive_optax.study",
    "adaptive_optax.study.tasks",
    "adaptive_optax.typing",
)
_BLOCK = re.compile(r"^::: (\S+)", re.MULTILINE)


def public_names(module):
    """Returns the public modules' own paths and those of what they export."""
    path = ROOT.joinpath(*module.split("."))
    source = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
    nodes = list(ast.walk(ast.parse(source.read_text())))
    names = {
        alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    if not names:
        members = ast.parse(source.read_text()).body
        names = {node.name for node in members if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return {module} | {f"{module}.{name}" for name in names if not name.startswith("_")}


def faults(pages):
    """Yields what is wrong with the reference, given the text of its pages."""
    public = set().union(*map(public_names, MODULES))
    shown = Counter(name for text in pages for name in _BLOCK.findall(text))
    package = griffe.load("adaptive_optax", search_paths=[ROOT], resolve_aliases=True, allow_inspection=False)
    for name in sorted(public | shown.keys()):
        if name not in public:
            yield f"{name} is not public; only public names stand in the reference"
        elif shown[name] != 1:
            yield f"{name} stands {shown[name]} times in the reference; it must stand once (`::: {name}`)"
        else:
            found = package if name == "adaptive_optax" else package[name.removeprefix("adaptive_optax.")]
            if found.is_module and name not in MODULES:
                yield f"{name} is taken for the module {found.canonical_path}; import it from there"
            elif not (found.docstring and found.docstring.value.strip()):
                yield f"{name} has no docstring ({found.canonical_path})"


def on_pre_build(config):
    """Warns of every fault."""
    for fault in faults(path.read_text() for path in Path(config.docs_dir).rglob("*.md")):
        log.warning(fault)
