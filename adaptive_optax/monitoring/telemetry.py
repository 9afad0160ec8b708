"""What a step did, kept in the state: rates, norms, angles, noise.

"Adam lowers the learning rate by itself": here one sees whether it does. The structure of the state is fixed
from `init` on, so it lives in scans, in nnx and in checkpoints, and it holds no NaN, at which
`jax_debug_nans` would stop: what is not defined is marked, and read as NaN.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_optax._checks import (
    check_choice,
    check_inexact,
    check_integer,
    check_same_tree,
    check_state,
    check_transformation,
)
from adaptive_optax._paths import paths_and_leaves
from adaptive_optax._precision import abs_square, divide, incremented, moved, scalar_dtype, widen
from adaptive_optax._states import one_state_of, states_of, unwrapped
from adaptive_optax.control.adam_statistics import BINS, HISTOGRAM_EDGES, adam_statistics
from adaptive_optax.control.hyperparams import learning_rates
from adaptive_optax.control.plateau import ReduceOnPlateauState


class Telemetry(NamedTuple):
    r"""What one step did. NaN where a value is not defined, and before the first measurement.

    With `per="tensor"` all but `count` and `learning_rate` have a leading axis, the leaves in the order of
    `jax.tree.leaves`; otherwise they are of the whole tree. With g the gradient, :math:`\Delta` the update
    and :math:`\theta` the parameters after it (which a step can measure without keeping a copy of those
    before):

    Attributes:
        count: The step that was measured, counted from 1, int32 scalar; 0 before the first.
        learning_rate: The learning rate used, times the scale of a `reduce_on_plateau`; NaN where there are
            several, or none that is this library's.
        gradient_norm: :math:`\lVert g \rVert`, right from 1e-30 to 1e30.
        update_norm: :math:`\lVert \Delta \rVert`, likewise.
        param_norm: :math:`\lVert \theta \rVert`, likewise; NaN without `params`.
        effective_learning_rate: :math:`-\langle \Delta, g \rangle / \lVert g \rVert^2`, the rate of the
            gradient step that comes nearest to :math:`\Delta`; 0 for a gradient of 0.
        update_to_weight: :math:`\text{RMS}(\Delta) / \max(\text{RMS}(\theta), 10^{-3})`; NaN without
            `params`.
        cosine: :math:`-\langle \Delta, g \rangle / (\lVert \Delta \rVert \lVert g \rVert)`, in [-1, 1]: 1
            down the gradient, below 0 up it; 0 where either is 0.
        snr: The share of signal in the gradient's second moment, in [0, 1]: of Adam's
            :math:`\hat v = E[g]^2 + \text{Var}[g]` what is not variance, without the bias of
            :math:`\hat m^2 / \hat v`, which reads 0.053 on pure noise at b1 = 0.9. NaN at the first step,
            and where Adam has no first moment (b1 = 0).
        bound_utilisation: Adam's direction over its tight bound (`adam_bound`) where it is longest, in
            [0, 1] but for rounding; of the root mean square in a group where coordinates share a second
            moment.
        histogram: The share of coordinates whose effective learning rate
            :math:`\alpha / (\sqrt{\hat v} + \epsilon)` lies between two powers of 2 from :math:`2^{-33}` to
            128 (`Telemetry.histogram_edges`; those beyond are in the first or the last bin). In groups with
            rates of their own the rate is that of the group; NaN where there is none, or several.

    The last three are NaN for leaves that no `scale_by_adam` moves or whose second moment is shared by
    `Labels` (`snr` of a single tensor also if it is shared by `Global`). They take Adam's usual form:
    mean squares, bias correction, eps beside the root, constant b1. Moments in low precision are taken as
    they are stored, so that `bound_utilisation` of `Int8` can be a quarter off. What `ByPath` shares among
    leaves, by `Global` or `Labels` in it, is taken for each leaf's own.
    """

    count: jax.Array
    learning_rate: jax.Array
    gradient_norm: jax.Array
    update_norm: jax.Array
    param_norm: jax.Array
    effective_learning_rate: jax.Array
    update_to_weight: jax.Array
    cosine: jax.Array
    snr: jax.Array
    bound_utilisation: jax.Array
    histogram: jax.Array

    histogram_edges = HISTOGRAM_EDGES  # not a field: it has no annotation


class TelemetryState(NamedTuple):
    """State of `telemetry`, few arrays so that a step has few to hand over; `get_telemetry` reads it.

    Attributes:
        count: Number of steps taken, int32 scalar.
        inner_state: The inner transformation's.
        measured: The step that was measured last, int32 scalar.
        learning_rate: The learning rate of that step, negative for none; float32, or float64 if a parameter
            is.
        values: The fields of `Telemetry` after it on the last axis, then the bins of the histogram; 0 where a
            field is not defined.
        defined: Which of these fields are defined, the histogram last, bools.
    """

    count: jax.Array
    inner_state: Any
    measured: jax.Array
    learning_rate: jax.Array
    values: jax.Array
    defined: jax.Array


_FIELDS = Telemetry._fields[2:]


def telemetry(
    inner: optax.GradientTransformation, *, every: int = 1, per: Literal["tree", "tensor"] = "tree"
) -> optax.GradientTransformationExtraArgs:
    """Measures what the steps of a transformation do, and keeps the last measurement in the state.

    Wrap a whole optimizer in it: the gradient that it is given and the update that it returns are compared.
    Inside `accumulate_gradients` it measures emissions. The updates are those of `inner`, float32 at least.
    Read it with `get_telemetry`, collect it with `TelemetryLog`; the fields are explained in `Telemetry`.

    Args:
        inner: The transformation that takes the steps.
        every: The first and then every k-th step is measured, at least 1. The others cost little: the update,
            which XLA would fuse away, is written to memory.
        per: "tree" for one number for everything, "tensor" for one a leaf.

    Returns:
        The transformation. Norms of parameters need `params`; extra arguments go to `inner`.

    Raises:
        ValueError: If an argument is out of range (at construction), a leaf is not floating (at init) or the
            updates' tree is not that of the gradients (at update).

    State cost: that of `inner`, and some 60 values, with `per="tensor"` as many a leaf.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> tx = ao.telemetry(ao.sgd(0.1))
        >>> params = jnp.array([3.0, 4.0])
        >>> _, state = tx.update(2 * params, tx.init(params), params)
        >>> seen = ao.get_telemetry(state)
        >>> [round(float(x), 3) for x in (seen.gradient_norm, seen.effective_learning_rate, seen.cosine)]
        [10.0, 0.1, 1.0]

    Source: the estimate of the noise is derived for this library; update-to-weight ratios as in Kosson et
    al. 2023, "Rotational equilibrium".
    """
    check_transformation("inner", inner)
    check_integer("every", every, "[1, inf)")
    check_choice("per", per, ("tree", "tensor"))
    inner = optax.with_extra_args_support(inner)
    per_tensor = per == "tensor"

    def init_fn(params):
        check_inexact("telemetry", "params", params)
        shape = (len(jax.tree.leaves(params)),) if per_tensor else ()
        dtype = scalar_dtype(params)
        return TelemetryState(
            count=jnp.zeros((), jnp.int32),
            inner_state=inner.init(params),
            measured=jnp.zeros((), jnp.int32),
            learning_rate=jnp.full((), -1, dtype),
            values=jnp.zeros((*shape, len(_FIELDS) - 1 + BINS), dtype),
            defined=jnp.zeros((*shape, len(_FIELDS)), jnp.bool_),
        )

    def update_fn(updates, state, params=None, **extra_args):
        check_state("telemetry", state, TelemetryState)
        check_inexact("telemetry", "updates", updates)
        count, leaves = incremented(state.count), len(jax.tree.leaves(updates))
        if per_tensor and leaves != len(state.values):
            raise ValueError(
                f"telemetry: the updates have {leaves} leaves, those at init had {len(state.values)}."
            )
        new_updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        check_same_tree("telemetry", "the updates of inner", new_updates, "the gradients", updates)
        new_updates = widen(new_updates)
        dtype = state.values.dtype
        after = None
        if params is not None:
            check_same_tree("telemetry", "params", params, "the gradients", updates)
            # The caller computes them too, and XLA once. A conditional that reads `params` has them copied
            # first, where they are donated.
            pairs = zip(jax.tree.leaves(params), jax.tree.leaves(new_updates), strict=True)
            after = [moved(jnp.asarray(p), u) for p, u in pairs]

        def look():
            seen, defined = measure(updates, new_updates, after, inner_state, dtype, per_tensor=per_tensor)
            fields = [getattr(seen, name) for name in _FIELDS]
            values = jnp.concatenate([jnp.stack(fields[:-1], axis=-1), fields[-1]], axis=-1)
            rate = jnp.where(defined.learning_rate, seen.learning_rate, -1)
            return count, rate, values, jnp.stack([getattr(defined, name) for name in _FIELDS], axis=-1)

        if every == 1:
            last = look()
        else:
            kept = state.measured, state.learning_rate, state.values, state.defined
            last = jax.lax.cond((count - 1) % every == 0, look, lambda: kept)
        return new_updates, TelemetryState(count, inner_state, *last)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def get_telemetry(opt_state: Any) -> Telemetry:
    """Reads the last measurement of `telemetry`.

    Args:
        opt_state: A state with one `telemetry` in it, at any depth; it may be traced, as in a scan that
            returns it for every step.

    Returns:
        The measurement, NaN where it is not defined.

    Raises:
        ValueError: If there is none, or more than one.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> ao.get_telemetry(ao.telemetry(ao.adam(0.1)).init(jnp.ones(2))).count.item()
        0
    """
    state = one_state_of(TelemetryState, opt_state, "telemetry")._replace(inner_state=None)
    state = TelemetryState(*map(unwrapped, state))
    fields = [state.values[..., i] for i in range(len(_FIELDS) - 1)] + [state.values[..., -BINS:]]
    seen = Telemetry(state.measured, state.learning_rate, *fields)
    defined = [state.defined[..., i] for i in range(len(_FIELDS))]
    return with_nan(seen, Telemetry(jnp.ones((), jnp.bool_), state.learning_rate >= 0, *defined))


def with_nan(seen: Telemetry, defined: Telemetry) -> Telemetry:
    """Returns a measurement with NaN where it is not defined."""
    marked = (_where(d, x, np.nan) for x, d in zip(seen[1:], defined[1:], strict=True))
    return Telemetry(seen.count, *marked)


def _where(defined: jax.Array, value: jax.Array, otherwise: float) -> jax.Array:
    defined = jnp.expand_dims(defined, range(defined.ndim, value.ndim))
    return jnp.where(defined, value, jnp.asarray(otherwise, value.dtype))


def measure(
    g: Any,
    u: Any,
    params: Any,
    inner_state: Any,
    dtype: Any = jnp.float32,
    *,
    per_tensor: bool = False,
) -> tuple[Telemetry, Telemetry]:
    """Measures one step, its count aside; gives 0 where a value is not defined, and what is.

    Args:
        g: The gradients.
        u: The updates, a tree like the gradients.
        params: The parameters after the step, or None.
        inner_state: The optimizer's state after the step.
        dtype: The dtype of the values.
        per_tensor: Whether to measure each leaf.
    """
    space = _Space(jax.tree.leaves(g), dtype, per_tensor)
    gradient, step = jax.tree.leaves(widen(g)), jax.tree.leaves(widen(u))
    has_params = params is not None
    weights = jax.tree.leaves(widen(params)) if has_params else step
    lengths = space.lengths(gradient, step, weights)
    root = jnp.sqrt(jnp.maximum(space.size, 1))
    rates, scales = learning_rates(inner_state), states_of(ReduceOnPlateauState, inner_state)
    rate_scale = math.prod((state.scale.astype(dtype) for state in scales), start=jnp.ones((), dtype))
    is_scaled = len(scales) <= 1  # one plateau is that of all groups
    adam, adam_defined = adam_statistics(
        [path for path, _ in paths_and_leaves(g)], inner_state, rate_scale, dtype, per_tensor=per_tensor
    )
    values = Telemetry(
        count=jnp.zeros((), jnp.int32),
        learning_rate=rates[0].astype(dtype) * rate_scale if rates else jnp.zeros((), dtype),
        gradient_norm=lengths.gradient,
        update_norm=lengths.step,
        param_norm=lengths.weights,
        effective_learning_rate=-lengths.cosine * lengths.ratio,
        update_to_weight=_capped(
            (lengths.step / root) / jnp.maximum(lengths.weights / root, 1e-3), jnp.isfinite(lengths.step)
        ),
        cosine=-lengths.cosine,
        snr=adam.snr,
        bound_utilisation=adam.bound_utilisation,
        histogram=adam.histogram,
    )
    always = jnp.ones_like(lengths.cosine, jnp.bool_)
    defined = Telemetry(
        count=jnp.ones((), jnp.bool_),
        learning_rate=jnp.asarray(len(rates) == 1 and is_scaled),
        gradient_norm=always,
        update_norm=always,
        param_norm=always & has_params,
        effective_learning_rate=always,
        update_to_weight=always & has_params,
        cosine=always,
        snr=adam_defined.snr,
        bound_utilisation=adam_defined.bound_utilisation,
        histogram=adam_defined.histogram & is_scaled,
    )
    return jax.tree.map(lambda x, d: _where(d, x, 0), values, defined), defined


class _Lengths(NamedTuple):
    """Norms of gradient, step and weights; the cosine between the first two and the ratio step / gradient."""

    gradient: jax.Array
    step: jax.Array
    weights: jax.Array
    cosine: jax.Array
    ratio: jax.Array


class _Space:
    """Geometry of trees, as one vector or leaf by leaf.

    Attributes:
        size: The number of entries, float.
    """

    def __init__(self, like: list[jax.Array], dtype: Any, per_tensor: bool):
        self.dtype, self.per_tensor = dtype, per_tensor
        self.size = self._sum([float(x.size) for x in like])

    def lengths(self, gradient: list[Any], step: list[Any], weights: list[Any]) -> _Lengths:
        """Measures three trees; right from 1e-30 to 1e30."""
        trees = gradient, step, weights
        squares = [self._squares(tree) for tree in trees]
        product = self._product(gradient, step)

        def plainly():
            return self._lengths([jnp.sqrt(s) for s in squares], product, [jnp.ones_like(s) for s in squares])

        def scaled():
            tops = [self._pooled([jnp.max(jnp.abs(x), initial=0) for x in tree], jnp.max) for tree in trees]
            parts = [self._divided(tree, top) for tree, top in zip(trees, tops, strict=True)]
            roots = [jnp.sqrt(self._squares(part)) for part in parts]
            return self._lengths(roots, self._product(parts[0], parts[1]), tops)

        # As in `global_norm`: below the lowest sum, squares that were flushed to 0 could matter.
        limits = jnp.finfo(self.dtype)
        lowest = float(limits.tiny) / float(limits.eps) * jnp.maximum(self.size, 1)
        fits = [(self.size == 0) | ((s >= lowest) & (s < jnp.inf)) for s in squares]
        return jax.lax.cond(jnp.all(jnp.stack(fits)), plainly, scaled)

    def _lengths(self, norms: list[jax.Array], product: jax.Array, units: list[jax.Array]) -> _Lengths:
        """Puts together norms and the inner product of gradient and step, measured in these units."""
        area = norms[0] * norms[1]
        cosine = jnp.where(area == 0, 0, product / jnp.where(area == 0, 1, area))
        is_zero = (norms[0] == 0) | (units[0] == 0)
        ratio = norms[1] / jnp.where(is_zero, 1, norms[0]) * (units[1] / jnp.where(is_zero, 1, units[0]))
        finite = [jnp.isfinite(unit) & jnp.isfinite(norm) for unit, norm in zip(units, norms, strict=True)]
        products = (norm * unit for norm, unit in zip(norms, units, strict=True))
        return _Lengths(
            *(_capped(x, is_finite) for x, is_finite in zip(products, finite, strict=True)),
            cosine=jnp.clip(cosine, -1, 1),
            ratio=jnp.where(is_zero, 0, _capped(ratio, finite[0] & finite[1])),
        )

    def _pooled(self, values: list[Any], of: Any) -> jax.Array:
        if not values:
            return jnp.zeros((0,) if self.per_tensor else (), self.dtype)
        stacked = jnp.stack([jnp.asarray(x, self.dtype) for x in values])
        return stacked if self.per_tensor else of(stacked)

    def _sum(self, values: list[Any]) -> jax.Array:
        return self._pooled(values, jnp.sum)

    def _squares(self, tree: list[jax.Array]) -> jax.Array:
        return self._sum([jnp.sum(x) for x in abs_square(tree)])

    def _product(self, tree: list[jax.Array], other: list[jax.Array]) -> jax.Array:
        return self._sum([_inner(x, y) for x, y in zip(tree, other, strict=True)])

    def _divided(self, tree: list[jax.Array], divisor: jax.Array) -> list[jax.Array]:
        divisors = jnp.broadcast_to(jnp.where(divisor > 0, divisor, 1), (len(tree),))
        return [divide(x, d) for x, d in zip(tree, divisors, strict=True)]


def _capped(x: jax.Array, is_finite: jax.Array) -> jax.Array:
    """Keeps what finite entries give finite: a step would be rejected for it."""
    return jnp.where(is_finite, jnp.minimum(x, jnp.finfo(x.dtype).max), x)


def _inner(x: jax.Array, y: jax.Array) -> jax.Array:
    dtype = np.promote_types(x.dtype, y.dtype)
    x, y = x.astype(dtype), y.astype(dtype)
    return jnp.sum(x.real * y.real + x.imag * y.imag) if jnp.iscomplexobj(x) else jnp.sum(x * y)
