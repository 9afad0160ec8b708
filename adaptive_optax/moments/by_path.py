"""A different granularity for each part of a model, chosen by the paths of its leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import optax

from adaptive_optax._core.checks import check_bool
from adaptive_optax._core.paths import check_expressions, check_patterns, first_match, paths_and_leaves
from adaptive_optax._core.trees import PyTree
from adaptive_optax.moments.granularity import Granularity, as_granularity


@dataclasses.dataclass(frozen=True, init=False)
class ByPath(Granularity):
    """Gives each leaf the granularity of the first pattern found in its path.

    Use it when the parts of a model have different structures, for example one value per head in attention
    and one per output neuron in dense layers. `AdamMiniBlocks` does this with a table of roles.

    The leaves of each pattern form a separate tree for its granularity, and so do those that no pattern
    matches: two patterns with `Global()` are two groups. The moment is a tree like the parameters, so a value
    shared by several leaves (`Global`, `Labels`) is repeated at each of them.

    Args:
        patterns: `{pattern: granularity}`. A pattern is a regular expression, searched for (`re.search`) in
            paths such as "encoder/layers/0/kernel". A granularity is a `Granularity`, "coordinate", "tensor"
            or "global".
        default: The granularity of leaves that no pattern matches.
        strict: Whether it is an error at init if a pattern matches no leaf. Leaves hidden by `optax.masked`
            count as leaves. Set it to False for patterns meant for many models.

    Raises:
        ValueError: If `patterns` is not a mapping from regular expressions to granularities, or `default` is
            not a granularity; at init, if `strict` and a pattern matches no leaf.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> params = {"embed": jnp.ones((9, 4)), "dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
        >>> granularity = ao.ByPath({"embed": ao.Axis(-1), "kernel": ao.Axis(-2)}, default="tensor")
        >>> nu = ao.scale_by_adam(granularity=granularity).init(params).nu
        >>> nu["embed"].shape, nu["dense"]["kernel"].shape, nu["dense"]["bias"].shape
        ((9, 1), (1, 3), ())
    """

    items: tuple[tuple[str, Granularity], ...]
    default: Granularity
    strict: bool

    def __init__(
        self,
        patterns: Mapping[str, Granularity | str],
        default: Granularity | str = "coordinate",
        *,
        strict: bool = True,
    ):
        if not isinstance(patterns, Mapping):
            raise ValueError(f"patterns must be a mapping {{pattern: granularity}}, got {patterns!r}.")
        check_expressions("patterns", patterns)
        check_bool("strict", strict)
        items = tuple((p, as_granularity(g, f"The granularity of {p!r}")) for p, g in patterns.items())
        object.__setattr__(self, "items", items)
        object.__setattr__(self, "default", as_granularity(default, "default"))
        object.__setattr__(self, "strict", bool(strict))

    @property
    def is_mean_or_sum(self) -> bool:
        """Whether this is so for all of its granularities."""
        return all(g.is_mean_or_sum for g in (*dict(self.items).values(), self.default))

    def pool(self, squares: PyTree) -> PyTree:
        """Pools each pattern's leaves; returns a tree like `squares`, each leaf in its reduced shape."""
        granularities: dict[str | None, Granularity] = {**dict(self.items), None: self.default}
        if self.strict:
            check_patterns(dict(self.items), squares)
        leaves, treedef = jax.tree.flatten(squares)
        chosen = [first_match(dict(self.items), path) for path, _ in paths_and_leaves(squares)]
        pooled = list(leaves)
        for pattern in dict.fromkeys(chosen):
            places = [i for i, other in enumerate(chosen) if other == pattern]
            hidden = [
                optax.MaskedNode() if other != pattern else x for x, other in zip(leaves, chosen, strict=True)
            ]
            part, granularity = jax.tree.unflatten(treedef, hidden), granularities[pattern]
            # Spreading repeats a group's value at each leaf, in the leaf's own reduced shape.
            spread = granularity.spread(granularity.pool(part), part)
            for i, value in zip(places, jax.tree.leaves(spread), strict=True):
                pooled[i] = value
        return jax.tree.unflatten(treedef, pooled)
