"""Runtime checks of invariants with chex, for transformations under suspicion."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from adaptive_optax._core.checks import check_same_tree, check_transformation
from adaptive_optax._core.paths import paths_and_leaves
from adaptive_optax._core.precision import abs_square, incremented, wide_dtype
from adaptive_optax._core.states import states_of
from adaptive_optax._core.transformation import transformation, with_array_state
from adaptive_optax.moments.formats import with_values
from adaptive_optax.transforms.direction import Bound, bound_of
from adaptive_optax.transforms.match_parameter_dtype import MatchParameterDtypeState
from adaptive_optax.wrappers.reject_nonfinite import RejectNonfiniteState

# Float32 rounding of a direction that attains its bound.
_SLACK = 1e-5

_HOW_TO_RUN = (
    "verified(...) checks values, which are not available under a plain jax.jit: wrap the outermost jitted "
    "function, step = chex.chexify(jax.jit(step)), and call step.wait_checks() after the last step. The "
    "function must be pure: with nnx, split the model and the optimizer outside and merge them inside it."
)


def verified(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Checks at every step that a transformation keeps its invariants.

    Wrap a transformation in it while you look for the step at which a run goes wrong, and remove it
    afterwards. It returns what `inner` returns. It checks the following, and errors name the path of the
    first leaf that fails:

    * updates have the structure and shapes of the gradients and are float32 or wider;
    * the state keeps its structure, shapes and dtypes;
    * updates are finite, and so is every state element that was finite before;
    * every `count` grows by one, or does not change in a step that `reject_nonfinite` rejects (so wrap the
      transformation inside `optax.MultiSteps`, not around it);
    * if `inner` is `scale_by_adam` or `scale_by_rms` itself, as in
      `optax.chain(verified(scale_by_adam()), ...)`: second moments are not negative, and in every group of
      the granularity the direction's root mean square is within its tight bound (see `adam_bound`) for the
      decays used.

    It works directly in eager mode. Under `jit`, wrap the outermost jitted function in `chex.chexify`:

    ```python
    # linen, or any parameters in a tree
    @chex.chexify
    @jax.jit
    def step(params, opt_state, batch):
        grads = jax.grad(loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    # nnx: split outside, merge inside; chexify(nnx.jit(...)) does not work
    graphdef, state = nnx.split((model, optimizer))

    @chex.chexify
    @jax.jit
    def step(state, batch):
        model, optimizer = nnx.merge(graphdef, state)
        optimizer.update(model, nnx.grad(loss)(model, batch))
        return nnx.state((model, optimizer))

    ...
    step.wait_checks()  # checks run asynchronously: wait for the last ones
    nnx.update((model, optimizer), state)
    ```

    Args:
        inner: Any transformation.

    Returns:
        The transformation, with the state of `inner`.

    Raises:
        AssertionError: If a check fails; under `chexify` at the next call or at `wait_checks()`.
        ValueError: If `inner` is not a transformation.
        RuntimeError: If traced without `chexify`; the message says what to write.

    State cost: none.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> tx = ao.verified(ao.scale_by_adam())
        >>> state = tx.init({"w": jnp.ones(2)})
        >>> try:
        ...     tx.update({"w": jnp.array([1.0, jnp.nan])}, state)
        ... except AssertionError as error:
        ...     print("'w'" in str(error))
        True
    """
    check_transformation("inner", inner)
    bound = bound_of(inner)
    inner = with_array_state(inner)

    def update_fn(updates, state, params=None, **extra_args):
        new_updates, new_state = inner.update(updates, state, params, **extra_args)
        _check_static(updates, new_updates, state, new_state)
        try:
            _check_values(new_updates, state, new_state)
            if bound is not None:
                _check_moments(bound, new_updates, new_state)
        except RuntimeError as error:
            if "chexify" not in str(error):
                raise
            raise RuntimeError(_HOW_TO_RUN) from error
        return new_updates, new_state

    return transformation(None, inner.init, update_fn)


