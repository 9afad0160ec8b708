"""A limit on the learning rate: the step for which a local model of the loss can be trusted.

Gradient descent is Euler's method on the gradient flow. RMSprop bounds how far its steps move; a solver of
differential equations bounds the error of its steps. Here the error is how much less the loss of the batch
falls than its gradient promises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import ArrayLike

from adaptive_optax._core.checks import (
    check_bool,
    check_choice,
    check_inexact,
    check_integer,
    check_params,
    check_same_tree,
    check_transformation,
)
from adaptive_optax._core.entries import stacked
from adaptive_optax._core.precision import incremented, scalar_dtype, scaled
from adaptive_optax._core.ranges import check_hyperparameter
from adaptive_optax._core.state_check import check_state
from adaptive_optax._core.states import carries_hyperparameters, one_state_of, unwrapped
from adaptive_optax._core.transformation import transformation, with_array_state
from adaptive_optax._core.trees import Count, OptState, Scalar
from adaptive_optax._core.values import as_hyperparameter, keeps_schedules, value_at
from adaptive_optax.schedules.height import peak_and_mean
from adaptive_optax.transforms.learning_rate import ScaleByLearningRateState
from adaptive_optax.transforms.match_parameter_dtype import outgoing
from adaptive_optax.transforms.momentum_free import momentum_free_direction
from adaptive_optax.wrappers.loss_probe import (
    Check,
    Estimate,
    Probe,
    Ray,
    check_loss,
    check_of,
    checked_loss,
    leaves_like,
    probe_of,
    with_noise,
)
from adaptive_optax.wrappers.step_controller import (
    ControllerPreset,
    ErrorHistory,
    StepController,
    as_controller,
    next_factor,
)

# The scale of the limit is sought by a factor at every step. From where the error is negligible the limit
# then grows at every probe until the error reaches the tolerance.
_LEAP, _NEGLIGIBLE, _GROWTH, _LEAST_FACTOR = 4.0, 0.05, 2.0, 0.01
_NEWEST = 0.7  # the weight of the newest probe in the curvature
# Then it is held. Gradients that are mostly noise have errors up to about 1. A larger one that lasts is
# curvature that has adapted to the step, where momentum keeps a step stable up to (1 + b1) / (1 - b1) = 19.
_ADAPTED, _RELAXATION, _MOST_RELAXED = 1.5, 1.2, 4.0
_UNSTABLE, _RETREAT = 10.0, 0.8
_ERROR_DECAY, _LEAST_ERROR, _LARGEST_ERROR = 0.8, -1.0, 50.0
_HIGHEST_RELIEF = 2.0
_PROBES_PER_CHECK = 16

_SEEKING, _LOWERED, _GROWING, _FOUND = range(4)  # values of `phase`


class Numbers(NamedTuple):
    """The numbers in the state of `error_controlled`.

    Attributes:
        learning_rate: The learning rate of the last step; before the first step, the one that it starts with.
        step_limit: The limit of the last step.
        longest: The longest step that can be trusted, as found by the probes, before a schedule's shape.
        relaxation: A factor in (0, 4] on the limit, for curvature that has adapted to the step.
        peak: The highest value of a schedule whose shape multiplies the limit; otherwise 1.
        relief: A factor in [1, 2] on the limit, for a learning rate that decays.
        curvature: The mean curvature of the latest probes.
        error: The mean error of the steps since the limit was found.
        predicted: The decrease that the gradient promised in the last probe.
        actual: The decrease that the last probe found.
        noise: How far `value_fn(params)` was from `value` at the last check, as a fraction of it.
        last_error: The logarithm of the last error over the tolerance, for a controller.
        error_before: That of the one before it.
    """

    learning_rate: Scalar
    step_limit: Scalar
    longest: Scalar
    relaxation: Scalar
    peak: Scalar
    relief: Scalar
    curvature: Scalar
    error: Scalar
    predicted: Scalar
    actual: Scalar
    noise: Scalar
    last_error: Scalar
    error_before: Scalar


class Counts(NamedTuple):
    """The counts in the state of `error_controlled`.

    Attributes:
        phase: 0 while the scale of the limit is sought, 1 once it has been lowered, 2 while it grows again, 3
            once it has been found.
        probes: Number of probes.
        silent: Number of probes that said nothing.
        mismatches: Number of checks in which value, gradient and `value_fn` did not belong together.
        limited: Number of steps that were limited.
    """

    phase: Count
    probes: Count
    silent: Count
    mismatches: Count
    limited: Count


def _refuse_to_set(state: Any, name: str, value: Any) -> Any:
    raise ValueError(
        f"set_hyperparams: {name!r} of error_controlled is found anew in every step. Set max_learning_rate: "
        "build it with inject_hyperparams(error_controlled)(direction, max_learning_rate=number)."
    )


@carries_hyperparameters("learning_rate", "step_limit", set_value=_refuse_to_set)
class ErrorControlledState(NamedTuple):
    """State of `error_controlled`, with few arrays, so that passing it to a step is cheap.

    `get_error_control` reads it.

    Attributes:
        count: Number of steps taken.
        inner_state: State of the direction.
        numbers: The limit, and what it has been found from: the fields of `Numbers` along the last axis.
        counts: The phase of the search, and the numbers of probes and steps of each kind: the fields of
            `Counts` along the last axis, int32.
    """

    count: Count
    inner_state: OptState
    numbers: jax.Array
    counts: jax.Array

    @property
    def learning_rate(self) -> Scalar:
        """The learning rate of the last step."""
        return numbers_of(self).learning_rate

    @property
    def step_limit(self) -> Scalar:
        """The limit of the last step."""
        return numbers_of(self).step_limit


class ErrorControl(NamedTuple):
    """What `error_controlled` has measured.

    Attributes:
        learning_rate: The learning rate of the last step.
        step_limit: Its limit; the learning rate is the smaller of it and the given one.
        curvature: The curvature along the direction without momentum d, relative to the slope:
            d'Hd / <g, d>, in units of 1 / learning rate. Without noise and momentum a learning rate of
            2 / curvature is at the edge of stability; with momentum, steps along d are short-lived there, and
            this says little about it.
        predicted_decrease: The decrease of the loss that the gradient promised in the last probe.
        actual_decrease: The decrease that the probe found.
        error: 1 - actual / predicted, in [-1, 50].
        probes: Number of probes.
        silent_probes: Number of those that said nothing: a gradient of 0, a loss that is not finite, a
            direction that points up the gradient, or a mismatch.
        mismatches: Number of checks in which value, gradient and `value_fn` did not belong together. If it is
            not 0, `value_fn` has another batch, another key for dropout, or leaves out a term of the loss.
        limited: The share of steps in which the limit was below the given learning rate, in [0, 1]. The shape
            of a schedule multiplies the limit too, so with a peak that is too high it is 1 to the end.
    """

    learning_rate: Scalar
    step_limit: Scalar
    curvature: Scalar
    predicted_decrease: Scalar
    actual_decrease: Scalar
    error: Scalar
    probes: Count
    silent_probes: Count
    mismatches: Count
    limited: Scalar


@keeps_schedules("max_learning_rate")
def error_controlled(
    direction: optax.GradientTransformation,
    max_learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    tolerance: ArrayLike = 0.35,
    every: int = 10,
    estimate: Estimate = "value",
    initial_learning_rate: ArrayLike = 1e-6,
    follow_schedule: bool = True,
    controller: StepController | ControllerPreset | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Limits the learning rate to the longest step for which a linear model of the loss can be trusted.

    Use it as a safeguard: a learning rate that is far too high then still trains. It does not replace tuning:
    what it finds is often within a factor of 2 of the best rate, and sometimes not.

    A probe asks what the loss f of the batch does along the direction without momentum,
    $d = D^{-1} g$ for Adam ($D = \sqrt{\hat v} + \epsilon$). The gradient promises that f falls by
    $h \langle g, d \rangle$ in a step of learning rate h. The error is the part that is not kept:

    $$
    E(h) = 1 - \frac{f(\theta) - f(\theta - h d)}{h \langle g, d \rangle}
         = \frac{h}{2} \kappa + O(h^2), \qquad
    \kappa = \frac{\langle d, H d \rangle}{\langle g, d \rangle}
    $$

    So E = 0 for a tiny step, 1/2 at the minimum along d, and 1 where the loss is what it was. The limit L is
    found once and then held:

    1. It starts at `initial_learning_rate` and is multiplied by 4 at every step, until $E \ge
       \text{tolerance}$. It falls back to where E is 0.05, and doubles at every probe, where $\kappa$ is
       averaged. This is a warm-up: the learning rate is $\min(\alpha(t), L)$, where $\alpha$ is
       `max_learning_rate`.
    2. When $E \ge \text{tolerance}$ again, $L = \text{tolerance} \cdot 2 / \kappa$. From then on the
       learning rate is

    $$
    \eta_t = \min\big( \alpha(t), \; L \, r \, p \, \alpha(t) / \max \alpha \big).
    $$

    A schedule's shape multiplies the limit, so that annealing takes place however high its peak is. Its
    factor p is the inverse of the schedule's mean height, at most 2, since a rate that decays may start
    higher; it is 1 for a number and for a schedule that ends at its peak. The relaxation r grows from 1 to at
    most 4 while the mean error is above 1.5. Noise does not reach that, but curvature does that has adapted
    to the step (Cohen et al. 2021), and momentum keeps such steps stable. A mean error above 10 makes r fall
    by 0.8 per probe.

    Why it does not follow the curvature later: every rule that did lowered the rate far too much, because
    steps below the edge of stability let the curvature grow, which lowers the rate again (Roulet et al.
    2024).

    A probe says nothing, and changes nothing, if the gradient is 0 or not finite, the loss is not finite, d
    points up the gradient, or, after the search, the learning rate is 0. A decrease that is lost in rounding
    counts as E = 0; during the search, one of less than 0.02 % of a float32 loss does. A
    loss that is not finite at the end of the probe counts as 50, which is also the largest error; the least
    is -1.

    Args:
        direction: A transformation that rescales gradients and does not change their sign: `scale_by_adam()`,
            `scale_by_rms()`, a chain of one with `clip_by_global_norm` or, for AdamW,
            `add_decoupled_weight_decay`. Not a whole optimizer, which contains a learning rate. Which
            momentum can be left out of d is listed in the guide on error control; other momentum stays in.
        max_learning_rate: $\alpha$ in [0, inf], or a schedule of the step count, which starts at 0 and must
            run under `jax.vmap`. $\max \alpha$ is the highest of its first 2**24 values: a schedule that
            grows for ever has no shape; use a number or `follow_schedule=False`. None for no rate at all,
            with a factor behind this that decays, as in
            `optax.chain(error_controlled(direction), optax.scale_by_schedule(shape))`: p is 2 then. For a
            constant rate that only the limit determines, pass `jnp.inf`.
        tolerance: The error at which the limit is held, in (0, 10].
        every: The number of steps between probes once E is not negligible, at least 1.
        estimate: "value" probes with one evaluation of the loss; "gradient" with its gradient,
            $E = \langle g - g(\theta - h d), d \rangle / 2 \langle g, d \rangle$, which costs three times
            as much and is accurate where losses are rounded to bfloat16.
        initial_learning_rate: Where L starts, in (0, inf). If that is too high, L falls first.
        follow_schedule: Whether a schedule's shape multiplies the limit. False: it is only a cap.
        controller: None holds the limit. A `StepController`, or "smooth", "pi" or "noisy" for one of its
            presets, goes on from where the limit was found as solvers do: at every probe it multiplies L by
            its factor for E(L) / tolerance, and p = r = 1. Deterministic problems may gain from that; on
            batches it trains worse, as the guide on error control shows.

    Returns:
        The transformation, with the sign of descent. `update` needs `params`, `value=`, the loss at them, and
        `value_fn=`, the loss of the same batch as a function of the parameters; with nnx,
        `integrations.flax.value_fn` makes it. (optax's line searches need the same.) It has to be the same
        function: the same batch, dropout key and penalties. Where updates are not its gradient, as behind
        clipping, pass the gradient as `grad=`; `accumulate_gradients` passes that of the micro-batch.

        It is checked. One probe in 16 compares `value_fn(params)` with `value`. A probe that would end the
        search compares the slope of `value_fn`, from a step so short that its promise is 8 times the rounding
        error of the loss, with the one that the gradient promises. If the losses differ by more than 1 %, or
        less than half of that promise is kept, the probe is ignored, and counted in
        `get_error_control(state).mismatches`. A smaller difference of the losses counts as rounding, as of
        bfloat16: decreases below twice the difference count as E = 0.

    Raises:
        ValueError: If an argument is out of range (at construction); if `direction` has the sign of descent,
            as far as can be seen, or a leaf is not floating (at init); if `params`, `value` or `value_fn` is
            missing, not a scalar, or does not fit the others (at update).

    State cost: the state of `direction` and 19 scalars in three arrays. Time: one evaluation of the loss in
    `every` steps, and two more updates of `direction`. Under `vmap` every step probes. In `shard_map` and
    `pmap`, average value, gradient and the result of `value_fn` over the devices, or their steps differ.

    Examples:
        >>> import adaptive_optax as ao, jax, jax.numpy as jnp, optax
        >>> tx = ao.error_controlled(ao.scale_by_adam(), 100.0)
        >>> def loss(params):
        ...     return jnp.sum(jnp.array([1.0, 30.0]) * params**2)
        >>> @jax.jit
        ... def step(params, state):
        ...     value, gradient = jax.value_and_grad(loss)(params)
        ...     updates, state = tx.update(gradient, state, params, value=value, value_fn=loss)
        ...     return optax.apply_updates(params, updates), state
        >>> params = jnp.array([3.0, -2.0])
        >>> state = tx.init(params)
        >>> for _ in range(200):
        ...     params, state = step(params, state)
        >>> bool(loss(params) < 1e-3), ao.get_error_control(state).limited.item()
        (True, 1.0)

    Source: derived for this library from Euler's method. On a quadratic, "E <= tolerance" is Armijo's
    condition with c = 1 - tolerance. Related: Ayadi and Turinici 2020 (a same-batch pair of Euler and Heun),
    Vaswani et al. 2019 (same-batch line search), Roulet et al. 2024, "Stepping on the edge".
    """
    check_transformation("direction", direction)
    if max_learning_rate is not None:
        max_learning_rate = as_hyperparameter("max_learning_rate", max_learning_rate)
    check_hyperparameter("tolerance", tolerance)
    check_integer("every", every, "[1, 2147483647]")
    check_choice("estimate", estimate, ("value", "gradient"))
    check_hyperparameter("initial_learning_rate", initial_learning_rate)
    check_bool("follow_schedule", follow_schedule)
    controller = None if controller is None else as_controller(controller)
    direction = with_array_state(direction)
    shape = max_learning_rate if follow_schedule and callable(max_learning_rate) else None

    heights: dict[Any, tuple[np.ndarray, np.ndarray]] = {}  # by dtype, where they do not depend on a tracer

    def height_of(numbers):
        """The height of this schedule, which may not be that of `init`; else what `init` found."""
        return heights.get(numbers.longest.dtype, (numbers.peak, numbers.relief))

    def given_at(count, dtype):
        if max_learning_rate is None:
            return jnp.full((), jnp.finfo(dtype).max, dtype)  # not inf, which `jax_debug_infs` reports
        return value_at(max_learning_rate, count, dtype)

    def has_shape(peak):
        return (peak > 0) & jnp.isfinite(peak)

    def height(dtype):
        """The highest value of a schedule, and the factor on the limit that its mean height allows."""
        peak, mean = (1, 1) if shape is None else peak_and_mean(shape, dtype)
        allowed = jnp.where(has_shape(peak), peak / jnp.where(mean > 0, mean, 1), 1)
        relief = _HIGHEST_RELIEF if max_learning_rate is None else jnp.clip(allowed, 1, _HIGHEST_RELIEF)
        return jnp.asarray(peak, dtype), jnp.asarray(relief if controller is None else 1, dtype)

    def own_init(params):
        dtype = scalar_dtype(params)
        count = jnp.zeros((), jnp.int32)
        first = value_at(initial_learning_rate, count, dtype)
        peak, relief = height(dtype)
        numbers = dict.fromkeys(Numbers._fields, 0) | {
            "learning_rate": jnp.minimum(first, given_at(count, dtype)),
            "step_limit": first,
            "longest": first,
            "relaxation": 1,
            "peak": peak,
            "relief": relief,
        }
        return ErrorControlledState(
            count=count,
            inner_state=None,
            numbers=stacked(numbers.values(), dtype),
            counts=jnp.zeros(len(Counts._fields), jnp.int32),
        )

    def init_fn(params):
        check_inexact("error_controlled", "params", params)
        inner = direction.init(params)
        _check_inner(direction, inner, params)
        return own_init(params)._replace(inner_state=inner)

    def limit_of(numbers, phase, given):
        """The limit of a step, given the learning rate of the schedule."""
        peak, relief = height_of(numbers)
        held = numbers.longest * numbers.relaxation * relief
        if shape is not None:
            held *= jnp.where(has_shape(peak), given / jnp.where(peak > 0, peak, 1), 1)
        return jnp.where(phase == _FOUND, held, numbers.longest)

    def update_fn(
        updates,
        state,
        params=None,
        *,
        value: Any = None,
        grad: Any = None,
        value_fn: Any = None,
        **extra_args,
    ):
        check_params("error_controlled", params)
        check_inexact("error_controlled", "updates", updates)
        check_state("error_controlled", state, own_init, "updates", updates)
        check_loss(value, value_fn)
        extra_args |= {"value": value, "grad": grad, "value_fn": value_fn}
        g = updates if grad is None else leaves_like(updates, grad)
        inner, dtype = state.inner_state, state.numbers.dtype
        given = given_at(state.count, dtype)
        if dtype not in heights and (found := _constant(lambda: height(dtype))) is not None:
            heights[dtype] = found

        def probed(own):
            numbers, counts = numbers_of(own), counts_of(own)
            h = numbers.longest
            if controller is None:  # a controller follows what the schedule multiplies
                taken = jnp.minimum(given, limit_of(numbers, counts.phase, given))
                h = jnp.where(counts.phase == _FOUND, taken, h)
            d = momentum_free_direction(direction, updates, inner, params, **extra_args)
            ray = Ray(params, g, d, checked_loss(value_fn, params))
            is_found = counts.phase == _FOUND
            probe = with_noise(probe_of(estimate, ray, h, value), numbers.noise, is_found)
            is_long = ~is_found & probe.is_measured & ~(probe.error < tolerance)
            is_due = (counts.probes % _PROBES_PER_CHECK == 0) | (counts.mismatches > 0)
            found = jax.lax.cond(
                is_long | is_due,
                lambda: check_of(ray, jnp.where(is_long, h, 0), value, probe),
                lambda: Check(numbers.noise, jnp.zeros((), dtype)),
            )
            is_same = found.is_same
            numbers = numbers._replace(noise=jnp.where(is_same, found.noise, 0))
            probe = with_noise(probe, numbers.noise, is_found)
            numbers, counts = _controlled(
                numbers, counts, probe, is_same, h, jnp.asarray(tolerance, dtype), controller
            )
            return own._replace(numbers=stacked(numbers, dtype), counts=stacked(counts, jnp.int32))

        is_due = (state.count % every == 0) | (counts_of(state).phase == _SEEKING)
        own = jax.lax.cond(is_due, probed, lambda own: own, state._replace(inner_state=None))
        numbers, counts = numbers_of(own), counts_of(own)
        limit = limit_of(numbers, counts.phase, given)
        rate = jnp.minimum(given, limit)
        peak, relief = height_of(numbers)
        numbers = numbers._replace(learning_rate=rate, step_limit=limit, peak=peak, relief=relief)
        u, inner = direction.update(updates, inner, params, **extra_args)
        check_same_tree("error_controlled", "the updates of direction", u, "the gradients", updates)
        limited = jnp.where(limit < given, incremented(counts.limited), counts.limited)
        new = ErrorControlledState(
            count=incremented(state.count),
            inner_state=inner,
            numbers=stacked(numbers, dtype),
            counts=stacked(counts._replace(limited=limited), jnp.int32),
        )
        return scaled(outgoing(u, inner), -rate), new

    return transformation(None, init_fn, update_fn, all_params=True)


