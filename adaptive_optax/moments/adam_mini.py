"""Adam-mini's blocks: groups of a transformer's coordinates for which one second moment is enough.

The blocks of the Hessian follow the structure of the model. The rule is therefore a table that maps parameter
names to roles, and roles to the axes that share a value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from adaptive_optax._core.paths import check_expressions, check_patterns, first_match, paths_and_leaves
from adaptive_optax._core.trees import PyTree
from adaptive_optax.moments.by_path import ByPath
from adaptive_optax.moments.granularity import Axis, Coordinate, Granularity, Tensor


@dataclasses.dataclass(frozen=True)
class _OutputNeuron(Granularity):
    """One value per output neuron, pooled over the input axes; matrices are always (inputs, outputs)."""

    inputs: tuple[int, ...]

    @property
    def is_mean_or_sum(self) -> bool:
        """True."""
        return True

    def pool(self, squares: Any) -> Any:
        axes = self.inputs
        return jax.tree.map(lambda x: Axis(*(axes if x.ndim > 2 else (-2,))).pool(x), squares)


# Axes count from the end, so that layers stacked along a leading axis keep their values apart.
_ROLES: dict[str, Granularity] = {
    "query_key": Axis(-3, -1),  # (features, heads, head_dim): one value per head
    "value": _OutputNeuron((-3,)),  # (features, heads, head_dim)
    "attention_output": _OutputNeuron((-3, -2)),  # (heads, head_dim, features)
    "output_neuron": Axis(-2),  # (inputs, outputs); the outputs of an LM head are tokens
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
"""The roles in Flax's attention, dense and embedding layers, as patterns for `AdamMiniBlocks`."""


@dataclasses.dataclass(frozen=True, init=False)
class AdamMiniBlocks(Granularity):
    """Shares a second moment within each head, output neuron or token of a transformer.

    `adam_mini` is `adamw` with this granularity; it also works in other transformations.

    | role                 | shape in Flax                                | one value per |
    | -------------------- | -------------------------------------------- | ------------- |
    | `"query_key"`        | (features, heads, head_dim)                  | head          |
    | `"value"`            | (features, heads, head_dim)                  | output neuron |
    | `"attention_output"` | (heads, head_dim, features)                  | output neuron |
    | `"output_neuron"`    | (inputs, outputs), e.g. of an MLP or LM head | output neuron |
    | `"token"`            | (tokens, features)                           | token         |
    | `"coordinate"`       | any, e.g. of biases                          | coordinate    |
    | `"tensor"`           | any, e.g. of norms; the default              | leaf          |

    Args:
        params_layout: `{pattern: role}`. A pattern is a regular expression that is searched for in the paths
            of the leaves; the first match wins. A role is one from the table or a `Granularity`. None means
            `FLAX_LAYOUT`: the attention, `Dense` or `Linear`, and `Embed` layers of linen and nnx. The
            patterns of `FLAX_LAYOUT` may match nothing, except those of queries and keys; your own patterns
            must match. Put your own layers first, `{"qkv/kernel$": "output_neuron"} | FLAX_LAYOUT`. Give
            convolutions their own pattern, `{"conv/kernel$": Axis(-2, -3, -4)}`; otherwise they are treated
            as a stack of dense layers.

    Raises:
        ValueError: If `params_layout` is not a mapping from regular expressions to roles; at init, if
            "query_key" is a role but matches no parameter, a pattern outside `FLAX_LAYOUT` matches no
            leaf, or the kernel of a query or key has no axis of heads.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> params = {name: {"kernel": jnp.ones((8, 2, 4))} for name in ("query", "key", "value")}
        >>> nu = ao.scale_by_rms(granularity=ao.AdamMiniBlocks()).init(params).nu
        >>> nu["query"]["kernel"].shape, nu["value"]["kernel"].shape
        ((1, 2, 1), (1, 2, 4))

    Source: Zhang et al. 2024, "Adam-mini: use fewer learning rates to gain more", as in the authors' code
    since version 1.1 (earlier versions had embeddings per coordinate, and values and MLPs per tensor).
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

    @property
    def is_mean_or_sum(self) -> bool:
        """Whether this is so for all granularities in the layout."""
        return all(role.is_mean_or_sum for _, role in self.layout if isinstance(role, Granularity))

    def pool(self, squares: PyTree) -> PyTree:
        """Pools each leaf by its role, to its reduced shape."""
        self._check(squares)
        roles = {p: role if isinstance(role, Granularity) else _ROLES[role] for p, role in self.layout}
        return ByPath(roles, default="tensor", strict=False).pool(squares)

    def _check(self, tree: Any) -> None:
        """Raises unless the patterns fit the tree."""
        layout = dict(self.layout)
        check_patterns([pattern for pattern in layout if pattern not in FLAX_LAYOUT], tree)
        queries = [pattern for pattern, role in self.layout if role == "query_key"]
        places = [path for path, _ in paths_and_leaves(tree, masked=True)]
        if queries and places and not any(first_match(queries, path) for path in places):
            raise ValueError(
                "Adam-mini's layout finds no queries and keys: no leaf matches "
                f"{' or '.join(map(repr, queries))}; the leaves are {', '.join(places)}. Set params_layout= "
                "if your names differ from Flax's."
            )
        for path, leaf in paths_and_leaves(tree):
            if first_match(layout, path) in queries and np.ndim(leaf) < 3:
                raise ValueError(
                    f"Adam-mini's layout: {path!r} has shape {np.shape(leaf)}; the role 'query_key' needs "
                    "(features, heads, head_dim). Set another one in params_layout=, such as 'output_neuron'."
                )