def _require(holds: Any, message: str) -> None:
    """Asserts that a scalar is true; it is concrete or, under chexify, traced."""
    chex.assert_trees_all_equal(jnp.asarray(holds), jnp.asarray(True), custom_message=message)


def _check_static(gradients: Any, updates: Any, state: Any, new_state: Any) -> None:
    try:
        check_same_tree("verified", "the updates", updates, "the gradients", gradients)
        check_same_tree("verified", "the new state", new_state, "the state", state)
    except ValueError as error:
        raise AssertionError(str(error)) from error
    for name, new, old in (("updates", updates, gradients), ("state", new_state, state)):
        if jax.tree.structure(new) != jax.tree.structure(old):
            raise AssertionError(
                f"verified: the {name} changed from {jax.tree.structure(old)} to {jax.tree.structure(new)}."
            )
    matched = states_of(MatchParameterDtypeState, new_state)
    for path, u in paths_and_leaves(updates):
        if u.dtype != wide_dtype(u) and not matched:
            raise AssertionError(f"verified: the update of {path!r} must be float32 or wider, got {u.dtype}.")
    for (path, old), (_, new) in zip(paths_and_leaves(state), paths_and_leaves(new_state), strict=True):
        if old.dtype != new.dtype:
            raise AssertionError(f"verified: the state {path!r} changed from {old.dtype} to {new.dtype}.")


def _check_values(updates: Any, state: Any, new_state: Any) -> None:
    for path, u in paths_and_leaves(updates):
        _require(jnp.all(jnp.isfinite(u)), f"verified: the update of {path!r} is not finite")
    _check_finite(state, new_state)
    for (path, old), (_, new), rejected in zip(
        paths_and_leaves(state), paths_and_leaves(new_state), _rejected(state, new_state), strict=True
    ):
        # A parameter of that name is not an integer.
        if path.split("/")[-1] == "count" and not jnp.issubdtype(new.dtype, jnp.inexact):
            _require(
                new == jnp.where(rejected, old, incremented(old)), f"verified: {path!r} did not grow by one"
            )


def _check_finite(state: Any, new_state: Any) -> None:
    pairs = zip(paths_and_leaves(with_values(state)), jax.tree.leaves(with_values(new_state)), strict=True)
    for (path, old), new in pairs:
        if jnp.issubdtype(new.dtype, jnp.inexact):
            stayed = jnp.isfinite(new) | ~jnp.isfinite(old)
            _require(jnp.all(stayed), f"verified: the state {path!r} is no longer finite")


def _rejected(state: Any, new_state: Any) -> list[Any]:
    """For each leaf of the state, whether a `reject_nonfinite` around it rejected the step."""

    def is_transaction(node):
        return isinstance(node, RejectNonfiniteState)

    result = []
    nodes, new_nodes = (jax.tree.leaves(tree, is_leaf=is_transaction) for tree in (state, new_state))
    for old, new in zip(nodes, new_nodes, strict=True):
        if is_transaction(old):
            outside = new.total != old.total
            result += [outside | inside for inside in _rejected(old.inner_state, new.inner_state)]
            result += [outside] * (len(jax.tree.leaves(old)) - len(jax.tree.leaves(old.inner_state)))
        else:
            result.append(False)
    return result


def _check_moments(bound: Bound, updates: Any, new_state: Any) -> None:
    for name, storage in bound.storages.items():
        moment = bound.granularity.spread(storage.decode(getattr(new_state, name)), updates)
        for path, v in paths_and_leaves(moment):
            _require(jnp.all(v >= 0), f"verified: the second moment {name!r} of {path!r} is negative")
    limit = (bound.max_ratio(new_state) * (1 + _SLACK)) ** 2
    pooled = bound.granularity.pool(abs_square(updates))
    for path, mean_square in paths_and_leaves(bound.granularity.spread(pooled, updates)):
        _require(jnp.all(mean_square <= limit), f"verified: the direction of {path!r} exceeds its bound")
