"""The layers that pyproject.toml states: every import of the package, lazy ones and those for types too."""

import tomllib
from pathlib import Path

from importlinter.cli import lint_imports

CONFIGURATION = Path(__file__).parents[1] / "pyproject.toml"


def test_a_folder_imports_only_what_is_below_it_and_no_circle_remains():
    assert lint_imports(str(CONFIGURATION), no_cache=True) == 0


def test_no_import_is_left_out():
    options = tomllib.loads(CONFIGURATION.read_text())["tool"]["importlinter"]
    assert options.keys() == {"root_package", "contracts"}  # exclude_type_checking_imports would stand here
    assert not any("ignore_imports" in contract for contract in options["contracts"])
