"""Gradient accumulation over micro-batches, and the gradient noise scale estimated from them."""

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
    check_flag,
    check_inexact,
    check_integer,
    check_same_tree,
    check_scalar,
    check_transformation,
)
from adaptive_optax._core.entries import entry, stacked, with_entries
from adaptive_optax._core.paths import paths_and_leaves
from adaptive_optax._core.precision import (
    abs_square,
    divide,
    incremented,
    scalar_dtype,
    scale,
    wide_dtype,
    widen,
)
from adaptive_optax._core.state_check import check_state, check_state_kept
from adaptive_optax._core.states import has_own_rejection, one_state_of, unwrapped
from adaptive_optax._core.transformation import transformation, with_array_state
from adaptive_optax._core.trees import Count, Counts, OptState, Scalar, Scalars, Updates
from adaptive_optax._core.undefined import nan_unless
from adaptive_optax._core.values import value_at
from adaptive_optax.transforms.match_parameter_dtype import outgoing
from adaptive_optax.wrappers.reporting import OnReject, check_on_reject, report_first

_NOISE_DECAY = 0.99  # averages over about a hundred emissions


@with_entries
class AccumulateGradientsState(NamedTuple):
    """State of `accumulate_gradients`, with few arrays, so that passing it to a step is cheap.

    Attributes:
        count: Number of emissions.
        counts: One array of the following five.
        micro_step: Number of micro-batches seen since the last emission.
        contributing: Number of those that are included in the sums.
        took_part: Whether the last micro-batch is included; True before the first.
        dropped: Total number of micro-batches dropped.
        dropped_in_a_row: Number dropped since the last one that was not.
        inner_state: State of the inner transformation.
        total: Weighted sum of the gradients since the last emission, like the parameters, float32 or wider.
        sums: One array of the following five.
        weight: Sum of their weights.
        weight_sq: Sum of the squares of their weights.
        square: Weighted sum of the squared norms of the gradients.
        signal: Moving average, over emissions, of estimates of |G|^2 times 1 - 1/n (see `noise_scale`).
        noise: Moving average, over emissions, of estimates of tr(Sigma) times 1 - 1/n.
    """

    count: Count
    counts: Counts
    inner_state: OptState
    total: Updates
    sums: Scalars

    micro_step = entry("counts")  # type: jax.Array
    contributing = entry("counts")  # type: jax.Array
    took_part = entry("counts", is_flag=True)  # type: jax.Array
    dropped = entry("counts")  # type: jax.Array
    dropped_in_a_row = entry("counts")  # type: jax.Array
    weight = entry("sums")  # type: jax.Array
    weight_sq = entry("sums")  # type: jax.Array
    square = entry("sums")  # type: jax.Array
    signal = entry("sums")  # type: jax.Array
    noise = entry("sums")  # type: jax.Array


