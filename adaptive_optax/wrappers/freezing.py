"""Frozen parameters: no update, no state, and no influence on the updates of the others."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_optax._core.checks import check_same_tree, check_transformation, is_inexact
from adaptive_optax._core.described import described, description_of
from adaptive_optax._core.paths import check_expressions, check_patterns, masked_leaves, paths_and_leaves
from adaptive_optax._core.precision import wide_dtype
from adaptive_optax._core.state_check import check_state
from adaptive_optax._core.transformation import transformation, with_array_state
from adaptive_optax._core.trees import Mask, OptState, is_mask
from adaptive_optax.wrappers.partition import Groups

# Labels for `describe_partition`; the labels of patterns are strings.
_FROZEN, _TRAINED = 0, 1


class FreezeState(NamedTuple):
    """State of `freeze`.

    Attributes:
        inner_state: State of the inner transformation, with `optax.MaskedNode` in place of frozen leaves, as
            in `optax.masked`.
    """

    inner_state: OptState


def freeze(
    tx: optax.GradientTransformation, pattern_or_mask: str | Mask
) -> optax.GradientTransformationExtraArgs:
    """Freezes some parameters, and hides their gradients from the optimizer of the others.

    Use it for fine-tuning, and wrap the whole optimizer in it: clipping, weight decay, `reject_nonfinite`,
    `telemetry` and `accumulate_gradients` all go inside. Frozen leaves then have zero updates and no state,
    and their gradients, even a NaN, never affect the other leaves. `optax.set_to_zero` for a group of
    `partition_by_path` or `optax.partition` also gives zero updates, but earlier links of the chain, such as
    clipping, have already counted the frozen gradients.

    A NaN in another leaf's gradient has the same effect as on `tx`.

    Gradients of frozen leaves need not be computed: they may be None, absent, float0, or of any dtype, and so
    may the frozen leaves themselves. To unfreeze, build the optimizer with another pattern (or without
    `freeze`) and transfer the moments of the others.

    Args:
        tx: The optimizer of the other leaves.
        pattern_or_mask: Which leaves to freeze. A regular expression that is searched for in their paths
            ("^encoder/", as in `partition_by_path`); a tree of bools like the parameters or a prefix of it,
            True for frozen; or a function from the parameters to such a tree.

    Returns:
        The transformation. The updates of frozen leaves are zeros, in float32 or wider; for integer leaves
        they have the leaf's dtype, and for leaves that are not arrays they are None. Without `params`,
        `update` knows only the gradient of a frozen leaf, and returns None for None.

    Raises:
        ValueError: If `tx` is not a transformation or `pattern_or_mask` is none of the above (at
            construction); if the pattern matches no leaf or the mask does not fit the parameters (at init);
            if a leaf that is not frozen has no gradient (at update). A mask may freeze all leaves, or none.

    State cost: the state of `tx` for the leaves that are not frozen.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp, optax
        >>> tx = ao.freeze(optax.chain(ao.clip_by_global_norm(1.0), ao.sgd(0.1)), "^body")
        >>> params = {"body": jnp.ones(2), "head": jnp.ones(2)}
        >>> gradients = {"body": jnp.full(2, jnp.nan), "head": jnp.array([0.6, 0.8])}
        >>> updates, state = tx.update(gradients, tx.init(params), params)
        >>> updates["body"].tolist(), [round(float(u), 3) for u in updates["head"]]
        ([0.0, 0.0], [-0.06, -0.08])
    """
    check_transformation("tx", tx)
    if isinstance(pattern_or_mask, str):
        check_expressions("pattern_or_mask", [pattern_or_mask], "a regular expression, a mask or a function")
    elif not (callable(pattern_or_mask) or is_mask(pattern_or_mask)):
        raise ValueError(
            "pattern_or_mask must be a regular expression, a tree of bools or a function from the parameters "
            f"to one, got {pattern_or_mask!r}."
        )
    frozen = _Frozen(pattern_or_mask, description_of(Groups, tx))
    inner = with_array_state(tx)

    def init_fn(params):
        if isinstance(pattern_or_mask, str):
            check_patterns([pattern_or_mask], params)
        return FreezeState(inner.init(_hidden(params, frozen.paths(params))))

    def update_fn(updates, state, params=None, **extra_args):
        check_state("freeze", state, _own_init, "updates", ())
        gradients = dict(paths_and_leaves(updates))
        if params is not None:
            params = _without_idle_leaves(params, frozen.paths(params), gradients)
        leaves = gradients if params is None else dict(paths_and_leaves(params))
        paths = frozen.paths(updates if params is None else params)
        if missing := leaves.keys() - gradients.keys() - paths:
            raise ValueError(
                f"freeze: the leaf {min(missing)!r} of params is not frozen and has no gradient."
            )
        # The gradients may lack frozen leaves; then the updates are a tree like the parameters.
        like = updates if leaves.keys() <= gradients.keys() else params
        shown = _hidden(like, paths, gradients)
        shown_params = None if params is None else _hidden(params, paths)
        new_updates, inner_state = inner.update(shown, state.inner_state, shown_params, **extra_args)
        check_same_tree("freeze", "the updates of tx", new_updates, "the gradients", shown)
        trained = iter(jax.tree.leaves(new_updates))
        all_updates = [
            _zeros(leaves.get(path)) if path in paths else next(trained) for path, _ in paths_and_leaves(like)
        ]
        return jax.tree.unflatten(jax.tree.structure(like), all_updates), FreezeState(inner_state)

    return described(transformation(None, init_fn, update_fn, all_params=True), frozen)


def _own_init(params: Any) -> FreezeState:
    del params
    return FreezeState(None)


def _without_idle_leaves(params: Any, frozen: set[str], gradients: dict[str, Any]) -> Any:
    """The parameters, with None for leaves that have no gradient and cannot be frozen: functions, counters.

    Such leaves occur if `params` is a whole model and the gradients are those of a filtered one.
    """

    def is_idle(path, leaf):
        return path not in gradients and not (is_inexact(leaf) or (path in frozen and _is_number(leaf)))

    leaves = [None if is_idle(path, leaf) else leaf for path, leaf in paths_and_leaves(params)]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex)


def _hidden(tree: Any, frozen: set[str], values: dict[str, Any] | None = None) -> Any:
    """The tree with frozen leaves hidden as in `optax.masked`, and the others from `values` if given."""
    leaves = [
        optax.MaskedNode() if path in frozen else leaf if values is None else values[path]
        for path, leaf in paths_and_leaves(tree)
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _zeros(leaf: Any) -> Any:
    """The update of a frozen leaf, given its parameter or, if that is missing, its gradient."""
    if not _is_number(leaf):
        return None
    dtype = jnp.result_type(leaf)
    if dtype == jax.dtypes.float0:  # it cannot be added to the integer whose gradient it is
        return jnp.zeros(np.shape(leaf), bool)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return jnp.zeros_like(leaf)
    return jnp.zeros_like(leaf, dtype=wide_dtype(leaf))


@dataclasses.dataclass(frozen=True)
class _Frozen(Groups):
    """Which leaves are frozen, and the groups of the others.

    Attributes:
        which: A regular expression or a mask.
        others: The groups of the inner transformation, if it has any.
    """

    which: Any
    others: Groups | None

    def paths(self, tree: Any) -> set[str]:
        """The paths of the frozen leaves."""
        paths = [path for path, _ in paths_and_leaves(tree)]
        if isinstance(self.which, str):
            return {path for path in paths if re.search(self.which, path)}
        return {path for path, frozen in zip(paths, masked_leaves(self.which, tree), strict=True) if frozen}

    @property
    def names(self) -> dict[Hashable, str]:
        names: dict[Hashable, str] = {_FROZEN: "(frozen)"}
        return names | ({_TRAINED: "(trained)"} if self.others is None else self.others.names)

    def of(self, tree: Any) -> list[Hashable]:
        frozen = self.paths(tree)
        trained = _hidden(tree, frozen)
        every: list[Hashable] = [_TRAINED] * len(jax.tree.leaves(trained))
        labels = iter(every if self.others is None else self.others.of(trained))
        return [_FROZEN if path in frozen else next(labels) for path, _ in paths_and_leaves(tree)]