def get_error_control(opt_state: OptState) -> ErrorControl:
    """Reads what `error_controlled` has measured.

    Args:
        opt_state: A state that contains one `error_controlled`, at any depth; it may be traced.

    Raises:
        ValueError: If there is none or more than one.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> tx = ao.error_controlled(ao.scale_by_adam(), 0.1)
        >>> ao.get_error_control(tx.init(jnp.ones(2))).probes.item()
        0
    """
    state = one_state_of(ErrorControlledState, opt_state, "error_controlled")._replace(inner_state=None)
    state = ErrorControlledState(*map(unwrapped, state))
    numbers, counts = numbers_of(state), counts_of(state)
    is_known = numbers.predicted > 0
    ratio = numbers.actual / jnp.where(is_known, numbers.predicted, 1)
    return ErrorControl(
        learning_rate=numbers.learning_rate,
        step_limit=numbers.step_limit,
        curvature=numbers.curvature,
        predicted_decrease=numbers.predicted,
        actual_decrease=numbers.actual,
        error=jnp.clip(jnp.where(is_known, 1 - ratio, 0), _LEAST_ERROR, _LARGEST_ERROR),
        probes=counts.probes,
        silent_probes=counts.silent,
        mismatches=counts.mismatches,
        limited=counts.limited.astype(numbers.longest.dtype)
        / jnp.maximum(state.count, 1).astype(numbers.longest.dtype),
    )


