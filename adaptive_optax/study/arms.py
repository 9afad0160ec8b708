"""Arms: ways to train at a peak learning rate. Defines the standard arms by name, and checks any arm.

An arm is a function `arm(learning_rate, total_steps) -> transformation`. The study calls it with a traced
learning rate, so that all rates share one compilation. An attribute `evaluate` determines which parameters
are judged (`study.evaluation`); an attribute `learning_rates`, over which rates the arm is tuned if those of
other arms mean nothing to it.
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
from adaptive_optax.study.calls import Call, Field, call, made, written
from adaptive_optax.study.engine.trials import Plan, Trials, make_trial
from adaptive_optax.study.evaluation import AVERAGE_IF_KEPT, Arm, Evaluate, schedule_free_point
from adaptive_optax.study.origin import described
from adaptive_optax.study.start import Origin
from adaptive_optax.study.task import Task
from adaptive_optax.transforms.adam import scale_by_adam
from adaptive_optax.transforms.averaging import average_parameters
from adaptive_optax.transforms.learning_rate import scale_by_learning_rate
from adaptive_optax.transforms.momentum import trace
from adaptive_optax.transforms.rms import scale_by_global_rms, scale_by_rms
from adaptive_optax.transforms.weight_decay import add_decoupled_weight_decay
from adaptive_optax.wrappers.error_control import error_controlled

Schedule = Callable[[Any, int], Any]  # from the peak rate and the number of steps

SCHEDULES: dict[str, Schedule] = {
    "constant": lambda peak, steps: peak,
    "exponential": lambda peak, steps: call(schedules.exponential_decay, peak, steps, 0.01),
    "step": lambda peak, steps: call(schedules.step_decay, peak, 0.8, max(1, steps // 8)),
    "linear": lambda peak, steps: call(optax.linear_schedule, peak, 0.0, steps),
    "1-sqrt": lambda peak, steps: call(
        schedules.warmup_stable_decay, peak, steps, warmup_steps=0, decay_steps=steps, shape="1-sqrt"
    ),
    "halved": lambda peak, steps: peak / 2,
    "cosine": lambda peak, steps: call(schedules.warmup_cosine, peak, steps),
    "warmup_cosine": lambda peak, steps: call(schedules.warmup_cosine, peak, steps, warmup_steps=steps // 10),
    "warmup_stable_decay": lambda peak, steps: call(
        schedules.warmup_stable_decay, peak, steps, warmup_steps=steps // 10, decay_steps=steps // 5
    ),
    "inverse_sqrt": lambda peak, steps: call(schedules.inverse_sqrt, peak, max(1, steps // 10)),
    "one_cycle": lambda peak, steps: call(schedules.one_cycle, peak, steps),
}
WARMED = ("warmup_cosine", "warmup_stable_decay", "inverse_sqrt")  # these begin at a rate of 0
OPTIMIZERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "adam": (optimizers.adam, {}),
    "adamw": (optimizers.adamw, {}),
    "nadam": (optimizers.adam, {"nesterov": True}),
    "amsgrad": (optimizers.adam, {"amsgrad": True}),
    "rmsprop": (optimizers.rmsprop, {}),
    "global_rmsprop": (optimizers.global_rmsprop, {}),
    "sgd": (optimizers.sgd, {}),
    "momentum": (optimizers.sgd, {"momentum": 0.9}),
    "prodigy": (optax.contrib.prodigy, {}),
    "dadapt_adamw": (optax.contrib.dadapt_adamw, {}),
}
# The argument that receives one-cycle's momentum, if any.
MOMENTUM = {"adam": "b1", "adamw": "b1", "nadam": "b1", "amsgrad": "b1", "momentum": "momentum"}
# These estimate the learning rate, and multiply it by the given one.
ESTIMATORS = ("prodigy", "dadapt_adamw")
FACTORS = (0.3, 1.0, 3.0)
LIMITED = "limited"  # the suffix
# The mean age of either average is a tenth of the run at its end, so that they differ in shape alone.
AVERAGES: dict[str, Callable[[int], Call]] = {
    "averaged": lambda steps: call(average_parameters),
    "ema": lambda steps: call(average_parameters, decay=max(0.0, round(1 - 10 / steps, 6))),
}
# What the limit of `error_controlled` is put around.
DIRECTIONS: dict[str, Callable[..., Call]] = {
    "adam": lambda **keywords: call(scale_by_adam, **keywords),
    "adamw": lambda **keywords: call(
        optax.chain, call(scale_by_adam, **keywords), call(add_decoupled_weight_decay, 1e-4)
    ),
    "nadam": lambda **keywords: call(scale_by_adam, **keywords),
    "amsgrad": lambda **keywords: call(scale_by_adam, **keywords),
    "rmsprop": lambda: call(scale_by_rms),
    "global_rmsprop": lambda: call(scale_by_global_rms),
    "sgd": lambda: call(optax.identity),
    "momentum": lambda momentum: call(trace, momentum),
}
# What schedule-free averaging is put around: optimizers without momentum, which the averaging replaces.
SCHEDULE_FREE: dict[str, Callable[[Any], Call]] = {
    "adam": lambda rate: call(
        optax.chain,
        call(scale_by_rms, 0.999, eps_in_sqrt=False, bias_correction=True),
        call(scale_by_learning_rate, rate),
    ),
    "adamw": lambda rate: call(
        optax.chain,
        call(scale_by_rms, 0.999, eps_in_sqrt=False, bias_correction=True),
        call(add_decoupled_weight_decay, 1e-4),
        call(scale_by_learning_rate, rate),
    ),
    "sgd": lambda rate: call(optimizers.sgd, rate),
}


def _warmed_up(peak: Any, steps: int) -> Call:
    """The rate of schedule-free averaging."""
    return call(optax.warmup_constant_schedule, 0.0, peak, max(1, steps // 10))


SHORT_NAMES = {"ema": "adam:constant:ema"} | {name: f"{name}:constant" for name in ESTIMATORS}


@dataclasses.dataclass(frozen=True)
class NamedArm:
    """A standard arm, as `arm` returns it; equal for equal names, so that it compiles once.

    Attributes:
        optimizer: The optimizer.
        schedule: The schedule of its learning rate; "schedule_free" for schedule-free averaging.
        average: "averaged", "ema", or "" for none.
        is_limited: Whether `error_controlled` limits the learning rate.
    """

    optimizer: str
    schedule: str
    average: str = ""
    is_limited: bool = False

    def __call__(self, learning_rate: Any, total_steps: int) -> optax.GradientTransformationExtraArgs:
        """Builds the transformation."""
        return made(self._calls(learning_rate, total_steps)["tx"])

    @property
    def __name__(self) -> str:
        if self.schedule == "schedule_free":
            return f"schedule_free:{self.optimizer}"
        limited = LIMITED if self.is_limited else ""
        return ":".join(filter(None, (self.optimizer, self.schedule, limited, self.average)))

    @property
    def evaluate(self) -> Evaluate | None:
        """What is judged; None for the trained parameters."""
        if self.schedule == "schedule_free":
            return schedule_free_point
        return AVERAGE_IF_KEPT if self.average else None

    @property
    def learning_rates(self) -> tuple[float, ...] | None:
        """The rates to tune over, if those of other arms mean nothing to this one; otherwise None."""
        return FACTORS if self.optimizer in ESTIMATORS else None

    def schedule_of(self, learning_rate: Any, total_steps: int) -> Callable[[Any], Any]:
        """Returns the schedule of the learning rate, a function of the number of steps taken.

        Examples:
            >>> from adaptive_optax import study
            >>> round(float(study.arm("adam:linear").schedule_of(0.1, 100)(25)), 6)
            0.075
        """
        if self.schedule == "schedule_free":
            found = made(_warmed_up(learning_rate, total_steps))
        else:
            found = made(SCHEDULES[self.schedule](learning_rate, total_steps))
        found = found.learning_rate if self.schedule == "one_cycle" else found
        return found if callable(found) else lambda step: found

    def code(self, learning_rate: float, total_steps: int) -> str:
        """Writes the statements that build this transformation as `tx`, with their imports.

        Examples:
            >>> from adaptive_optax import study
            >>> print(study.arm("adam:one_cycle").code(0.01, 1000))
            import adaptive_optax as ao
            schedule = ao.one_cycle(0.01, 1000)
            tx = ao.adam(schedule.learning_rate, b1=schedule.momentum)
        """
        return written(self._calls(float(learning_rate), int(total_steps)))

    def _calls(self, peak: Any, steps: int) -> dict[str, Any]:
        """The calls that build the transformation, by the names that they have in code."""
        if self.schedule == "schedule_free":
            schedule = _warmed_up(peak, steps)
            base = SCHEDULE_FREE[self.optimizer](schedule)
            tx = call(optax.contrib.schedule_free, base, schedule, b1=0.9)
            return {"schedule": schedule, "base": base, "tx": tx}
        rate = schedule = SCHEDULES[self.schedule](peak, steps)
        optimizer, keywords = OPTIMIZERS[self.optimizer]
        if self.schedule == "one_cycle":
            rate = Field(schedule, "learning_rate")
            if self.optimizer in MOMENTUM:
                keywords = keywords | {MOMENTUM[self.optimizer]: Field(schedule, "momentum")}
        if self.optimizer == "prodigy" and self.schedule in WARMED:
            keywords = keywords | {"safeguard_warmup": True}  # otherwise 0 / 0 at the first step
        if self.is_limited:
            tx = call(error_controlled, DIRECTIONS[self.optimizer](**keywords), rate)
        else:
            tx = call(optimizer, rate, **keywords)
        if self.average:
            tx = call(optax.chain, tx, AVERAGES[self.average](steps))
        return {"schedule": schedule, "tx": tx} if isinstance(schedule, Call) else {"tx": tx}


def arm(name: str) -> NamedArm:
    """Returns a standard arm by its name: `"optimizer:schedule"`, perhaps with a suffix.

    | optimizer | |
    |---|---|
    | adam, adamw, rmsprop, global_rmsprop, sgd | this library's, at their defaults |
    | nadam, amsgrad | `adam` with `nesterov` or `amsgrad` |
    | momentum | `sgd` with momentum 0.9 |
    | prodigy, dadapt_adamw | optax.contrib's, which estimate the learning rate |

    | schedule | over T steps |
    |---|---|
    | constant | the peak throughout |
    | exponential | smoothly down to 1 % of the peak |
    | step | times 0.8 every T/8 steps, down to 21 % |
    | linear, cosine | down to 0 |
    | 1-sqrt | down to 0 like 1 - sqrt(t/T) |
    | halved | half the peak throughout: what a run under way may change to |
    | warmup_cosine | up for T/10, then down to 0 |
    | warmup_stable_decay | up for T/10, constant, down over the last T/5 |
    | inverse_sqrt | up for T/10, then proportional to 1/sqrt(step) |
    | one_cycle | PyTorch's, including momentum if the optimizer takes a schedule of it |

    With `:limited`, as in `"adam:one_cycle:limited"`, `error_controlled` limits the learning rate. It needs
    `value=` and `value_fn=`, which a task passes and a script of your own has to.

    With `:averaged`, which may follow, `average_parameters` averages the parameters and the average is
    judged, with batch statistics recomputed for it (`recompute_batch_statistics`). With `:ema` it is an
    exponential average with the decay 1 - 10/T: at the end of the run, the mean age of both averages is T/10
    steps.

    In place of a schedule, `"schedule_free:adam"`, `"schedule_free:adamw"` and `"schedule_free:sgd"` are
    optax.contrib's `schedule_free` with b1 = 0.9, around these optimizers without momentum. The rate goes up
    for T/10 and stays. The averaged point (`schedule_free_eval_params`) is judged, with batch statistics
    recomputed for it.

    The rate of prodigy and dadapt_adamw is a factor of the one that they estimate. They are tuned over the
    factors 0.3, 1 and 3 (`NamedArm.learning_rates`) where other arms share a list of rates. Prodigy is given
    `safeguard_warmup` with the schedules that warm up; dadapt_adamw cannot begin at a rate of 0, and refuses
    them.

    Three short names: `"prodigy"` and `"dadapt_adamw"` at a constant rate, and `"ema"` for
    `"adam:constant:ema"`.

    Raises:
        ValueError: If the optimizer, the schedule or the suffix is unknown, or they do not fit together.

    Examples:
        >>> from adaptive_optax import study
        >>> tx = study.arm("adam:one_cycle")(1e-3, 100)
        >>> study.arm("prodigy") == study.arm("prodigy:constant")
        True
    """
    optimizer, _, rest = SHORT_NAMES.get(str(name), str(name)).partition(":")
    if optimizer == "schedule_free":
        if rest not in SCHEDULE_FREE:
            raise ValueError(
                f"arm {name!r}: schedule_free must be followed by one of {', '.join(SCHEDULE_FREE)}, "
                f"got {rest!r}; such an arm is named schedule_free:optimizer, since it has no schedule and "
                "is an average already."
            )
        return NamedArm(rest, "schedule_free")
    schedule, colon, suffix = rest.partition(":")
    if optimizer not in OPTIMIZERS:
        raise ValueError(
            f"arm {name!r}: the optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}; {_NAMED}"
        )
    if schedule not in SCHEDULES:
        meant = f"did you mean {optimizer}:constant:{schedule}?" if schedule in AVERAGES else _NAMED
        raise ValueError(
            f"arm {name!r}: the schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}; {meant}"
        )
    is_limited = suffix.partition(":")[0] == LIMITED
    if is_limited:
        _, colon, suffix = suffix.partition(":")
    if colon and suffix not in AVERAGES:
        suffixes = ", ".join(AVERAGES if is_limited else (LIMITED, *AVERAGES))
        raise ValueError(
            f"arm {name!r}: after the schedule, nothing or one of {suffixes} may follow, got {suffix!r}."
        )
    if is_limited and optimizer not in DIRECTIONS:
        raise ValueError(
            f"arm {name!r}: the optimizer must be one of {', '.join(DIRECTIONS)} with {LIMITED}, got "
            f"{optimizer!r}."
        )
    if optimizer == "dadapt_adamw" and schedule in WARMED:
        raise ValueError(
            f"arm {name!r}: the schedule of dadapt_adamw must begin above 0, where its estimate is 0 / 0, "
            f"got {schedule!r}; prodigy can warm up."
        )
    return NamedArm(optimizer, schedule, suffix, is_limited)


_NAMED = "an arm is named optimizer:schedule or schedule_free:optimizer."


def is_standard(name: str) -> bool:
    """Whether a name is meant for `arm`: whether it begins as one."""
    return name in SHORT_NAMES or name.partition(":")[0] in (*OPTIMIZERS, "schedule_free")


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