def accumulate_gradients(
    inner: optax.GradientTransformation,
    every: int | Callable[[jax.Array], ArrayLike],
    *,
    drop_nonfinite: bool = False,
    on_reject: OnReject | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Accumulates gradients and takes one step of the inner transformation per k micro-batches.

    Use it for batches that do not fit into memory, or with a schedule for growing batches (`grow_batch`).
    Call `update` for every micro-batch. Every k-th call passes the mean of their gradients to the inner
    transformation, as if the k micro-batches were one batch, and returns its updates: it *emits*. The other
    calls return zeros and do not run the inner transformation, so its state, count and schedules advance once
    per emission.

    $$
    \bar g = \sum_i w_i g_i \Big/ \sum_i w_i
    $$

    with the weights given by `update(..., weight=w)`, 1 by default. If a micro-batch's gradient is a mean
    over samples or tokens, w should be their number. A weight of 0 excludes a micro-batch, whatever its
    gradients contain (a mean over no tokens is NaN). If all k are excluded, nothing is emitted, and the
    counts and the inner state do not change. `noise_scale` estimates how much the micro-batches scatter.

    If an epoch ends in the middle of a window, `update(..., emit=True)` emits what has been accumulated,
    including this micro-batch, and the next call starts a new window. To flush after the last micro-batch,
    pass zero gradients with `weight=0, emit=True`; this emits nothing if nothing was accumulated.

    For bad batches, use the nesting `accumulate_gradients(reject_nonfinite(tx), k, drop_nonfinite=True)`. It
    drops only the bad micro-batch, and an overflow inside `tx` costs one emission. (That emission counts
    here but not inside, so `every` is one step ahead of the schedules of `tx` from then on.) With
    `reject_nonfinite` outside, every rejection of an overflow inside `tx` would restore the sum that caused
    it. `get_rejections` counts dropped micro-batches as well as rejected steps, and `keep_if_rejected`
    applies the same decision to the model's own state, such as batch statistics. `telemetry` and `verified`
    also go inside; `dynamic_loss_scale` goes outside.

    Without `drop_nonfinite` a NaN, or a gradient too large for `inner`, enters the state of `inner` with the
    mean of its window, and stays there as it would without accumulation.

    Differences from `optax.MultiSteps`: weights, dropping, float32 sums for any gradient dtype, and the noise
    scale. Decisions depend on what the device sees: under `shard_map`, average the gradients over devices
    before `update`. Under `vmap` both branches are computed, as in any `lax.cond`.

    Args:
        inner: The transformation that takes the steps, usually a whole optimizer.
        every: k, an integer of at least 1, or a schedule of the number of emissions so far, whose values are
            rounded to integers; values below 1 count as 1.
        drop_nonfinite: Whether to treat a micro-batch as one of weight 0 if its gradients or its weight
            contain a NaN or an infinity, or if the squared norm of its gradients overflows (a norm above
            1e19).
        on_reject: `on_reject(what, path)` is called on the host for each dropped micro-batch, as in
            `reject_nonfinite`, with "gradient" and the path of the first bad leaf, "weight", or "gradient
            norm" if only the sum over leaves overflows. Needs `drop_nonfinite=True`.

    Returns:
        The transformation. `update` takes `weight`, a number of at least 0, and `emit`, a bool that may be
        traced. `inner` receives the other extra arguments of the micro-batch that completes an emission:
        `value=` is the loss of that micro-batch, not the mean over k. If the mean matters, as for
        `reduce_on_plateau` with training losses, pass a running mean. With `value_fn=`, `inner` also receives
        its gradient as `grad=`, unless that is given.

    Raises:
        ValueError: If `inner` is not a transformation, `every` is out of range, or `on_reject` is not a
            function or not used (at construction); if a leaf is not floating (at init); if the gradients'
            tree differs from the state's, `weight` is out of range, `emit` is not a bool, a schedule does not
            return a scalar, or the inner state changes shape or dtype (at update).

    State cost: the state of `inner`, one float32 copy of the parameters, and eleven scalars.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> tx = ao.accumulate_gradients(ao.sgd(1.0), every=2)
        >>> state = tx.init(jnp.zeros(1))
        >>> first, state = tx.update(jnp.array([1.0]), state, weight=3)
        >>> second, state = tx.update(jnp.array([5.0]), state, weight=1)
        >>> first.tolist(), second.tolist()
        ([0.0], [-2.0])
        >>> last, state = tx.update(jnp.array([5.0]), state, emit=True)  # the epoch ends
        >>> last.tolist()
        [-5.0]
    """
    check_transformation("inner", inner)
    if hasattr(every, "accumulation_steps"):
        raise ValueError(
            "every must be an integer or a schedule, got a BatchGrowth: pass its accumulation_steps."
        )
    if not callable(every):
        check_integer("every", every, "[1, inf)")
    check_bool("drop_nonfinite", drop_nonfinite)
    check_on_reject(on_reject)
    if on_reject is not None and not drop_nonfinite:
        raise ValueError(f"on_reject={on_reject!r} needs drop_nonfinite=True; otherwise nothing is dropped.")
    inner = with_array_state(inner)

    def own_init(
        params,
    ):  # not `_fresh_state` itself: `check_state` keeps its results while the function lives
        return _fresh_state(params)

    def init_fn(params):
        own, inner_state = own_init(params), inner.init(params)
        if drop_nonfinite and any(
            map(has_own_rejection, jax.tree.leaves(inner_state, is_leaf=has_own_rejection))
        ):
            raise ValueError(
                "accumulate_gradients: with drop_nonfinite=True the scale of a dynamic_loss_scale inside "
                "could never fall, because micro-batches that overflow do not reach it. Put it outside: "
                "dynamic_loss_scale(accumulate_gradients(inner, every, drop_nonfinite=True))."
            )
        # The cond below needs strongly typed arrays.
        return own._replace(
            inner_state=jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), inner_state)
        )

    def update_fn(
        updates, state, params=None, *, weight: ArrayLike = 1.0, emit: ArrayLike = False, **extra_args
    ):
        check_inexact("accumulate_gradients", "updates", updates)
        check_state("accumulate_gradients", state, own_init, "updates", updates)
        check_same_tree("accumulate_gradients", "updates", updates, "the state", state.total)
        if not (drop_nonfinite and _is_known_nonfinite(weight)):
            check_scalar("weight", weight, "[0, inf)")
        check_flag("emit", emit)
        dtype = state.sums.dtype
        g, w = widen(updates), jnp.asarray(weight, dtype)

        squares = _square_norms(g, dtype)
        used, square = w != 0, sum(squares, start=jnp.zeros((), dtype))
        is_dropped = jnp.zeros((), jnp.bool_)
        if drop_nonfinite:
            is_dropped = used & ~(jnp.isfinite(w) & jnp.isfinite(square))
            used &= ~is_dropped
            if on_reject is not None:
                places = [*(("gradient", path) for path, _ in paths_and_leaves(g)), ("weight", "")]
                flags = jnp.isfinite(jnp.stack([*squares, w, square])) | ~is_dropped
                report_first(on_reject, [*places, ("gradient norm", "")], flags)

        state = _with_micro_batch(state, g, w, square, used, is_dropped)
        k = jnp.round(value_at(every, state.count, dtype)).astype(jnp.int32) if callable(every) else every
        complete = (state.micro_step >= k) | jnp.asarray(emit)
        emits = complete & (state.contributing > 0)

        dtypes = [t.dtype for t in jax.tree.leaves(state.total)]
        if "value_fn" in extra_args:  # the loss of this micro-batch, of which the mean is not the gradient
            extra_args = {"grad": updates} | extra_args

        def emission(total, inner_state):
            mean = jax.tree.map(lambda t: divide(t, state.weight), total)
            new_updates, new_state = inner.update(mean, inner_state, params, **extra_args)
            check_same_tree(
                "accumulate_gradients", "the updates of inner", new_updates, "the gradients", mean
            )
            check_state_kept(
                "accumulate_gradients",
                inner_state,
                new_state,
                "optax's states may take the parameters' dtype, and "
                "the mean is float32: wrap inner in master_weights",
            )
            new_updates = outgoing(new_updates, inner_state)
            dtypes[:] = [u.dtype for u in jax.tree.leaves(new_updates)]
            new_updates = jax.tree.map(lambda t, u: jnp.asarray(u, t.dtype), total, new_updates)
            return (
                new_updates,
                new_state,
                *_averages(state, sum(_square_norms(mean, dtype), start=jnp.zeros((), dtype))),
            )

        def wait(total, inner_state):
            return jax.tree.map(jnp.zeros_like, total), inner_state, state.signal, state.noise

        new_updates, inner_state, signal, noise = jax.lax.cond(
            emits, emission, wait, state.total, state.inner_state
        )
        # Both branches of the cond return the same dtypes. Those of the updates are known once it is traced.
        leaves, treedef = jax.tree.flatten(new_updates)
        new_updates = treedef.unflatten([x.astype(d) for x, d in zip(leaves, dtypes, strict=True)])

        count = jnp.where(emits, incremented(state.count), state.count)
        state = state._replace(count=count, inner_state=inner_state, signal=signal, noise=noise)
        return new_updates, _cleared_if(complete, state)

    return transformation("accumulate_gradients", init_fn, update_fn)


def noise_scale(opt_state: OptState) -> Scalar:
    r"""Reads the gradient noise scale, the batch size beyond which larger batches stop paying off.

    Batches well below it need almost no extra samples; batches well above it save almost no steps. It is
    estimated from the micro-batches that `accumulate_gradients` sees anyway. With the mean $\bar g$ of
    an emission, $s = \sum_i w_i |g_i|^2 / \sum_i w_i$, and the effective number of micro-batches n:

    $$
    n = \frac{(\sum_i w_i)^2}{\sum_i w_i^2}, \qquad
    |G|^2 \approx \frac{n |\bar g|^2 - s}{n - 1}, \qquad
    \operatorname{tr} \Sigma \approx \frac{n (s - |\bar g|^2)}{n - 1}, \qquad
    B_{simple} = \operatorname{tr} \Sigma / |G|^2
    $$

    The estimates of $|G|^2$ and $\operatorname{tr} \Sigma$ are unbiased for any weights if all
    micro-batches have the same variance. If small weights mean more variance, as with numbers of samples,
    $|G|^2$ comes out too small. For weights that differ by large factors it may be negative and the
    result NaN; use equal micro-batches then, or similar weights. The result is the ratio of two moving
    averages over about a hundred emissions, weighted by the information in each emission, 1 - 1/n. Emissions
    of a single micro-batch, and those whose estimates overflow, are excluded.

    Args:
        opt_state: A state that contains one `accumulate_gradients`, at any depth.

    Returns:
        $B_{simple}$ in micro-batches, a float scalar, comparable with k; multiply it by the micro-batch
        size for samples. NaN before the first estimate, and if the estimate of $|G|^2$ is not positive,
        which means more noise than k micro-batches can resolve. A scale of hundreds of times k may also come
        out far too low; then only a larger k tells. (With `jax_debug_nans`, inside a jitted
        function, it is the lowest finite number, because such a function cannot return a NaN.)

    Raises:
        ValueError: If there is no such state or more than one.

    Examples:
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
    return nan_unless(signal > 0, noise / jnp.where(signal > 0, signal, 1))


def _is_known_nonfinite(weight: Any) -> bool:
    return np.ndim(weight) == 0 and not isinstance(weight, Tracer) and not np.isfinite(weight)


def _fresh_state(params: Any) -> AccumulateGradientsState:
    """The state before the first micro-batch, without that of the inner transformation."""
    check_inexact("accumulate_gradients", "params", params)
    dtype = scalar_dtype(params)

    return AccumulateGradientsState(
        count=jnp.zeros((), jnp.int32),
        counts=stacked([0, 0, True, 0, 0], jnp.int32),
        inner_state=None,
        total=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=wide_dtype(p)), params),
        sums=jnp.zeros(5, dtype),
    )


