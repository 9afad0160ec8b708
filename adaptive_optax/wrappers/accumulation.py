"""Gradients of several micro-batches make one step, and tell how noisy they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import ArrayLike

from adaptive_optax._checks import (
    check_bool,
    check_inexact,
    check_integer,
    check_same_tree,
    check_scalar,
    check_state,
    check_state_kept,
    check_transformation,
)
from adaptive_optax._precision import (
    abs_square,
    divide,
    incremented,
    scalar_dtype,
    scale,
    value_at,
    wide_dtype,
    widen,
)
from adaptive_optax._states import one_state_of, unwrapped

_NOISE_DECAY = 0.99  # averages over about a hundred emissions


class AccumulateGradientsState(NamedTuple):
    """State of `accumulate_gradients`. Floating scalars are float32, or float64 if a parameter is.

    Attributes:
        count: Number of emissions, int32 scalar.
        micro_step: Number of micro-batches seen since the last emission, int32 scalar.
        contributing: Number of those with a part in the sums, int32 scalar.
        inner_state: The inner transformation's.
        total: Weighted sum of their gradients, like the parameters, float32 at least.
        weight: Sum of their weights.
        weight_sq: Sum of the squares of their weights.
        square: Weighted sum of their gradients' squared norms.
        signal: Moving average, over emissions, of the estimates of |G|^2 times 1 - 1/n (see `noise_scale`).
        noise: Moving average of those of tr(Sigma), likewise.
    """

    count: jax.Array
    micro_step: jax.Array
    contributing: jax.Array
    inner_state: Any
    total: Any
    weight: jax.Array
    weight_sq: jax.Array
    square: jax.Array
    signal: jax.Array
    noise: jax.Array


def accumulate_gradients(
    inner: optax.GradientTransformation,
    every: int | Callable[[jax.Array], ArrayLike],
    *,
    drop_nonfinite: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Takes one step of the inner transformation for several micro-batches.

    Use it for batches that do not fit into memory, and with a schedule for batches that grow (`grow_batch`).
    Call `update` for every micro-batch. Every k-th call hands their mean to the inner transformation, as if
    the k micro-batches had been one batch, and returns its updates: it *emits*. The other calls return zeros
    and do not run the inner transformation, so its state, its count and its schedules move once an emission.

    .. math:: \bar g = \sum_i w_i g_i \Big/ \sum_i w_i

    with the weights that `update(..., weight=w)` was given, 1 by default. Where a micro-batch's gradient is a
    mean over samples or tokens, w is their number. A weight of 0 leaves a micro-batch out, whatever its
    gradients hold (a mean over no tokens is NaN); if none of the k has a part, nothing is emitted, and the
    counts and the inner state stay. `noise_scale` reads how much the micro-batches scatter.

    Bad batches: `accumulate_gradients(reject_nonfinite(tx), k, drop_nonfinite=True)` is the nesting to use. A
    bad micro-batch is dropped alone, and an overflow inside `tx` costs its emission. (That emission is
    counted here and not inside, so that `every` is a step ahead of the schedules of `tx` from then on.) With
    `reject_nonfinite` outside, every rejection of an overflow inside `tx` would restore the sum that caused
    it. `telemetry` and `verified`, too, go inside.

    Differences from `optax.MultiSteps`: weights, dropping, float32 sums whatever the gradients' dtype, and
    the noise scale. Decisions are made on what this device sees: under `shard_map` average the gradients over
    devices before `update`. Under `vmap` both ways are computed, as in any `lax.cond`.

    Args:
        inner: The transformation that takes the steps, a whole optimizer.
        every: k, an integer of at least 1, or a schedule of the number of emissions so far, whose values are
            rounded to integers; those below 1 count as 1.
        drop_nonfinite: Whether a micro-batch counts as one of weight 0 if there is a NaN or an infinity in
            its gradients or its weight, or its gradients' squared norm overflows (a norm above 1e19).

    Returns:
        The transformation. Updates are float32 or wider. `update` takes `weight`, a number of at least 0
        (that of a tracer cannot be checked). Other extra arguments go to `inner` as the micro-batch that
        completes an emission has them: `value=` is the loss of that one, not the mean of k; where the mean
        matters, as for `reduce_on_plateau` on training losses, pass a running mean.

    Raises:
        ValueError: If `inner` is no transformation or `every` out of range (at construction), a leaf is not
            floating (at init), or the gradients' tree is not that of the state, `weight` is out of range, a
            schedule's value is no scalar, or the inner state changes shape or dtype (at update).

    State cost: that of `inner`, one float32 copy of the parameters, and eight scalars.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> tx = ao.accumulate_gradients(ao.sgd(1.0), every=2)
        >>> state = tx.init(jnp.zeros(1))
        >>> first, state = tx.update(jnp.array([1.0]), state, weight=3)
        >>> second, state = tx.update(jnp.array([5.0]), state, weight=1)
        >>> first.tolist(), second.tolist()
        ([0.0], [-2.0])
    """
    check_transformation("inner", inner)
    if hasattr(every, "accumulation_steps"):
        raise ValueError(
            "every must be an integer or a schedule, got a BatchGrowth: give its accumulation_steps."
        )
    if not callable(every):
        check_integer("every", every, "[1, inf)")
    check_bool("drop_nonfinite", drop_nonfinite)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        check_inexact("accumulate_gradients", "params", params)
        dtype = scalar_dtype(params)

        def zero(dtype=dtype):  # not one array in several places: such a state cannot be donated
            return jnp.zeros((), dtype)

        return AccumulateGradientsState(
            count=zero(jnp.int32),
            micro_step=zero(jnp.int32),
            contributing=zero(jnp.int32),
            # A weak type would not survive the cond.
            inner_state=jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), inner.init(params)),
            total=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=wide_dtype(p)), params),
            weight=zero(),
            weight_sq=zero(),
            square=zero(),
            signal=zero(),
            noise=zero(),
        )

    def update_fn(updates, state, params=None, *, weight: ArrayLike = 1.0, **extra_args):
        check_state("accumulate_gradients", state, AccumulateGradientsState)
        check_inexact("accumulate_gradients", "updates", updates)
        check_same_tree("accumulate_gradients", "updates", updates, "the state", state.total)
        if not (drop_nonfinite and _is_known_nonfinite(weight)):
            check_scalar("weight", weight, "[0, inf)")
        dtype = state.weight.dtype
        g, w = widen(updates), jnp.asarray(weight, dtype)

        used, square = w != 0, _square_norm(g, dtype)
        if drop_nonfinite:
            used &= jnp.isfinite(w) & jnp.isfinite(square)

        def added(total, new):
            return jnp.where(used, total + new, total)

        total = jax.tree.map(lambda t, x: added(t, scale(x.astype(t.dtype), w)), state.total, g)
        state = state._replace(
            micro_step=incremented(state.micro_step),
            contributing=state.contributing + used.astype(jnp.int32),
            weight=added(state.weight, w),
            weight_sq=added(state.weight_sq, w * w),
            square=added(state.square, w * square),
        )
        k = jnp.round(value_at(every, state.count, dtype)).astype(jnp.int32) if callable(every) else every
        complete = state.micro_step >= k
        emits = complete & (state.contributing > 0)

        def emit(total, inner_state):
            mean = jax.tree.map(lambda t: divide(t, state.weight), total)
            new_updates, new_state = inner.update(mean, inner_state, params, **extra_args)
            check_same_tree(
                "accumulate_gradients", "the updates of inner", new_updates, "the gradients", mean
            )
            check_state_kept(
                "accumulate_gradients",
                inner_state,
                new_state,
                "optax's may follow the parameters' dtype, and "
                "the mean is float32: put master_weights around inner",
            )
            new_updates = jax.tree.map(lambda t, u: jnp.asarray(u, t.dtype), total, new_updates)
            return new_updates, new_state, *_averages(state, _square_norm(mean, dtype))

        def wait(total, inner_state):
            return jax.tree.map(jnp.zeros_like, total), inner_state, state.signal, state.noise

        new_updates, inner_state, signal, noise = jax.lax.cond(emits, emit, wait, total, state.inner_state)

        def cleared(x):
            return jnp.where(complete, jnp.zeros_like(x), x)

        return new_updates, AccumulateGradientsState(
            count=jnp.where(emits, incremented(state.count), state.count),
            micro_step=cleared(state.micro_step),
            contributing=cleared(state.contributing),
            inner_state=inner_state,
            total=jax.tree.map(cleared, total),
            weight=cleared(state.weight),
            weight_sq=cleared(state.weight_sq),
            square=cleared(state.square),
            signal=signal,
            noise=noise,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def noise_scale(opt_state: Any) -> jax.Array:
    r"""Reads the gradient's noise scale, the batch size beyond which larger batches stop paying.

    Batches well below it cost next to no extra samples, batches well above it save next to no steps. It is
    estimated from the micro-batches that `accumulate_gradients` sees anyway. With the mean :math:`\bar g` of
    an emission, :math:`s = \sum_i w_i |g_i|^2 / \sum_i w_i`, and the effective number of micro-batches n:

    .. math::
        n = \frac{(\sum_i w_i)^2}{\sum_i w_i^2}, \qquad
        |G|^2 \approx \frac{n |\bar g|^2 - s}{n - 1}, \qquad
        \operatorname{tr} \Sigma \approx \frac{n (s - |\bar g|^2)}{n - 1}, \qquad
        B_{simple} = \operatorname{tr} \Sigma / |G|^2

    Both are unbiased for micro-batches that scatter alike, with whatever weights. Where small weights go with
    more scatter, as numbers of samples do, :math:`|G|^2` comes out too small, and for weights that differ by
    factors it may be negative and the result NaN: then give equal micro-batches, or weights near each other.
    What is returned is the ratio of two moving averages over about a hundred emissions, in which an emission
    counts as much as it tells, 1 - 1/n. Emissions of one micro-batch, and those whose estimates overflow, do
    not enter.

    Args:
        opt_state: A state with one `accumulate_gradients` in it, at any depth.

    Returns:
        :math:`B_{simple}` in micro-batches, a float scalar: times the micro-batch size it is in samples. It
        can be compared with k. NaN before the first estimate, and where that of :math:`|G|^2` is not
        positive: then there is more noise than k micro-batches can tell.

    Raises:
        ValueError: If there is no such state, or more than one.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> tx = ao.accumulate_gradients(ao.sgd(0.1), every=2)
        >>> state = tx.init(jnp.zeros(1))
        >>> for g in (1.0, 3.0):  # s = 5, mean 2: tr Sigma = 2 (5 - 4) = 2 and |G|^2 = 2 * 4 - 5 = 3
        ...     _, state = tx.update(jnp.array([g]), state)
        >>> round(float(ao.noise_scale(state)), 3)
        0.667

    Source: McCandlish, Kaplan, Amodei et al. 2018, "An empirical model of large-batch training", appendix
    A.1; the weights are derived for this library.
    """
    state = one_state_of(AccumulateGradientsState, opt_state, "accumulate_gradients")
    signal, noise = unwrapped(state.signal), unwrapped(state.noise)
    return jnp.where(signal > 0, noise / jnp.where(signal > 0, signal, 1), jnp.nan)


def _is_known_nonfinite(weight: Any) -> bool:
    return np.ndim(weight) == 0 and not isinstance(weight, Tracer) and not np.isfinite(weight)


def _averages(state: AccumulateGradientsState, big: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The averages with this emission's estimates, from big = |mean|^2.

    For Cov(g_i) = Sigma, E[small] = |G|^2 + tr(Sigma) and E[big] = |G|^2 + tr(Sigma) / n. So the expectation
    of big - small / n is (1 - 1/n) |G|^2, and that of small - big is (1 - 1/n) tr(Sigma).
    """
    small, share = state.square / state.weight, state.weight_sq / jnp.square(state.weight)  # share = 1 / n
    signal, noise = big - share * small, small - big
    take = (state.contributing > 1) & jnp.isfinite(signal) & jnp.isfinite(noise)

    def average(old, new):
        return jnp.where(take, old + (1 - _NOISE_DECAY) * (new - old), old)

    return average(state.signal, signal), average(state.noise, noise)


def _square_norm(tree: Any, dtype: Any) -> jax.Array:
    squares = jax.tree.leaves(abs_square(tree))
    return sum((jnp.sum(x).astype(dtype) for x in squares), start=jnp.zeros((), dtype))
