"""How every transformation of this library prepares and checks the trees it receives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_optax._core.checks import check_inexact, check_updates, is_inexact
from adaptive_optax._core.foresight import Growth, foresight
from adaptive_optax._core.paths import paths_and_leaves
from adaptive_optax._core.precision import cast, wide_dtype


def transformation(
    owner: str | None,
    init_fn: Callable[..., Any],
    update_fn: Callable[..., Any],
    *,
    all_params: bool = False,
    growth: Growth | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation from functions that see trees of arrays, whatever the caller's trees contain.

    Args:
        owner: The name used in errors. Leaves must be floating or complex, and updates must match the
            parameters if those are given. None leaves the checks to the inner transformation.
        init_fn: A function of the parameters.
        update_fn: A function of the updates, the state, the parameters or None, and extra arguments.
        all_params: Whether `update_fn` also sees parameter leaves that have no updates.
        growth: How large updates and state can become; None if that is not known.

    Returns:
        The transformation.
    """

    def init(params):
        params = as_arrays(params)
        if owner is not None:
            check_inexact(owner, "params", params)
        return init_fn(params)

    def update(updates, state, params=None, **extra_args):
        known = foresight()
        received = updates, state, params
        updates, params = as_arrays(updates), as_arrays(params)
        if owner is not None:
            check_inexact(owner, "updates", updates)
            if params is not None:
                check_updates(owner, updates, params)
                updates = _as_wide_as(params, updates)
        if params is not None and not all_params:
            params = _with_updates(params, updates)
        returned = update_fn(updates, state, params, **extra_args)
        if known is not None and growth is not None:
            known.grow(growth, received, returned)
        return returned

    return optax.GradientTransformationExtraArgs(init, update)


def _with_updates(params: Any, updates: Any) -> Any:
    """Returns only the parameters that have updates; a model's functions, for example, have none.

    The gradients of a filtered Equinox model come with the whole model as `params`.
    """
    if jax.tree.structure(updates) == jax.tree.structure(params):
        return params
    known = dict(paths_and_leaves(params))
    moving = {path for path, leaf in known.items() if is_inexact(leaf)}
    paths = [path for path, _ in paths_and_leaves(updates)]
    if len(moving) == len(known) or set(paths) != moving:
        return params
    return jax.tree.unflatten(jax.tree.structure(updates), [known[path] for path in paths])


def _as_wide_as(params: Any, updates: Any) -> Any:
    """Casts the updates of float64 parameters to float64, because strict promotion forbids mixing dtypes."""
    if not any(is_inexact(x) and jnp.finfo(wide_dtype(x)).bits == 64 for x in jax.tree.leaves(params)):
        return updates
    wide = {path: wide_dtype(x) for path, x in paths_and_leaves(params) if is_inexact(x)}
    leaves, treedef = jax.tree.flatten(updates)
    dtypes = [wide[path] for path, _ in paths_and_leaves(updates)]
    return treedef.unflatten(
        [cast(x, np.promote_types(wide_dtype(x), d)) for x, d in zip(leaves, dtypes, strict=True)]
    )


def as_arrays(tree: Any) -> Any:
    """Converts Python numbers, and objects such as Variables that convert to arrays, to arrays."""
    return jax.tree.map(_as_array, tree)


def _as_array(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array | np.ndarray | np.generic):
        return leaf
    if isinstance(leaf, float | complex):
        return jnp.asarray(leaf, jnp.result_type(leaf))  # an explicit dtype makes it strongly typed
    if hasattr(leaf, "get_value"):  # an nnx Variable in hijax form is a leaf, even while tracing
        return _as_array(leaf.get_value())
    return jnp.asarray(leaf) if hasattr(leaf, "__jax_array__") else leaf


def with_array_state(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation accept extra arguments, and converts Python numbers in its state to arrays."""
    inner = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, **extra_args):
        updates, state = inner.update(updates, state, params, **extra_args)
        return updates, _numbers_as_arrays(state)

    return optax.GradientTransformationExtraArgs(
        lambda params: _numbers_as_arrays(inner.init(params)), update
    )


def with_stable_dtypes(
    inner: optax.GradientTransformationExtraArgs, state: Any, updates: Any, params: Any
) -> Any:
    """Casts a fresh state to the dtypes that a first update with such updates gives it."""
    try:
        _, later = jax.eval_shape(inner.update, updates, state, params)
    except (TypeError, ValueError):  # update needs an extra argument that only its caller has
        return state
    return jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), state, later)


def _numbers_as_arrays(tree: Any) -> Any:
    def leaf(x):
        return jnp.asarray(x, jnp.result_type(x)) if isinstance(x, bool | int | float | complex) else x

    return jax.tree.map(leaf, tree)