def numbers_of(state: ErrorControlledState) -> Numbers:
    """Unpacks the numbers in a state."""
    return Numbers(*_unpacked(state.numbers))


def counts_of(state: ErrorControlledState) -> Counts:
    """Unpacks the counts in a state."""
    return Counts(*_unpacked(state.counts))


def _unpacked(array: jax.Array) -> list[jax.Array]:
    return [array[..., i] for i in range(array.shape[-1])]


def _check_points_up(direction: Any, params: Any) -> None:
    """Raises if a direction has the sign of descent for small parameters with these paths."""
    x = jax.tree.map(lambda p: jnp.ones((2,) * jnp.ndim(p)), params)

    def lowest():
        u, _ = direction.update(x, direction.init(x), x)
        return jnp.min(jnp.stack([jnp.min(leaf) for leaf in jax.tree.leaves(u)]))

    try:
        found = _constant(lowest)
    except Exception:  # it needs other parameters or arguments
        return
    if found is not None and found < 0:
        raise ValueError(
            "direction must keep the sign of gradients, as scale_by_adam() does, got one that reverses it, "
            "as optimizers with a learning rate do: for AdamW, pass optax.chain(scale_by_adam(), "
            "add_decoupled_weight_decay(1e-4))."
        )


def _check_inner(direction: Any, state: Any, params: Any) -> None:
    """Raises if a direction is limited itself, or contains a whole optimizer, as far as can be seen."""
    kinds = (ScaleByLearningRateState, ErrorControlledState)
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))
    if any(isinstance(node, ErrorControlledState) for node in nodes):
        raise ValueError("direction must not contain error_controlled, of which one limits all parameters.")
    in_groups = any(isinstance(node, ScaleByLearningRateState) for node in nodes)
    _check_points_up(direction, params if in_groups else {"w": np.ones(2)})


