"""Answers learning-rate questions on the user's own model: a range test, and comparisons with a verdict.

Glossary:

* *task*: what is trained (initial parameters, loss, data, metric)
* *training function*: the user's own, in a task's place; a call trains a whole trial
* *run*: a trial as a training function sees it (`Run`)
* *subject*: what a study trains, a task or a training function
* *arm*: a way to train, as a function from peak learning rate and number of steps to an optimizer
* *trial*: one training of an arm, at one peak rate and one seed, from the first step to the last
* *study*: trials that belong together, those of one call or of all calls that share a folder
* *chunk*: the trials in one call of a compiled program, or one call of a training function
* *job*: a chunk that is sent to a worker of an executor
* *placement*: how the trials of a chunk are distributed over devices
* *measurement*: what telemetry measures at one step of a trial
* *look*: a judgement of the existing trials; adding seeds and judging again is another look
* *plan of seeds*: looks that are planned, until every arm is decided (`Sequential`)
* *race*: tuning in which only the rates go on that can still win
* *verdict*: what a look says about one arm compared with the baseline
* *recommendation*: the arm to use, by the verdicts, with its rate and code
* *record*: what a comparison found (trials, curves, details), from which its verdicts follow

Elsewhere in this package, "a run" means the user's own training, outside a study.
"""

from adaptive_optax.study import _requirements as _requirements
from adaptive_optax.study.arms import NamedArm as NamedArm
from adaptive_optax.study.arms import arm as arm
from adaptive_optax.study.comparison import compare as compare
from adaptive_optax.study.decay import DecayNow as DecayNow
from adaptive_optax.study.decay import decay_now as decay_now
from adaptive_optax.study.details import Details as Details
from adaptive_optax.study.details import Samples as Samples
from adaptive_optax.study.direction import Direction as Direction
from adaptive_optax.study.engine.run import Run as Run
from adaptive_optax.study.engine.run import Train as Train
from adaptive_optax.study.evaluation import Arm as Arm
from adaptive_optax.study.evaluation import Evaluate as Evaluate
from adaptive_optax.study.evaluation import EvaluatedArm as EvaluatedArm
from adaptive_optax.study.evaluation import judged_by as judged_by
from adaptive_optax.study.evaluation import recompute_batch_statistics as recompute_batch_statistics
from adaptive_optax.study.judged import Judged as Judged
from adaptive_optax.study.range_test import Optimizer as Optimizer
from adaptive_optax.study.range_test import RangeTest as RangeTest
from adaptive_optax.study.range_test import lr_range_test as lr_range_test
from adaptive_optax.study.recommendation import Recommendation as Recommendation
from adaptive_optax.study.result import Comparison as Comparison
from adaptive_optax.study.result import load as load
from adaptive_optax.study.start import Start as Start
from adaptive_optax.study.statistics.judge import judge as judge
from adaptive_optax.study.statistics.ramp import suggest as suggest
from adaptive_optax.study.statistics.sequential import Sequential as Sequential
from adaptive_optax.study.statistics.verdict import Verdict as Verdict
from adaptive_optax.study.status import Status as Status
from adaptive_optax.study.status import read_status as read_status
from adaptive_optax.study.task import Batch as Batch
from adaptive_optax.study.task import ModelState as ModelState
from adaptive_optax.study.task import Params as Params
from adaptive_optax.study.task import Task as Task
from adaptive_optax.study.task import nnx_task as nnx_task
