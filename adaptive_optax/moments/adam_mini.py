"""Adam-mini's blocks: the coordinates of a transformer that one second moment is enough for.

The blocks of the Hessian follow the structure of the model, so the rule is a table: from the names of the
parameters to their roles, and from a role to the axes that share a value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from adaptive_optax._paths import check_expressions, check_patterns, first_match, paths_and_leaves
from adaptive_optax.moments.by_path import ByPath
from adaptive_optax.moments.granularity import Axis, Coordinate, Granularity, Tensor


@dataclasses.dataclass(frozen=True)
class _OutputNeuron(Granularity):
    """One value an output neuron, over the axes of the inputs; a matrix is (inputs, outputs) all the same."""

    inputs: tuple[int, ...]

    def pool(self, squares: Any) -> Any:
        axes = self.inputs
        return jax.tree.map(lambda x: Axis(*(axes if x.ndim > 2 else (-2,))).pool(x), squares)


# Axes count from the end, so that layers stacked along a leading axis keep their values apart.
_ROLES: dict[str, Granularity] = {
    "query_key": Axis(-3, -1),  # (features, heads, head_dim): one a head
    "value": _OutputNeuron((-3,)),  # (features, heads, head_dim)
    "attention_output": _OutputNeuron((-3, -2)),  # (heads, head_dim, features)
    "output_neuron": Axis(-2),  # (inputs, outputs); of an LM head the outputs are tokens
    "token": Axis(-1),  # (tokens, features)
    "coordinate": Coordinate(),
    "tensor": Tensor(),
}

FLAX_LAYOUT: Mapping[str, Granularity | str] = MappingProxyType(
    {
        "(^|/)bias$": "coordinate",
        "embedding$": "token",
        "(^|/)(query|key)/kernel$": "query_key",
        "(^|/)value/kernel$": "value",
        "(^|/)out/kernel$": "attention_output",
        "(^|/)kernel$": "output_neuron",
    }
)


@dataclasses.dataclass(frozen=True, init=False)
class AdamMiniBlocks(Granularity):
    """Shares a second moment within a head, an output neuron or a token of a transformer.

    `adam_mini` is `adamw` with this granularity; use it alone in another transform.

    ====================  ==============================================  ===================
    role                  Flax's shape                                    one value for each
    ====================  ==============================================  ===================
    `"query_key"`         (features, heads, head_dim)                     head
    `"value"`             (features, heads, head_dim)                     output neuron
    `"attention_output"`  (heads, head_dim, features)                     output neuron
    `"output_neuron"`     (inputs, outputs), as of an MLP or an LM head   output neuron
    `"token"`             (tokens, features)                              token
    `"coordinate"`        any, as of biases                               coordinate
    `"tensor"`            any, as of norms; also where no pattern fits    leaf
    ====================  ==============================================  ===================

    Args:
        params_layout: `{pattern: role}`. A pattern is a regular expression, searched for in the paths of the
            leaves; the first that is found wins. A role is one of the table or a `Granularity`. None is
            `FLAX_LAYOUT`: the attention, `Dense` or `Linear`, and `Embed` of linen and nnx. Its patterns may
            match nothing but for queries and keys; others may not. A layer of one's own stands first,
            `{"qkv/kernel$": "output_neuron"} | FLAX_LAYOUT`; a convolution would be a stack of dense layers
            without its own, `{"conv/kernel$": Axis(-2, -3, -4)}`.

    Raises:
        ValueError: If `params_layout` is no mapping from regular expressions to roles; at init, if
            "query_key" is in the layout and not in the parameters, a pattern outside `FLAX_LAYOUT` matches no
            leaf, or a query's or key's kernel has no axis of heads.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> params = {name: {"kernel": jnp.ones((8, 2, 4))} for name in ("query", "key", "value")}
        >>> nu = ao.scale_by_rms(granularity=ao.AdamMiniBlocks()).init(params).nu
        >>> nu["query"]["kernel"].shape, nu["value"]["kernel"].shape
        ((1, 2, 1), (1, 2, 4))

    Source: Zhang et al. 2024, "Adam-mini: use fewer learning rates to gain more", as in its
    authors' code from version 1.1 on (before, embeddings were per coordinate and V, MLP per tensor).
    """

    layout: tuple[tuple[str, Granularity | str], ...]

    def __init__(self, params_layout: Mapping[str, Granularity | str] | None = None):
        layout = FLAX_LAYOUT if params_layout is None else params_layout
        if not isinstance(layout, Mapping):
            raise ValueError(f"params_layout must be a mapping {{pattern: role}}, got {layout!r}.")
        check_expressions("The patterns of params_layout", layout)
        for pattern, role in layout.items():
            if not isinstance(role, Granularity) and not (isinstance(role, str) and role in _ROLES):
                raise ValueError(
                    f"The role of {pattern!r} in params_layout must be a granularity or one of "
                    f"{', '.join(map(repr, _ROLES))}, got {role!r}."
                )
        object.__setattr__(self, "layout", tuple(layout.items()))

    per_leaf = True

    def pool(self, squares: Any) -> Any:
        """Pools the leaves by their roles, each in its reduced shape."""
        self._check(squares)
        roles = {p: role if isinstance(role, Granularity) else _ROLES[role] for p, role in self.layout}
        return ByPath(roles, default="tensor", strict=False).pool(squares)

    def _check(self, tree: Any) -> None:
        """Refuses a tree in which the layout does not find what it is made for."""
        layout = dict(self.layout)
        check_patterns([pattern for pattern in layout if pattern not in FLAX_LAYOUT], tree)
        queries = [pattern for pattern, role in self.layout if role == "query_key"]
        places = [path for path, _ in paths_and_leaves(tree, masked=True)]
        if queries and places and not any(first_match(queries, path) for path in places):
            raise ValueError(
                "Adam-mini's layout finds no queries and keys: no leaf matches "
                f"{' or '.join(map(repr, queries))}; the leaves are {', '.join(places)}. Give params_layout= "
                "for other names than Flax's."
            )
        for path, leaf in paths_and_leaves(tree):
            if first_match(layout, path) in queries and np.ndim(leaf) < 3:
                raise ValueError(
                    f"Adam-mini's layout: {path!r} has shape {np.shape(leaf)}; the role 'query_key' needs "
                    "(features, heads, head_dim). Give it another in params_layout=, such as 'output_neuron'."
                )
