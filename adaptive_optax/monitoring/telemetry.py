"""Measurements of steps, kept in the state: learning rates, norms, angles, noise.

"Adam lowers the learning rate by itself": telemetry shows whether it does. The structure of the state is
fixed by `init`, so it works in scans, in nnx and in checkpoints. The state holds no NaN, which would trigger
`jax_debug_nans`: undefined values are marked, and read as NaN.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_optax._core.checks import (
    check_choice,
    check_inexact,
    check_integer,
    check_same_tree,
    check_transformation,
)
from adaptive_optax._core.norms import is_safe
from adaptive_optax._core.once_more import has_effects, kept_apart, ordered_after
from adaptive_optax._core.paths import paths_and_leaves
from adaptive_optax._core.precision import (
    abs_square,
    divide,
    incremented,
    inner_product,
    scalar_dtype,
    updated_params,
    widen,
)
from adaptive_optax._core.state_check import Settings, check_state
from adaptive_optax._core.states import one_state_of, states_of, unwrapped
from adaptive_optax._core.transformation import transformation, with_array_state
from adaptive_optax._core.trees import Count, Measured, OptState, PyTree, Scalar
from adaptive_optax._core.undefined import nan_unless
from adaptive_optax.hyperparams import learning_rates
from adaptive_optax.monitoring.adam_statistics import BINS, HISTOGRAM_EDGES, adam_statistics
from adaptive_optax.transforms.match_parameter_dtype import outgoing
from adaptive_optax.transforms.reduce_on_plateau import ReduceOnPlateauState
from adaptive_optax.wrappers.error_control import ErrorControlledState, get_error_control


class Telemetry(NamedTuple):
    r"""The measurement of one step. Values that are undefined, or not measured yet, are NaN.

    With `per="tensor"` all fields except `count` and `learning_rate` have a leading axis, with leaves in the
    order of `jax.tree.leaves`; otherwise they are for the whole tree. Below, g is the gradient,
    $\Delta$ the update and $\theta$ the parameters after it (which a step can measure without
    keeping a copy of the old ones).

    Attributes:
        count: The measured step, counted from 1; 0 before the first.
        learning_rate: The learning rate used, times the scale of any `reduce_on_plateau`; NaN if there are
            several, or none from this library.
        gradient_norm: $\lVert g \rVert$, accurate from 1e-30 to 1e30.
        update_norm: $\lVert \Delta \rVert$, with the same accuracy.
        param_norm: $\lVert \theta \rVert$, with the same accuracy; NaN without `params`.
        effective_learning_rate: $-\langle \Delta, g \rangle / \lVert g \rVert^2$, the learning rate of
            the gradient step closest to $\Delta$; 0 for a gradient of 0.
        update_to_weight: $\text{RMS}(\Delta) / \max(\text{RMS}(\theta), 10^{-3})$; NaN without
            `params`.
        cosine: $-\langle \Delta, g \rangle / (\lVert \Delta \rVert \lVert g \rVert)$, in [-1, 1]: 1
            down the gradient, negative up the gradient; 0 if either is 0.
        snr: The fraction of signal in the gradient's second moment, in [0, 1]: the part of Adam's
            $\hat v = E[g]^2 + \text{Var}[g]$ that is not variance. It does not have the bias of
            $\hat m^2 / \hat v$, which is 0.053 for pure noise at b1 = 0.9. NaN at the first step, and
            if Adam has no first moment (b1 = 0).
        bound_utilisation: The largest magnitude of Adam's direction divided by its tight bound
            (`adam_bound`), in [0, 1] up to rounding; where coordinates share a second moment, it uses the
            root mean square over the group.
        step_limit: The limit of `error_controlled` on the learning rate, as in `ErrorControl`.
        curvature: The curvature that its probes found, in units of 1 / learning rate.
        error: The part of the promised decrease that its last probe did not find, in [-1, 50].
        histogram: The fraction of coordinates whose effective learning rate
            $\alpha / (\sqrt{\hat v} + \epsilon)$ lies between two powers of 2 from $2^{-33}$ to
            128 (`Telemetry.histogram_edges`; rates outside are counted in the first or last bin). In groups
            with their own learning rates, $\alpha$ is that of the group; NaN if there is none, or
            several.

    The three of `error_controlled` are NaN without it, or with several of them; with `per="tensor"` they are
    the same for all tensors. `snr`, `bound_utilisation` and `histogram` are NaN for leaves without
    `scale_by_adam`, and for leaves whose second moment cannot be
    determined from the state alone: shared by `Labels`, or by a custom granularity that does not broadcast
    (also the `snr` of a single tensor under `Global`). They assume Adam's usual form: mean squares, bias
    correction, eps outside the root, constant b1. Low-precision moments are read as the next step will decode
    them. Moments that `ByPath` shares among leaves, with `Global` or `Labels` inside, are treated as each
    leaf's own.
    """

    count: Count
    learning_rate: Scalar
    gradient_norm: Measured
    update_norm: Measured
    param_norm: Measured
    effective_learning_rate: Measured
    update_to_weight: Measured
    cosine: Measured
    snr: Measured
    bound_utilisation: Measured
    step_limit: Measured
    curvature: Measured
    error: Measured
    histogram: jax.Array

    histogram_edges = HISTOGRAM_EDGES  # not a field, because it has no annotation


class TelemetryState(NamedTuple):
    """State of `telemetry`, with few arrays, so that passing it to a step is cheap; `get_telemetry` reads it.

    Attributes:
        count: Number of steps taken.
        inner_state: State of the inner transformation.
        measured: The last measured step.
        rate: The learning rate of that step, negative for none; float32, or float64 if a parameter is.
        values: The fields of `Telemetry` after `learning_rate` along the last axis, followed by the bins of
            the histogram; 0 if a field is undefined.
        defined: Which of these fields are defined, with the histogram last, bools.
    """

    count: Count
    inner_state: OptState
    measured: Count
    rate: Scalar
    values: jax.Array
    defined: jax.Array


_FIELDS = Telemetry._fields[2:]
_SETTINGS: dict[str, Settings] = dict.fromkeys(
    ("values", "defined"), Settings(shape="per=, or for another number of leaves")
)


def telemetry(
    inner: optax.GradientTransformation, *, every: int = 1, per: Literal["tree", "tensor"] = "tree"
) -> optax.GradientTransformationExtraArgs:
    """Measures the steps of a transformation and keeps the last measurement in the state.

    Wrap a whole optimizer in it: it compares the gradient that goes in with the update that comes out.
    Inside `accumulate_gradients` it measures emissions. The updates are those of `inner`.
    A NaN or a huge gradient shows in the measurement of its step, and otherwise has the same effect as on
    `inner`. Read the measurement with `get_telemetry` or collect it with `TelemetryLog`; `Telemetry` explains
    the fields.

    Args:
        inner: The transformation that takes the steps.
        every: Measure every k-th step, starting with the first; k is at least 1. Other steps cost hardly more
            than those of `inner`.
        per: "tree" for one number for the whole tree, "tensor" for one per leaf.

    Returns:
        The transformation. Norms of parameters need `params`.

    Raises:
        ValueError: If an argument is out of range (at construction), a leaf is not floating (at init), or the
            updates' tree differs from the gradients' (at update).

    State cost: the state of `inner`, and about 60 values, or about 60 per leaf with `per="tensor"`.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> tx = ao.telemetry(ao.sgd(0.1))
        >>> params = jnp.array([3.0, 4.0])
        >>> _, state = tx.update(2 * params, tx.init(params), params)
        >>> seen = ao.get_telemetry(state)
        >>> [round(float(x), 3) for x in (seen.gradient_norm, seen.effective_learning_rate, seen.cosine)]
        [10.0, 0.1, 1.0]

    Source: the noise estimate is derived for this library; update-to-weight ratios as in Kosson et al. 2023,
    "Rotational equilibrium".
    """
    check_transformation("inner", inner)
    check_integer("every", every, "[1, inf)")
    check_choice("per", per, ("tree", "tensor"))
    inner = with_array_state(inner)
    per_tensor = per == "tensor"

    def own_init(params):
        check_inexact("telemetry", "params", params)
        shape = (len(jax.tree.leaves(params)),) if per_tensor else ()
        dtype = scalar_dtype(params)
        return TelemetryState(
            count=jnp.zeros((), jnp.int32),
            inner_state=None,
            measured=jnp.zeros((), jnp.int32),
            rate=jnp.full((), -1, dtype),
            values=jnp.zeros((*shape, len(_FIELDS) - 1 + BINS), dtype),
            defined=jnp.zeros((*shape, len(_FIELDS)), jnp.bool_),
        )

    def init_fn(params):
        return own_init(params)._replace(inner_state=inner.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        check_inexact("telemetry", "updates", updates)
        check_state("telemetry", state, own_init, "updates", updates, _SETTINGS)
        count = incremented(state.count)
        dtype = state.values.dtype
        if params is not None:
            check_same_tree("telemetry", "params", params, "the gradients", updates)

        def step(updates, old, params):
            new_updates, inner_state = inner.update(updates, old, params, **extra_args)
            check_same_tree("telemetry", "the updates of inner", new_updates, "the gradients", updates)
            return outgoing(new_updates, inner_state), inner_state

        def measurement(updates, new_updates, after, inner_state):
            seen, defined = measure(updates, new_updates, after, inner_state, dtype, per_tensor=per_tensor)
            fields = [getattr(seen, name) for name in _FIELDS]
            values = jnp.concatenate([jnp.stack(fields[:-1], axis=-1), fields[-1]], axis=-1)
            rate = jnp.where(defined.learning_rate, seen.learning_rate, -1)
            return count, rate, values, jnp.stack([getattr(defined, name) for name in _FIELDS], axis=-1)

        received = updates, state.inner_state, params
        previous = state.measured, state.rate, state.values, state.defined
        is_measured = (count - 1) % every == 0
        if every == 1 or has_effects(step, *received):  # effects may occur once a step
            new_updates, inner_state = step(*received)
            # The caller computes these as well, and XLA merges the two. If the cond read the parameters
            # instead, donated ones would be copied first.
            after = None if params is None else updated_params(params, new_updates)
            results = updates, new_updates, after, inner_state
            last = (
                measurement(*results)
                if every == 1
                else jax.lax.cond(is_measured, lambda: measurement(*results), lambda: previous)
            )
            return new_updates, TelemetryState(count, inner_state, *last)

        def measured():
            updates, old, params = kept_apart(received)
            new_updates, inner_state = step(updates, old, params)
            after = None if params is None else updated_params(params, new_updates)
            return measurement(updates, new_updates, after, inner_state)

        # The step is taken once more to be measured. If it were measured afterwards, every step would have to
        # write its updates to memory and to keep the old parameters.
        last = jax.lax.cond(is_measured, measured, lambda: previous)
        new_updates, inner_state = step(ordered_after(last[0], updates), *received[1:])
        return new_updates, TelemetryState(count, inner_state, *last)

    return transformation("telemetry", init_fn, update_fn)


def get_telemetry(opt_state: OptState) -> Telemetry:
    """Reads the last measurement of `telemetry`.

    Args:
        opt_state: A state that contains one `telemetry`, at any depth; it may be traced, as in a scan that
            returns it for every step.

    Returns:
        The measurement, with NaN for undefined values. (With `jax_debug_nans`, inside a jitted function, it
        is the lowest finite number instead, because such a function cannot return a NaN.
        `TelemetryLog.extend` converts it to NaN.)

    Raises:
        ValueError: If there is none or more than one.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> ao.get_telemetry(ao.telemetry(ao.adam(0.1)).init(jnp.ones(2))).count.item()
        0
    """
    state = last_measurement(opt_state)
    return Telemetry(state.measured, *(nan_unless(*pair) for pair in _defined_and_values(state)))


def last_measurement(opt_state: OptState) -> TelemetryState:
    """Returns the arrays of the last measurement as stored, without the inner state."""
    state = one_state_of(TelemetryState, opt_state, "telemetry")._replace(inner_state=None)
    return TelemetryState(*map(unwrapped, state))


def measurement_on_host(state: TelemetryState) -> Telemetry:
    """Does the same as `get_telemetry`, for NumPy arrays."""
    fields = [np.where(d, x, np.nan).astype(x.dtype) for d, x in _defined_and_values(state)]
    return Telemetry._make([state.measured, *fields])


def _defined_and_values(state: TelemetryState) -> list[tuple[Any, Any]]:
    """For each field after `count`, whether it is defined (in the dimensions of its value), and the value."""
    values = [state.values[..., i] for i in range(len(_FIELDS) - 1)]
    defined = [state.defined[..., i] for i in range(len(_FIELDS) - 1)]
    return [
        (state.rate >= 0, state.rate),
        *zip(defined, values, strict=True),
        (state.defined[..., -1:], state.values[..., -BINS:]),
    ]


def measure(
    g: Any,
    u: Any,
    params: PyTree,
    inner_state: PyTree,
    dtype: Any = jnp.float32,
    *,
    per_tensor: bool = False,
) -> tuple[Telemetry, Telemetry]:
    """Measures one step, except for its count. Returns values, 0 if undefined, and whether they are defined.

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
    is_scaled = len(scales) <= 1  # a single plateau applies to all groups
    adam, adam_defined = adam_statistics(
        [path for path, _ in paths_and_leaves(g)], inner_state, rate_scale, dtype, per_tensor=per_tensor
    )
    controlled = states_of(ErrorControlledState, inner_state)
    is_controlled = len(controlled) == 1
    has_probed = jnp.zeros((), jnp.bool_)
    step_limit = curvature = error = jnp.zeros_like(lengths.cosine)
    if is_controlled:
        found = get_error_control(controlled[0])
        has_probed = found.predicted_decrease > 0
        step_limit, curvature, error = (
            jnp.full_like(lengths.cosine, x) for x in (found.step_limit, found.curvature, found.error)
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
        step_limit=step_limit,
        curvature=curvature,
        error=error,
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
        step_limit=always & is_controlled,
        curvature=always & has_probed,
        error=always & has_probed,
        histogram=adam_defined.histogram & is_scaled,
    )
    return jax.tree.map(_or_zero, values, defined), defined


