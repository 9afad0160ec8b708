"""The step-size controllers of ODE solvers: the next step from the errors of the last three.

A solver holds the error E of a step, relative to its tolerance, near 1. The controller answers only how fast
the step follows the errors: at once, or smoothed against their noise.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike

from adaptive_optax._core.checks import check_scalar
from adaptive_optax._core.trees import Scalar

ControllerPreset = Literal["smooth", "pi", "noisy"]
"""The name of a `StepController`."""


@dataclasses.dataclass(frozen=True)
class StepController:
    r"""The factor for the next step, from the errors of the last three.

    $$
    h_{n+1} = h_n \operatorname{clip}\big(
        \sigma E_n^{-(k_I + k_P + k_D)} E_{n-1}^{k_P + 2 k_D} E_{n-2}^{-k_D}, f_{\min}, f_{\max}
        \big), \qquad E_{-1} = E_{-2} = 1
    $$

    E is proportional to h, as the error relative to the length of the step is. With $k_I = 1$ alone the
    controller takes the step that would have had E = $\sigma$. A smaller integral gain follows a noisy E more
    slowly. With a proportional one a rising error shortens the step more than a steady one.

    Attributes:
        integral: $k_I$ in [0, inf).
        proportional: $k_P$ in [0, inf).
        derivative: $k_D$ in [0, inf).
        safety: $\sigma$ in (0, 1].
        min_factor: $f_{\min}$ in (0, 1].
        max_factor: $f_{\max}$ in [1, inf). Solvers, which repeat a step that was too long, have 10.

    Raises:
        ValueError: If a value is out of its range.

    Source: Söderlind 2003, "Digital filters in adaptive time-stepping"; the form is that of diffrax's
    `PIDController`, without its rejections. The gains of "noisy" are those that it recommends for stochastic
    equations.
    """

    integral: float = 1.0
    proportional: float = 0.0
    derivative: float = 0.0
    safety: float = 0.9
    min_factor: float = 0.2
    max_factor: float = 2.0

    def __post_init__(self) -> None:
        for name, interval in _RANGES.items():
            value = getattr(self, name)
            if isinstance(value, Tracer):
                raise ValueError(f"{name} must be a number in {interval}, got a traced array.")
            check_scalar(name, value, interval)
            object.__setattr__(self, name, float(value))  # an array could not be hashed


_RANGES = {
    "integral": "[0, inf)",
    "proportional": "[0, inf)",
    "derivative": "[0, inf)",
    "safety": "(0, 1]",
    "min_factor": "(0, 1]",
    "max_factor": "[1, inf)",
}

CONTROLLERS: dict[ControllerPreset, StepController] = {
    "smooth": StepController(),
    "pi": StepController(integral=0.3, proportional=0.4),
    "noisy": StepController(integral=0.3, proportional=0.1),
}


def as_controller(controller: StepController | ControllerPreset) -> StepController:
    """Returns a controller, given one or the name of one."""
    if isinstance(controller, StepController):
        return controller
    if not isinstance(controller, str) or controller not in CONTROLLERS:
        names = ", ".join(map(repr, CONTROLLERS))
        raise ValueError(f"controller must be None, a StepController or one of {names}, got {controller!r}.")
    return CONTROLLERS[controller]


class ErrorHistory(NamedTuple):
    """The errors of the last two steps, which a controller needs.

    Attributes:
        last: The logarithm of $E_{n-1}$.
        before: The logarithm of $E_{n-2}$.
    """

    last: Scalar
    before: Scalar


def no_history(dtype: jnp.dtype) -> ErrorHistory:
    """Returns the history before the first step, in which both errors are 1."""
    return ErrorHistory(jnp.zeros((), dtype), jnp.zeros((), dtype))


def next_factor(
    controller: StepController, history: ErrorHistory, error: ArrayLike
) -> tuple[Scalar, ErrorHistory]:
    """Returns the factor for the step, and the history with its error.

    An error of 0 gives `max_factor` and counts as 1 from then on. One that is not finite gives `min_factor`
    and is forgotten, as nothing is known about the step that would have been right.

    Args:
        controller: The controller.
        history: The errors before.
        error: The error of the step, a scalar at least 0.

    Returns:
        The factor, and the history for the next step.
    """
    k_i, k_p, k_d = controller.integral, controller.proportional, controller.derivative
    dtype = history.last.dtype
    error = jnp.asarray(error, dtype)
    is_known, is_zero = jnp.isfinite(error), error == 0
    log_error = jnp.log(jnp.where(is_known & ~is_zero, error, jnp.ones((), dtype)))
    log_factor = (
        math.log(controller.safety)
        - (k_i + k_p + k_d) * log_error
        + (k_p + 2 * k_d) * history.last
        - k_d * history.before
    )
    factor = jnp.clip(jnp.exp(log_factor), controller.min_factor, controller.max_factor)
    factor = jnp.where(is_zero, jnp.asarray(controller.max_factor, dtype), factor)
    factor = jnp.where(is_known, factor, jnp.asarray(controller.min_factor, dtype))
    return factor, ErrorHistory(
        last=jnp.where(is_known, log_error, history.last),
        before=jnp.where(is_known, history.last, history.before),
    )
