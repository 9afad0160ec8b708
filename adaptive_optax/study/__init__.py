"""Answers learning-rate questions on the user's own model: a range test, and comparisons with a verdict."""

from adaptive_optax.study import _requirements as _requirements
from adaptive_optax.study.arms import arm as arm
from adaptive_optax.study.comparison import compare as compare
from adaptive_optax.study.ramp import suggest as suggest
from adaptive_optax.study.range_test import RangeTest as RangeTest
from adaptive_optax.study.range_test import lr_range_test as lr_range_test
from adaptive_optax.study.result import Comparison as Comparison
from adaptive_optax.study.result import load as load
from adaptive_optax.study.task import Task as Task
from adaptive_optax.study.task import nnx_task as nnx_task
from adaptive_optax.study.verdict import Verdict as Verdict
from adaptive_optax.study.verdict import judge as judge
