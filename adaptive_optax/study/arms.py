"""Arms: ways to train at a peak learning rate. Defines the standard arms by name, and checks any arm.

An arm is a function `arm(learning_rate, total_steps) -> transformation`. The study calls it with a traced
learning rate, so that all rates share one compilation. An attribute `evaluate` determines which parameters
are judged (`study.evaluation`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_optax import optimizers, schedules
from adaptive_optax._core.paths import paths_and_leaves
from adaptive_optax.study.engine.trials import Plan, Trials, make_trial
from adaptive_optax.study.evaluation import AVERAGE_IF_KEPT, Arm, Evaluate
from adaptive_optax.study.origin import described
from adaptive_optax.study.start import Origin
from adaptive_optax.study.task import Task
from adaptive_optax.transforms.averaging import average_parameters

SCHEDULES: dict[str, Callable[[Any, int], Any]] = {
    "constant": lambda peak, steps: peak,
    "exponential": lambda peak, steps: schedules.exponential_decay(peak, steps, 0.01),
    "step": lambda peak, steps: schedules.step_decay(peak, 0.8, max(1, steps // 8)),
    "linear": lambda peak, steps: optax.linear_schedule(peak, 0.0, steps),
    "1-sqrt": lambda peak, steps: schedules.warmup_stable_decay(
        peak, steps, warmup_steps=0, decay_steps=steps, shape="1-sqrt"
    ),
    "halved": lambda peak, steps: peak / 2,
    "cosine": lambda peak, steps: schedules.warmup_cosine(peak, steps),
    "warmup_cosine": lambda peak, steps: schedules.warmup_cosine(peak, steps, warmup_steps=steps // 10),
    "warmup_stable_decay": lambda peak, steps: schedules.warmup_stable_decay(
        peak, steps, warmup_steps=steps // 10, decay_steps=steps // 5
    ),
    "inverse_sqrt": lambda peak, steps: schedules.inverse_sqrt(peak, max(1, steps // 10)),
    "one_cycle": lambda peak, steps: schedules.one_cycle(peak, steps),
}
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "adam": optimizers.adam,
    "adamw": optimizers.adamw,
    "nadam": functools.partial(optimizers.adam, nesterov=True),
    "amsgrad": functools.partial(optimizers.adam, amsgrad=True),
    "rmsprop": optimizers.rmsprop,
    "global_rmsprop": optimizers.global_rmsprop,
    "sgd": optimizers.sgd,
    "momentum": functools.partial(optimizers.sgd, momentum=0.9),
}
# The argument that receives one-cycle's momentum, if any.
MOMENTUM = {"adam": "b1", "adamw": "b1", "nadam": "b1", "amsgrad": "b1", "momentum": "momentum"}


@dataclasses.dataclass(frozen=True)
class NamedArm:
    """A standard arm; equal for equal names, so that it compiles once."""

    optimizer: str
    schedule: str
    averaged: bool

    def __call__(self, learning_rate: Any, total_steps: int) -> optax.GradientTransformationExtraArgs:
        """Builds the transformation."""
        rate, keywords = SCHEDULES[self.schedule](learning_rate, total_steps), {}
        if isinstance(rate, schedules.OneCycle):
            if self.optimizer in MOMENTUM:
                keywords[MOMENTUM[self.optimizer]] = rate.momentum
            rate = rate.learning_rate
        tx = OPTIMIZERS[self.optimizer](rate, **keywords)
        return optax.chain(tx, average_parameters()) if self.averaged else tx

    @property
    def __name__(self) -> str:
        return f"{self.optimizer}:{self.schedule}{':averaged' if self.averaged else ''}"

    @property
    def evaluate(self) -> Evaluate | None:
        """What is judged; None for the trained parameters."""
        return AVERAGE_IF_KEPT if self.averaged else None


def arm(name: str) -> NamedArm:
    """Returns a standard arm by its name, `"optimizer:schedule"` or `"optimizer:schedule:averaged"`.

    | optimizer | |
    |---|---|
    | adam, adamw, rmsprop, global_rmsprop, sgd | this library's, at their defaults |
    | nadam, amsgrad | `adam` with `nesterov` or `amsgrad` |
    | momentum | `sgd` with momentum 0.9 |

    | schedule | over T steps |
    |---|---|
    | constant | the peak throughout |
    | exponential | smoothly down to 1 % of the peak |
    | step | times 0.8 every T/8 steps, down to 21 % |
    | linear, cosine | down to 0 |
    | 1-sqrt | down to 0, as one minus the root of the share of steps |
    | halved | half the peak throughout: what a run under way may change to |
    | warmup_cosine | up for T/10, then down to 0 |
    | warmup_stable_decay | up for T/10, constant, down over the last T/5 |
    | inverse_sqrt | up for T/10, then proportional to 1/sqrt(step) |
    | one_cycle | PyTorch's, including momentum if the optimizer has one |

    With `:averaged`, `average_parameters` averages the parameters and the average is judged, with batch
    statistics recomputed for it (`recompute_batch_statistics`).

    Raises:
        ValueError: If the optimizer, the schedule or the suffix is unknown.

    Examples:
        >>> from adaptive_optax import study
        >>> tx = study.arm("adam:one_cycle")(1e-3, 100)
    """
    optimizer, _, rest = str(name).partition(":")
    schedule, _, suffix = rest.partition(":")
    for what, given, known in (("optimizer", optimizer, OPTIMIZERS), ("schedule", schedule, SCHEDULES)):
        if given not in known:
            raise ValueError(
                f"arm {name!r}: the {what} must be one of {', '.join(known)}, got {given!r}; "
                "an arm is named optimizer:schedule."
            )
    if suffix not in ("", "averaged"):
        raise ValueError(f"arm {name!r}: only ':averaged' may follow the schedule, got {suffix!r}.")

    return NamedArm(optimizer, schedule, bool(suffix))


def check_arm(
    name: str,
    arm: Arm,
    task: Task,
    plan: Plan,
    evaluate: Evaluate | None,
    rate: float,
    origin: Origin | None = None,
) -> str:
    """Traces one step of an arm; returns "once", or "per rate" if the arm refuses a traced rate.

    Raises:
        ValueError: If the arm is not an `arm(learning_rate, total_steps) -> transformation`, its update
            fails, or its state changes structure, shapes or dtypes. The message names the arm.
    """
    if not callable(arm):
        raise ValueError(
            f"arm {name!r} must be a function of (learning_rate, total_steps), got {type(arm).__name__}."
        )
    try:
        compilation, before, after = _trace_arm(task, arm, plan, evaluate, rate, origin)
    except Exception as error:
        raise ValueError(f"arm {name!r} cannot be run: {described(error)}") from error
    was, is_now = dict(paths_and_leaves(before)), dict(paths_and_leaves(after))
    for path in was.keys() | is_now.keys():
        old, new = was.get(path), is_now.get(path)
        if old is None or new is None or (old.shape, old.dtype) != (new.shape, new.dtype):
            raise ValueError(
                f"arm {name!r} must keep the shapes and dtypes of parameters and state; one step changes "
                f"{path!r} from {old} to {new} (optax's state takes the gradients' dtype; this library's "
                "optimizers keep theirs)."
            )
    return compilation


def _trace_arm(
    task: Task, arm: Arm, plan: Plan, evaluate: Evaluate | None, rate: float, origin: Origin | None
) -> tuple[str, Any, Any]:
    """Traces one step; returns how the arm compiles, and the state before and after."""

    def one_step(rate, train, validation):
        tx = arm(rate, plan.steps)
        if not isinstance(tx, optax.GradientTransformation):
            raise TypeError(f"it must return an optax transformation, got {type(tx).__name__}")
        functions = make_trial(task, arm, plan, evaluate)
        trial = Trials(rate, *(jnp.uint32(0) for _ in range(3)))
        before = functions.start(trial, origin)
        samples = functions.order(trial, 0)
        after = functions.step(before, trial, jnp.int32(0), samples, train)
        return before, after, functions.metric(after, train, validation)

    data = task.train, task.validation
    real = jax.dtypes.canonicalize_dtype(np.float64)
    try:
        return "once", *jax.eval_shape(one_step, jax.ShapeDtypeStruct((), real), *data)[:2]
    except Exception:  # a traced rate can fail in any way; an arm that also fails with a number raises below
        return "per rate", *jax.eval_shape(functools.partial(one_step, rate), *data)[:2]