def _or_zero(value: jax.Array, defined: jax.Array) -> jax.Array:
    return jnp.where(_alongside(defined, value), value, jnp.zeros((), value.dtype))


def _alongside(defined: jax.Array, value: jax.Array) -> jax.Array:
    """`defined` with the dimensions of its value, which may have a bin axis."""
    return jnp.expand_dims(defined, range(defined.ndim, value.ndim))


class _Lengths(NamedTuple):
    """Norms of gradient, step and weights, the cosine of the first two, and the ratio step / gradient."""

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
        """Measures three trees; accurate from 1e-30 to 1e30."""
        trees = gradient, step, weights
        squares = [self._squares(tree) for tree in trees]
        product = self._product(gradient, step)

        def unscaled():
            return self._lengths([jnp.sqrt(s) for s in squares], product, [jnp.ones_like(s) for s in squares])

        def scaled():
            tops = [self._pooled([jnp.max(jnp.abs(x), initial=0) for x in tree], jnp.max) for tree in trees]
            parts = [self._divided(tree, top) for tree, top in zip(trees, tops, strict=True)]
            roots = [jnp.sqrt(self._squares(part)) for part in parts]
            return self._lengths(roots, self._product(parts[0], parts[1]), tops)

        fits = [(self.size == 0) | is_safe(s, jnp.maximum(self.size, 1)) for s in squares]
        return jax.lax.cond(jnp.all(jnp.stack(fits)), unscaled, scaled)

    def _lengths(self, norms: list[jax.Array], product: jax.Array, units: list[jax.Array]) -> _Lengths:
        """Combines norms and the inner product of gradient and step, all in the given units."""
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
        return self._sum([inner_product(x, y) for x, y in zip(tree, other, strict=True)])

    def _divided(self, tree: list[jax.Array], divisor: jax.Array) -> list[jax.Array]:
        divisors = jnp.broadcast_to(jnp.where(divisor > 0, divisor, 1), (len(tree),))
        return [divide(x, d) for x, d in zip(tree, divisors, strict=True)]


def _capped(x: jax.Array, is_finite: jax.Array) -> jax.Array:
    """Keeps a result of finite entries finite, because an infinity would cause a rejection of the step."""
    return jnp.where(is_finite, jnp.minimum(x, jnp.finfo(x.dtype).max), x)