def _constant(function: Callable[[], Any]) -> Any:
    """Evaluates a function at once, also while tracing; None if it depends on what is traced.

    The results are NumPy arrays, which belong to no mesh or device.
    """
    with jax.ensure_compile_time_eval():
        found = function()
    is_traced = any(isinstance(x, Tracer) for x in jax.tree.leaves(found))
    return None if is_traced else jax.tree.map(np.asarray, found)


def _controlled(
    numbers: Numbers,
    counts: Counts,
    probe: Probe,
    is_same: jax.Array,
    h: jax.Array,
    tolerance: jax.Array,
    controller: StepController | None,
) -> tuple[Numbers, Counts]:
    """The limit and its counts after a probe with learning rate h."""
    is_promise = (h > 0) & (probe.slope > 0) & jnp.isfinite(probe.slope) & jnp.isfinite(probe.value)
    says_something = is_same & is_promise
    error = jnp.where(jnp.isfinite(probe.error), probe.error, _LARGEST_ERROR)
    error = jnp.where(probe.is_measured, jnp.clip(error, _LEAST_ERROR, _LARGEST_ERROR), 0)
    newest = 2 * error / jnp.where(says_something, h, 1)
    is_first = counts.phase == _SEEKING  # a mean would hold what smaller steps have found
    curvature = jnp.where(is_first, newest, numbers.curvature + _NEWEST * (newest - numbers.curvature))
    is_found = counts.phase == _FOUND
    factor, phase = _search(counts.phase, curvature * numbers.longest / 2, tolerance)
    found = _held(numbers, error) if controller is None else _followed(numbers, error / tolerance, controller)
    limits = jnp.finfo(h.dtype)

    def in_range(longest):
        return jnp.clip(longest, float(limits.tiny), float(limits.max) / 1e6)

    sought = numbers._replace(longest=in_range(numbers.longest * factor))
    found = found._replace(longest=in_range(found.longest))
    new = jax.tree.map(lambda x, y: jnp.where(is_found, x, y), found, sought)._replace(
        curvature=curvature,
        predicted=probe.promised,
        actual=jnp.where(jnp.isfinite(probe.actual), probe.actual, -float(limits.max)),
    )
    return jax.tree.map(lambda x, y: jnp.where(says_something, x, y), new, numbers), counts._replace(
        phase=jnp.where(says_something & ~is_found, phase, counts.phase),
        probes=incremented(counts.probes),
        silent=jnp.where(says_something, counts.silent, incremented(counts.silent)),
        mismatches=jnp.where(is_same, counts.mismatches, incremented(counts.mismatches)),
    )