def _with_micro_batch(
    state: AccumulateGradientsState,
    g: Any,
    w: jax.Array,
    square: jax.Array,
    used: jax.Array,
    is_dropped: jax.Array,
) -> AccumulateGradientsState:
    """Adds the gradients g of weight w and squared norm `square` to the sums, if they are used."""

    def added(total, new):
        return jnp.where(used, total + new, total)

    return state._replace(
        micro_step=incremented(state.micro_step),
        contributing=state.contributing + used.astype(jnp.int32),
        took_part=used,
        dropped=jnp.where(is_dropped, incremented(state.dropped), state.dropped),
        dropped_in_a_row=jnp.where(is_dropped, incremented(state.dropped_in_a_row), 0),
        total=jax.tree.map(lambda t, x: added(t, scale(x.astype(t.dtype), w)), state.total, g),
        weight=added(state.weight, w),
        weight_sq=added(state.weight_sq, w * w),
        square=added(state.square, w * square),
    )


def _cleared_if(complete: jax.Array, state: AccumulateGradientsState) -> AccumulateGradientsState:
    """Starts a new window if one is complete."""

    def cleared(x):
        return jnp.where(complete, jnp.zeros_like(x), x)

    return state._replace(
        micro_step=cleared(state.micro_step),
        contributing=cleared(state.contributing),
        total=jax.tree.map(cleared, state.total),
        weight=cleared(state.weight),
        weight_sq=cleared(state.weight_sq),
        square=cleared(state.square),
    )


def _averages(state: AccumulateGradientsState, big: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Updates the averages with the estimates of this emission, given big = |mean|^2.

    For Cov(g_i) = Sigma, E[small] = |G|^2 + tr(Sigma) and E[big] = |G|^2 + tr(Sigma) / n. Hence the
    expectation of big - small / n is (1 - 1/n) |G|^2, and that of small - big is (1 - 1/n) tr(Sigma).
    """
    small, share = state.square / state.weight, state.weight_sq / jnp.square(state.weight)  # share = 1 / n
    signal, noise = big - share * small, small - big
    take = (state.contributing > 1) & jnp.isfinite(signal) & jnp.isfinite(noise)

    def average(old, new):
        return jnp.where(take, old + (1 - _NOISE_DECAY) * (new - old), old)

    return average(state.signal, signal), average(state.noise, noise)


def _square_norms(tree: Any, dtype: Any) -> list[jax.Array]:
    """The squared norm of each leaf."""
    return [jnp.sum(x).astype(dtype) for x in jax.tree.leaves(abs_square(tree))]
