# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""What type checkers and `dir()` see of the package; pyright checks this file too."""

import subprocess
import sys
from typing import assert_type

import pytest

import adaptive_optax as ao


def typed(task: ao.study.Task) -> ao.study.Verdict:
    """Never called: `assert_type` is for type checkers, and does nothing at run time."""
    comparison = ao.study.compare(task, ["adam:constant", "adam:cosine"], learning_rates=[0.1], steps=10)
    assert_type(comparison, ao.study.Comparison)
    assert_type(comparison.details.best_rates["adam:cosine"], float)
    assert_type(ao.study.load("comparison.npz").verdicts, dict[str, ao.study.Verdict])
    return comparison.verdict()


def test_what_there_is_not_is_no_attribute():
    with pytest.raises(AttributeError, match="has no attribute 'studies'"):
        _ = ao.studies  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType]


def test_dir_shows_the_study_before_it_is_imported():
    code = "import adaptive_optax as ao, sys; print({'adam', 'study'} <= {*dir(ao)}, 'pandas' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["True", "False"]