def _search(phase: Count, expected: Scalar, tolerance: Scalar) -> tuple[Scalar, Count]:
    """The factor for the limit while it is sought and the next phase, given the error expected at it."""
    is_first, is_growing = phase == _SEEKING, phase == _GROWING
    expected = jnp.maximum(expected, 0)
    is_long = expected >= tolerance
    target = jnp.where(is_growing, tolerance, jnp.minimum(_NEGLIGIBLE, tolerance))
    shorter = jnp.clip(target / jnp.where(is_long, expected, 1), _LEAST_FACTOR, 1)
    longer = jnp.where(is_first, _LEAP, _GROWTH)
    next_if_long = jnp.where(is_growing, _FOUND, _LOWERED)
    next_if_short = jnp.where(is_first, _SEEKING, _GROWING)
    return jnp.where(is_long, shorter, longer), jnp.where(is_long, next_if_long, next_if_short)


def _held(numbers: Numbers, error: Scalar) -> Numbers:
    """A limit that has been found, and is relaxed if the mean error says that curvature has adapted to it."""
    mean_error = numbers.error + (1 - _ERROR_DECAY) * (error - numbers.error)
    relaxed = jnp.minimum(numbers.relaxation * _RELAXATION, _MOST_RELAXED)
    lasting = jnp.where(mean_error > _ADAPTED, relaxed, numbers.relaxation)
    relaxation = jnp.where(mean_error > _UNSTABLE, numbers.relaxation * _RETREAT, lasting)
    return numbers._replace(error=mean_error, relaxation=relaxation)


def _followed(numbers: Numbers, error: Scalar, controller: StepController) -> Numbers:
    """A limit that has been found, and goes on as a controller has it; an error below 0 is none."""
    history = ErrorHistory(numbers.last_error, numbers.error_before)
    factor, history = next_factor(controller, history, jnp.maximum(error, 0))
    return numbers._replace(
        longest=numbers.longest * factor, last_error=history.last, error_before=history.before
    )
