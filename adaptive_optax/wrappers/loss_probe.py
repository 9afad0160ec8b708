"""A probe: what a step along a direction does to the loss of the batch, beside what its gradient promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_optax._core.paths import paths_and_leaves
from adaptive_optax._core.precision import cast, inner_product, scaled, updated_param, wide_dtype
from adaptive_optax._core.trees import Flag, Scalar

Estimate = Literal["value", "gradient"]
"""What `error_controlled` computes at a probe."""

# A step that promises 8 times the rounding error of the loss shows an error of the slope within an eighth. If
# the gradient is that of the same function, it keeps nearly all of its promise.
_MEASURED, _MOST_UNKEPT = 8.0, 0.5
_SAME_LOSS = 1e-2


def check_loss(value: Any, value_fn: Any) -> None:
    """Raises unless the loss and its function are there."""
    if value is None or value_fn is None:
        raise ValueError(
            "error_controlled needs the loss and its function for the same batch: "
            "update(updates, state, params, value=loss, value_fn=lambda params: loss(params, batch)). "
            "Flax's TrainState does not pass them on; the one of adaptive_optax.integrations.flax does."
        )
    if not callable(value_fn):
        raise ValueError(f"value_fn must be a function of the parameters, got {value_fn!r}.")
    if not _is_real_scalar(value):
        raise ValueError(f"value must be a real scalar, got {value!r}.")


def leaves_like(updates: Any, grad: Any) -> Any:
    """Those leaves of the gradient that `updates` has, which a mask around may hide from it."""
    known, wanted = dict(paths_and_leaves(grad)), paths_and_leaves(updates)
    for path, x in wanted:
        if path not in known or jnp.shape(known[path]) != jnp.shape(x):
            raise ValueError(
                f"grad must be the gradient of value_fn, with a leaf at {path!r} of shape {jnp.shape(x)}."
            )
    return jax.tree.unflatten(jax.tree.structure(updates), [known[path] for path, _ in wanted])


def _is_real_scalar(x: Any) -> bool:
    is_array = isinstance(x, int | float | np.generic | np.ndarray | jax.Array) and not isinstance(x, bool)
    return (
        is_array
        and np.ndim(x) == 0
        and jnp.issubdtype(jnp.result_type(x), jnp.number)
        and not jnp.iscomplexobj(x)
    )


def checked_loss(value_fn: Callable[[Any], Any], params: Any) -> Callable[[Any], jax.Array]:
    """The loss as a function of the parameters, with a reason if they are not all there."""
    nodes = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    is_masked = any(isinstance(node, optax.MaskedNode) for node in nodes)

    def loss(params):
        try:
            value = value_fn(params)
        except Exception as error:
            if not is_masked:
                raise
            raise ValueError(
                "error_controlled: value_fn fails, and a mask around it hides some of the parameters. Put "
                "the mask inside, as in error_controlled(freeze(scale_by_adam(), pattern))."
            ) from error
        if not _is_real_scalar(value):
            raise ValueError(f"value_fn must return a real scalar, got {value!r}.")
        return jnp.asarray(value)

    return loss


class Ray(NamedTuple):
    """The loss f from the parameters along -d, and what its gradient g promises there."""

    params: Any
    g: Any
    d: Any
    f: Callable[[Any], jax.Array]

    def moved(self, h: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
        """The leaves that d moves after a step of h, and the step, as the parameters' dtypes round it.

        It is the rounded step whose loss is known.
        """
        before = self.leaves()
        steps = jax.tree.leaves(scaled(self.d, -h))
        after = [updated_param(p, x) for p, x in zip(before, steps, strict=True)]
        return after, [_difference(p, q) for p, q in zip(before, after, strict=True)]

    def leaves(self) -> list[jax.Array]:
        """The leaves that d moves."""
        known = dict(paths_and_leaves(self.params))
        return [known[path] for path, _ in paths_and_leaves(self.d)]

    def loss(self, leaves: list[jax.Array]) -> jax.Array:
        """The loss where those leaves have other values."""
        known = dict(paths_and_leaves(self.params))
        moved = known | dict(zip([path for path, _ in paths_and_leaves(self.d)], leaves, strict=True))
        return self.f(jax.tree.unflatten(jax.tree.structure(self.params), list(moved.values())))

    def promised(self, step: list[jax.Array], dtype: Any) -> jax.Array:
        """The decrease of the loss that the gradient promises for a step, in units of the step."""
        return _sum_of_products(jax.tree.leaves(self.g), step, dtype)


class Probe(NamedTuple):
    """What a step of a probe does.

    Attributes:
        value: The loss before the step.
        slope: How fast the gradient promises that the loss falls.
        promised: The decrease that it promises for the step, as the parameters' dtypes round it.
        actual: The decrease that is found.
        error: The part of the promise that is not kept.
        resolution: The rounding error of the losses, as a fraction of them.
        is_measured: Whether the decrease is more than rounding.
        is_of_values: Whether the error comes from losses rather than gradients.
    """

    value: Scalar
    slope: Scalar
    promised: Scalar
    actual: Scalar
    error: Scalar
    resolution: float
    is_measured: Flag
    is_of_values: bool


def probe_of(estimate: Estimate, ray: Ray, h: jax.Array, value: Any) -> Probe:
    """Steps by h along the ray, and compares the loss with what its gradient promises."""
    dtype = h.dtype
    after, step = ray.moved(h)
    relative, value = _resolution(ray.leaves(), value), cast(value, dtype)
    slope = _sum_of_products(jax.tree.leaves(ray.g), jax.tree.leaves(ray.d), dtype)
    promised = ray.promised(step, dtype)
    over = jnp.where(promised > 0, promised, 1)
    if estimate == "value":
        actual = value - cast(ray.loss(after), dtype)
        error = (promised - actual) / over
    else:
        final, gradient = jax.value_and_grad(ray.loss)(after)
        actual = value - cast(final, dtype)
        pairs = zip(jax.tree.leaves(ray.g), gradient, strict=True)
        change = [_difference(x, jnp.conj(y)) for x, y in pairs]
        error = _sum_of_products(change, step, dtype) / (2 * over)
    return Probe(value, slope, promised, actual, error, relative, promised > 0, estimate == "value")


def with_noise(probe: Probe, noise: jax.Array, is_found: jax.Array) -> Probe:
    """Says whether the decrease is more than rounding and the noise of the losses, as a fraction of them.

    While the limit is sought it has to be so much more that `check_of` can tell long steps from wrong slopes.
    """
    if not probe.is_of_values:
        return probe
    rounding = jnp.where(is_found, 1, _MEASURED**2) * probe.resolution
    floor = jnp.maximum(rounding, 2 * noise) * jnp.abs(probe.value)
    return probe._replace(is_measured=(probe.promised > floor) | ~(jnp.abs(probe.actual) <= floor))


class Check(NamedTuple):
    """Whether `value`, the gradient and `value_fn` belong together.

    Attributes:
        noise: The difference between `value` and `value_fn(params)`, as a fraction of it.
        unkept: The part of the gradient's promise for a step that a tiny step does not keep. With the
            gradient of `value_fn` it vanishes with the step.
    """

    noise: Scalar
    unkept: Scalar

    @property
    def is_same(self) -> Flag:
        """Whether they do, as far as can be seen."""
        return (self.noise <= _SAME_LOSS) & (self.unkept <= _MOST_UNKEPT)


def check_of(ray: Ray, h: jax.Array, value: Any, probe: Probe) -> Check:
    """Evaluates the loss at the parameters, and for h > 0 also so near them that a long step is no excuse."""
    dtype = h.dtype
    ends = jnp.abs(jnp.stack([probe.value, probe.value - probe.actual]))
    floor = probe.resolution * jnp.max(jnp.where(jnp.isfinite(ends), ends, 0))
    fraction = _MEASURED * floor / jnp.where(probe.promised > 0, probe.promised, 1)
    near = h * jnp.minimum(fraction, 1 / _MEASURED)

    def loss(h):
        # d may not be finite, so a step of 0 is not taken.
        moved = zip(ray.leaves(), ray.moved(h)[0], strict=True)
        return ray.loss([jnp.where(h > 0, q, p) for p, q in moved])

    here, there = jax.lax.map(loss, jnp.stack([jnp.zeros_like(near), near]))  # one program for both
    promised = ray.promised(ray.moved(near)[1], dtype)
    is_measured = (h > 0) & (promised > floor)
    missing = (promised - cast(here - there, dtype)) / jnp.where(is_measured, promised, 1)
    unkept = jnp.where(jnp.isnan(missing), jnp.inf, missing)
    return Check(_difference_of_losses(here, value).astype(dtype), jnp.where(is_measured, unkept, 0))


def _difference_of_losses(found: Any, value: Any) -> jax.Array:
    """The difference of two computations of a loss as a fraction of it; 0 if the known one is not finite."""
    found, value = (jnp.asarray(x, jnp.float32) for x in (found, value))
    difference = jnp.abs(found - value) / jnp.maximum(jnp.abs(value), float(jnp.finfo(jnp.float32).tiny))
    difference = jnp.where(found == value, 0, difference)
    return jnp.where(jnp.isfinite(value), jnp.where(jnp.isnan(difference), jnp.inf, difference), 0)


def _resolution(params: list[Any], value: Any) -> float:
    """The relative rounding error of a loss, from the narrowest dtype of the parameters and the loss."""
    dtypes = [*(x.dtype for x in params), jnp.result_type(value)]
    eps = max((float(jnp.finfo(d).eps) for d in dtypes if jnp.issubdtype(d, jnp.inexact)), default=0.0)
    return 4 * eps if eps > 1e-4 else 32 * eps


def _difference(x: jax.Array, y: jax.Array) -> jax.Array:
    wide = np.promote_types(wide_dtype(x), wide_dtype(y))
    return cast(x, wide) - cast(y, wide)


def _sum_of_products(xs: list[jax.Array], ys: list[jax.Array], dtype: Any) -> jax.Array:
    """The real inner product of two lists of arrays."""
    products = [inner_product(x, y).astype(dtype) for x, y in zip(xs, ys, strict=True)]
    return sum(products, start=jnp.zeros((), dtype))
