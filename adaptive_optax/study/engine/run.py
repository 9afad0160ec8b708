"""A trial of the user's own training function: what the function is told, and what it reports."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_optax.study.engine.chunks import Curves
from adaptive_optax.study.engine.trials import TELEMETRY
from adaptive_optax.study.evaluation import Evaluate, declared
from adaptive_optax.study.judged import describe_evaluate

BLOCK = 1024  # rates of a schedule that are computed at a time
Train = Callable[["Run"], Any]
"""A training function: `train(run)` trains one trial, and returns its final metric unless it reported it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One trial, as the user's own training function sees it.

    `compare` calls `train(run)` once per trial. The function trains as `arm`, `learning_rate`, `seed` and
    `steps` say, reports the metric as often as it likes, and returns the final one.

    Attributes:
        arm: The arm's name.
        learning_rate: The peak learning rate.
        seed: Determines everything random: the initial parameters, the order of the batches, dropout. Trials
            of different arms with the same seed must differ in nothing but the arm, since they are paired.
        steps: The number of training steps.

    >>> import optax
    >>> from adaptive_optax import study
    >>> run = study.Run("adam", 0.1, 0, 100, build=lambda learning_rate, steps: optax.adam(learning_rate))
    >>> state = run.transformation.init({"w": 1.0})
    >>> run.report(0, 2.3)  # before training
    >>> run.report(50, 0.7)
    """

    arm: str
    learning_rate: float
    seed: int
    steps: int
    build: Callable[[float, int], Any] = dataclasses.field(repr=False)
    _on_report: Callable[[float], None] = dataclasses.field(default=lambda fraction: None, repr=False)
    _evaluate: Evaluate | None = dataclasses.field(default=None, repr=False)
    _called: set[str] = dataclasses.field(default_factory=set, init=False, repr=False)
    _metrics: dict[int, float] = dataclasses.field(default_factory=dict, init=False, repr=False)
    _telemetry: dict[int, list[float]] = dataclasses.field(default_factory=dict, init=False, repr=False)
    _rates: dict[int, np.ndarray] = dataclasses.field(default_factory=dict, init=False, repr=False)

    @functools.cached_property
    def transformation(self) -> Any:
        """What the arm built for this trial: `arm(learning_rate, steps)`.

        An optax transformation for the standard arms; for the user's own, whatever they return.
        """
        return self.build(self.learning_rate, self.steps)

    def schedule(self, step: int) -> float:
        """Returns the learning rate of a standard arm after a number of steps, for any framework.

        `"adam:cosine"` then drives PyTorch's Adam as well: with a rate of 1,
        `torch.optim.lr_scheduler.LambdaLR(optimizer, run.schedule)` sets the rates. Only the rate is
        scheduled: `"adam:one_cycle"` also has a momentum, which is in `transformation` alone.

        Args:
            step: The number of steps taken, at least 0.

        Raises:
            ValueError: If the arm is one of the user's own.

        Examples:
            >>> from adaptive_optax import study
            >>> run = study.Run("adam:linear", 0.1, 0, 100, build=study.arm("adam:linear"))
            >>> round(run.schedule(50), 6)
            0.05
        """
        schedule_of = declared(self.build, "schedule_of")
        if schedule_of is None:
            raise ValueError(
                f"run.schedule must be called for a standard arm such as 'adam:cosine', got {self.arm!r}, "
                "which is one of your own."
            )
        block, within = divmod(_step(step), BLOCK)
        if block not in self._rates:
            at = jnp.arange(block * BLOCK, (block + 1) * BLOCK)
            found = jax.vmap(schedule_of(self.learning_rate, self.steps))(at)
            self._rates[block] = np.broadcast_to(np.asarray(found, float), BLOCK)
        return float(self._rates[block][within])

    def eval_params(self, params: Any, opt_state: Any) -> Any:
        """Returns the parameters to judge: the metrics that the function reports must be theirs.

        For an arm that is judged by an average (`"adam:constant:averaged"`, `:ema`, `"schedule_free:adam"`,
        one of your own with `judged_by` or `average_parameters`) it is the average in the optimizer's state.
        For the others it is `params`, so that one script serves all arms. A study in which a trial of an
        averaging arm ends without this call is refused: it would judge the wrong parameters.

        Batch statistics are the function's own: recompute them for an average (`swap_averaged` shows how).

        Args:
            params: The trained parameters.
            opt_state: The state of `transformation`.
        """
        self._called.add("eval_params")
        return params if self._evaluate is None else self._evaluate(params, opt_state)

    def report(self, step: int, metric: Any, telemetry: Any = None) -> None:
        """Reports the metric after a number of training steps.

        The last report is the final metric, unless the function returns one.

        Args:
            step: The number of steps taken, at least 0 and not before the last report's; 0 is before
                training. A second report at the same step replaces the first.
            metric: The metric, a scalar of any library. A NaN or an infinity says that the trial diverged.
            telemetry: What `get_telemetry(opt_state)` returns for a whole tree, or a mapping with some of the
                names learning_rate, effective_learning_rate, update_to_weight, snr, step_limit, curvature and
                error. Reported by some trial, effective learning rates join the pictures, and limits do.

        Raises:
            ValueError: If an argument is not as described.
        """
        at = _step(step)
        if self._metrics and at < max(self._metrics):
            raise ValueError(f"step must not be before the last report's, {max(self._metrics)}, got {at}.")
        self._metrics[at] = _number("metric", metric)
        if telemetry is not None:
            self._telemetry[at] = _measured(telemetry)
        self._on_report(min(at / self.steps, 1.0))


def run_trial(train: Train, run: Run) -> Curves:
    """Calls a training function; a trial that raises has diverged, and its results keep the traceback.

    Raises:
        ValueError: If the trial succeeded, but did not ask for the parameters that its arm is judged by.
    """
    error = ""
    try:
        returned = train(run)
        if isinstance(returned, Iterator):
            returned = _consume(returned, run)
        if returned is not None:
            end = max([run.steps, *run._metrics])
            run.report(end, returned)
        elif not run._metrics:
            raise ValueError("train must return the final metric or report it, but did neither.")
    except (Exception, SystemExit) as raised:
        frames = raised.__traceback__ and raised.__traceback__.tb_next  # without this function's own
        error = "".join(traceback.format_exception(type(raised), raised, frames))
        run._metrics[max([run.steps, *run._metrics])] = float("nan")
    last = run._metrics[max(run._metrics)]
    if run._evaluate is not None and "eval_params" not in run._called and math.isfinite(last):
        raise ValueError(
            f"arm {run.arm!r} is judged by {describe_evaluate(run._evaluate).by}: train must report the "
            "metric of run.eval_params(params, opt_state), but a trial ended without calling it."
        )
    return Curves(
        training=np.zeros(0, np.float32),
        validation=np.array([*run._metrics.values()], float),
        telemetry=np.array([*run._telemetry.values()], np.float32).reshape(-1, len(TELEMETRY)),
        validation_steps=np.array([*run._metrics], np.int64),
        telemetry_steps=np.array([*run._telemetry], np.int64),
        error=np.array(error),
    )


def _consume(metrics: Iterator[Any], run: Run) -> Any:
    """Reports what a generator yields: (step, metric); or metrics alone, as if evenly spaced."""
    alone: list[Any] = []
    while True:
        try:
            found = next(metrics)
        except StopIteration as end:
            final = end.value
            break
        if isinstance(found, tuple):
            if len(found) != 2 or alone:
                raise ValueError("train must yield metrics alone, or (step, metric) each time.")
            run.report(*found)
        else:
            if not alone and run._metrics:
                raise ValueError("train must yield metrics alone, or (step, metric) each time.")
            alone.append(_number("metric", found))
            run._on_report(0.0)
    for i, metric in enumerate(alone, start=1):
        run.report(round(i * run.steps / len(alone)), metric)
    return final


def _step(step: Any) -> int:
    try:
        found = operator.index(np.asarray(step).item() if not isinstance(step, int) else step)
    except (TypeError, ValueError):
        found = -1
    if found < 0:
        raise ValueError(f"step must be an integer of at least 0, got {step!r}.")
    return found


def _number(name: str, value: Any) -> float:
    kind = str(getattr(value, "dtype", type(value).__name__))  # a tensor's of any library
    try:
        if isinstance(value, str | bytes) or "complex" in kind or "bool" in kind:
            raise TypeError
        return float(value)  # NumPy cannot convert a tensor that requires gradients
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a number, got {value!r}.") from error


def _measured(telemetry: Any) -> list[float]:
    found = telemetry if isinstance(telemetry, Mapping) else getattr(telemetry, "_asdict", dict)()
    if not any(name in found for name in TELEMETRY):
        raise ValueError(
            f"telemetry must be what get_telemetry returns, or map some of {', '.join(TELEMETRY)} to "
            f"numbers, got {type(telemetry).__name__}."
        )
    return [_number(name, found[name]) if name in found else float("nan") for name in TELEMETRY]
