"""A factor on the loss that keeps float16 gradients from underflowing and overflowing."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from adaptive_optax._core.checks import check_integer, check_transformation
from adaptive_optax._core.paths import paths_and_leaves
from adaptive_optax._core.precision import divide, incremented, scalar_dtype, scale, widen
from adaptive_optax._core.ranges import check_hyperparameter
from adaptive_optax._core.state_check import check_state
from adaptive_optax._core.states import one_state_of, unwrapped
from adaptive_optax._core.transformation import transformation, with_array_state, with_stable_dtypes
from adaptive_optax._core.trees import Count, OptState, Scalar
from adaptive_optax._core.values import static_value, value_at
from adaptive_optax.wrappers.reject_nonfinite import reject_nonfinite
from adaptive_optax.wrappers.reporting import OnReject

_LIMITS = jnp.finfo(jnp.float32)

Loss = TypeVar("Loss")


class DynamicLossScaleState(NamedTuple):
    """State of `dynamic_loss_scale`. The names are the same as in Flax's `DynamicScale`.

    Attributes:
        inner_state: State of the `reject_nonfinite` inside, which contains the inner transformation's.
        scale: The factor for the loss of the next step.
        fin_steps: Number of steps with finite gradients since the scale last changed.
    """

    inner_state: OptState
    scale: Scalar
    fin_steps: Count

    def kept_at_rejection(self, new: DynamicLossScaleState) -> DynamicLossScaleState:
        """The state that remains if an outer wrapper rejects the step: the scale changes nevertheless."""
        return self._replace(scale=new.scale, fin_steps=new.fin_steps)


def dynamic_loss_scale(
    inner: optax.GradientTransformation,
    init_scale: ArrayLike = 2.0**15,
    growth_interval: int = 2000,
    growth_factor: ArrayLike = 2.0,
    backoff_factor: ArrayLike = 0.5,
    *,
    minimum_scale: ArrayLike = float(_LIMITS.tiny),
    maximum_scale: ArrayLike = float(_LIMITS.max),
    on_reject: OnReject | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains in float16: unscales the gradients of a scaled loss, and adapts the scale.

    float16 covers only 6e-8 to 65504, which is too narrow for gradients. Multiply the loss by the scale
    before differentiating (`scale_loss`); this wrapper then divides the gradients by it, in float32, before
    `inner` sees them:

    $$
    g = \nabla (s L) / s
    $$

    The scale adapts to the gradients. If a gradient is not finite, it becomes
    $\text{backoff} \cdot s$; after `growth_interval` steps with finite gradients, the next such step
    makes it $\text{growth} \cdot s$. A step that overflows is rejected by the `reject_nonfinite` that
    this contains: updates are zero, and the state of `inner` does not change, including its count and
    schedules. A step that overflows inside `inner` is also rejected, but does not change the scale, which is
    not the cause. `get_rejections` counts both, and `keep_if_rejected` restores batch statistics. bfloat16
    needs none of this, because it has the range of float32.

    Put it outermost: anything outside, such as clipping before it, sees scaled gradients. In particular use
    the nesting `dynamic_loss_scale(accumulate_gradients(inner, every, drop_nonfinite=True))`. Each
    micro-batch is then divided by the scale of its own loss; one that overflows is dropped and lowers the
    scale, and the window continues with the next one. (If the dropped micro-batch had `emit=True`, that is
    lost too: pass it again with the next one.) With the other nesting,
    `accumulate_gradients(dynamic_loss_scale(inner), every)`, the scale only changes at emissions, and an
    overflow costs the whole window. `telemetry`, `inject_hyperparams` and `master_weights` go inside;
    `reject_nonfinite` works in both orders. `freeze` goes around it: `freeze(dynamic_loss_scale(inner))` does
    not see the gradients of frozen parameters, which inside would count when it looks for an overflow.

    Scale, factors and interval work step for step as in `flax.training.dynamic_scale.DynamicScale`, so a run
    can be converted either way: `state._replace(scale=..., fin_steps=...)`, and
    `DynamicScale(scale=state.scale, fin_steps=state.fin_steps)`. PyTorch's GradScaler and
    Keras's `LossScaleOptimizer` grow one step earlier, as with `growth_interval=1999`.

    Args:
        inner: The transformation that takes the steps, usually a whole optimizer.
        init_scale: The first scale, in (0, inf). Too large a value costs a few rejected steps.
        growth_interval: The number of steps with finite gradients before the scale grows, at least 1.
        growth_factor: In [1, inf).
        backoff_factor: In (0, 1).
        minimum_scale: The lower limit of the scale, in (0, inf).
        maximum_scale: The upper limit of the scale, in (0, inf).
        on_reject: As in `reject_nonfinite`.

    Returns:
        The transformation. The first update of `inner` determines the dtypes of its state, so that optax's
        optimizers work with float16 parameters. An extra argument `grad=` is unscaled like the updates.

    Raises:
        ValueError: If an argument is out of range (at construction), a leaf is not floating (at init), or the
            gradients do not match the state (at update).

    State cost: the state of `inner`, and four scalars.

    Examples:
        >>> import adaptive_optax as ao, jax, jax.numpy as jnp, optax
        >>> params = jnp.ones(2, jnp.float16)
        >>> tx = ao.dynamic_loss_scale(ao.sgd(0.1))
        >>> def loss(params, state):
        ...     return ao.scale_loss(1e-7 * jnp.mean(params), state)  # whose gradient is 0 in float16
        >>> state = tx.init(params)
        >>> updates, state = tx.update(jax.grad(loss)(params, state), state, params)
        >>> bool(jnp.all(updates < 0)), ao.get_loss_scale(state).item()
        (True, 32768.0)

    Source: Micikevicius et al. 2018, "Mixed precision training"; Flax's DynamicScale.
    """
    check_transformation("inner", inner)
    check_hyperparameter("init_scale", init_scale)
    check_integer("growth_interval", growth_interval, "[1, inf)")
    check_hyperparameter("growth_factor", growth_factor)
    check_hyperparameter("backoff_factor", backoff_factor)
    check_hyperparameter("minimum_scale", minimum_scale)
    check_hyperparameter("maximum_scale", maximum_scale)
    known = [x for x in map(static_value, (minimum_scale, init_scale, maximum_scale)) if x is not None]
    if known != sorted(known):  # a tracer's value is not known
        raise ValueError(
            f"init_scale must be between minimum_scale and maximum_scale, got {init_scale!r} with "
            f"{minimum_scale!r} and {maximum_scale!r}."
        )
    inner = with_array_state(inner)
    rejecting = reject_nonfinite(inner, on_reject=on_reject)

    def own_init(params):
        return DynamicLossScaleState(
            inner_state=None,
            scale=value_at(init_scale, jnp.zeros((), jnp.int32), scalar_dtype(params)),
            fin_steps=jnp.zeros((), jnp.int32),
        )

    def init_fn(params):
        state: Any = rejecting.init(params)
        stable = with_stable_dtypes(inner, state.inner_state, widen(params), params)
        return own_init(params)._replace(inner_state=state._replace(inner_state=stable))

    def update_fn(updates, state: Any, params=None, **extra_args):
        check_state("dynamic_loss_scale", state, own_init, "updates", updates)
        s, dtype, count = state.scale, state.scale.dtype, state.fin_steps

        def unscaled(tree):
            return jax.tree.map(lambda x: divide(x, s), widen(tree))

        g = unscaled(updates)
        if extra_args.get("grad") is not None:  # which `accumulate_gradients` passes on
            extra_args["grad"] = unscaled(extra_args["grad"])
        finite = jnp.asarray(True)
        for x in jax.tree.leaves(g):
            finite &= jnp.all(jnp.isfinite(x))
        new_updates, inner_state = rejecting.update(g, state.inner_state, params, **extra_args)

        grown = jnp.minimum(s * value_at(growth_factor, count, dtype), value_at(maximum_scale, count, dtype))
        lowered = jnp.maximum(
            s * value_at(backoff_factor, count, dtype), value_at(minimum_scale, count, dtype)
        )
        grows = count == growth_interval
        return new_updates, DynamicLossScaleState(
            inner_state=inner_state,
            scale=jnp.where(finite, jnp.where(grows, grown, s), lowered),
            fin_steps=jnp.where(finite & ~grows, incremented(count), 0),
        )

    return transformation("dynamic_loss_scale", init_fn, update_fn)


