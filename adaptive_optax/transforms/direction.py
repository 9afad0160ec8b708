"""What the adaptive transformations share: a direction whose length the second moment bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from adaptive_optax.moments.granularity import Granularity
from adaptive_optax.moments.storage import Storage


class Bound(NamedTuple):
    """The invariant of a direction u: pool(|u|^2) <= max_ratio(state)^2 in every group.

    Attributes:
        granularity: The groups.
        max_ratio: Returns the bound, a scalar, from the state that the update returned.
        storages: The storage of each state field that is a moment.
    """

    granularity: Granularity
    max_ratio: Callable[[Any], jax.Array]
    storages: dict[str, Storage]


class Direction(optax.GradientTransformationExtraArgs):
    """A transformation that hands out a bounded, unsigned direction and knows its bound.

    It is an `optax.GradientTransformationExtraArgs` to everything else; `verified` reads `bound`.
    """

    bound: Bound

    def __new__(cls, init: Any, update: Any, bound: Bound):
        """Makes the pair (init, update) and remembers the bound."""
        self = super().__new__(cls, init, update)
        self.bound = bound
        return self
