"""Taking a step once more, only to look at it.

What looks at a step after it needs the old values, the new ones and the updates in memory at the same time,
although XLA computes a step in place and never writes its updates. In a branch that is rarely taken it is
cheaper to take the step again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from adaptive_optax._core.foresight import foresight


def has_effects(step: Callable[..., Any], *arguments: Any) -> bool:
    """Whether a step has effects, such as a call of the host, so that it must not be taken once more."""
    return bool(jax.make_jaxpr(step)(*arguments).effects)


def kept_apart(arguments: Any) -> Any:
    """Returns the arguments of the step in a branch.

    Without a barrier XLA runs both branches of a conditional if it finds them cheap, as it does a step.
    """
    return jax.lax.optimization_barrier(arguments)


def ordered_after(count: jax.Array, updates: Any) -> Any:
    """Returns the updates, in a form that is only known after a branch that returned a count.

    XLA would otherwise not know that the branch has read the old values before the step overwrites them, and
    copy them. It cannot know either that a count is never negative.
    """
    ordered = jax.tree.map(lambda x: jnp.where(count >= 0, x, -x), updates)
    known = foresight()
    bound = None if known is None else known.bound(updates)
    if known is not None and bound is not None:
        known.know(ordered, bound)
    return ordered