def get_loss_scale(opt_state: OptState) -> Scalar:
    """Reads the factor for the next loss.

    Args:
        opt_state: A state that contains one `dynamic_loss_scale`, at any depth.

    Returns:
        The scale, a float scalar.

    Raises:
        ValueError: If there is none or more than one.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> ao.get_loss_scale(ao.dynamic_loss_scale(ao.sgd(0.1)).init(jnp.ones(2))).item()
        32768.0
    """
    return unwrapped(one_state_of(DynamicLossScaleState, opt_state, "dynamic_loss_scale").scale)


def scale_loss(loss: Loss, opt_state: OptState) -> Loss:
    """Multiplies a loss by the scale of `dynamic_loss_scale`, in float32.

    Differentiate the result and pass the gradients to `update` unchanged. To get the loss itself, use
    `scaled / get_loss_scale(opt_state)`, or return it as an auxiliary value of
    `jax.value_and_grad(..., has_aux=True)`.

    Args:
        loss: A real scalar, or a tree of real scalars.
        opt_state: A state that contains one `dynamic_loss_scale`, such as `nnx.Optimizer(...).opt_state`.

    Returns:
        The scaled loss, float32 or wider.

    Raises:
        ValueError: If there is no such state or more than one, or the loss is a function.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> state = ao.dynamic_loss_scale(ao.sgd(0.1), init_scale=4.0).init(jnp.ones(2))
        >>> ao.scale_loss(jnp.float16(0.5), state)
        Array(2., dtype=float32)
    """
    for path, x in paths_and_leaves(loss):
        if not isinstance(x, jax.Array | np.ndarray | np.generic | int | float):
            where = f" at {path!r}" if path else ""
            hint = "; scale its value, scale_loss(loss(params), opt_state)" if callable(x) else ""
            raise ValueError(f"loss must be a real scalar or a tree of them, got {x!r}{where}{hint}.")
    s = get_loss_scale(opt_state)
    return jax.tree.map(lambda x: scale(widen(x), s), loss)
