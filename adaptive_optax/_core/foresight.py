"""What is known of a step before it is taken, for wrappers that may reject it.

A wrapper that decides after the step keeps the old values beside the new ones until it has seen them all,
which takes several times as long as the step. Two things let it decide before:

* *Growth*: each transformation declares how large its updates and its state can become, given how large what
  it receives is. Bounds travel with the arrays, so it does not matter how transformations are combined; an
  array of which nothing was declared has no bound.
* *Holding still*: once the wrapper has decided, averages that know the decision keep their old values
  themselves. The wrapper would otherwise select between new and old values, while the updates are computed
  from the new ones: a CPU then computes them twice, from copies of the old ones.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adaptive_optax._core.entries import arrays_of_entries


class Magnitudes(NamedTuple):
    """Upper bounds on the magnitudes of what a transformation receives, scalars in the dtype of its own.

    Attributes:
        updates: For the incoming updates.
        state: For the arrays in its state.
        params: For the parameters; 0 if there are none.
        size: The number of coordinates, a Python integer.
    """

    updates: jax.Array
    state: jax.Array
    params: jax.Array
    size: int


Growth = Callable[[Magnitudes, Any], tuple[jax.Array, jax.Array]]
"""`growth(given, state)` returns bounds on the updates and on the arrays of the new state, which it gets.

The bounds hold for finite scalars in the state, at which the caller looks. They are inf where a
hyperparameter whose value is not known while tracing is out of its range."""

ROUNDED = 1 + 2.0**-6  # more than what rounding to 8 bits, several times, adds to a magnitude


def if_valid(bound: Any, *conditions: Any) -> jax.Array:
    """Returns a bound, or inf unless all conditions hold; a comparison with a NaN does not."""
    return jnp.where(functools.reduce(jnp.logical_and, conditions), bound, jnp.inf)


class Foresight:
    """Bounds on the arrays of a step that is being traced, in one dtype."""

    def __init__(self, dtype: Any) -> None:
        self._dtype = dtype
        self._bounds: dict[int, tuple[Any, jax.Array]] = {}  # with the array, so that its id stays taken

    def know(self, tree: Any, bound: Any) -> None:
        """Records a bound on all arrays of a tree."""
        bound = jnp.asarray(bound, self._dtype)
        for x in jax.tree.leaves(tree):
            self._bounds[id(x)] = x, bound

    def bound(self, tree: Any) -> jax.Array | None:
        """Returns a bound on all floating arrays of a tree; None if there is one without."""
        bounds: dict[int, jax.Array] = {}
        for x in jax.tree.leaves(tree):
            if id(x) in self._bounds:
                known = self._bounds[id(x)][1]
                bounds[id(known)] = known
            elif jnp.issubdtype(jnp.result_type(x), jnp.inexact):
                return None
        return functools.reduce(jnp.maximum, bounds.values(), jnp.zeros((), self._dtype))

    def grow(self, growth: Growth, received: tuple[Any, Any, Any], returned: tuple[Any, Any]) -> None:
        """Records the bounds that a transformation declares, if it received none but arrays with bounds.

        Args:
            growth: The declaration.
            received: The updates, the state and the parameters or None.
            returned: The new updates and the new state.
        """
        updates, state, params = (self.bound(tree) for tree in received)
        if updates is None or state is None or params is None:
            return
        size = sum(x.size for x in jax.tree.leaves(returned[0]))
        scalars = [*arrays_of_entries(returned[1]), *(x for x in jax.tree.leaves(returned[1]) if x.ndim == 0)]
        dtype = next((x.dtype for x in scalars if jnp.issubdtype(x.dtype, jnp.floating)), self._dtype)
        given = Magnitudes(updates.astype(dtype), state.astype(dtype), params.astype(dtype), size)
        for tree, bound in zip(returned, growth(given, returned[1]), strict=True):
            self.know(tree, bound)


@contextlib.contextmanager
def _during(variable: contextvars.ContextVar[Any], value: Any) -> Iterator[Any]:
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)


_FORESIGHT: contextvars.ContextVar[Foresight | None] = contextvars.ContextVar("_FORESIGHT", default=None)


def foreseeing(dtype: Any) -> contextlib.AbstractContextManager[Foresight]:
    """Collects what transformations declare of the step that is traced inside, as scalars of a dtype."""
    return _during(_FORESIGHT, Foresight(dtype))


def foresight() -> Foresight | None:
    """Returns the bounds of the step that is being traced, if a wrapper asked for them."""
    return _FORESIGHT.get()


class Decision:
    """Whether a step is accepted, known before it is taken.

    Attributes:
        accepted: A bool scalar.
    """

    def __init__(self, is_accepted: jax.Array):
        self.accepted = is_accepted
        self._holding: dict[int, Any] = {}

    def holds(self, x: Any) -> bool:
        """Whether an array of the new state has its old values if the step is not accepted."""
        return id(x) in self._holding

    def note(self, tree: Any) -> None:
        """Records arrays that hold still by themselves."""
        self._holding |= {id(x): x for x in jax.tree.leaves(tree)}


_DECISION: contextvars.ContextVar[Decision | None] = contextvars.ContextVar("_DECISION", default=None)


def deciding(is_accepted: jax.Array) -> contextlib.AbstractContextManager[Decision]:
    """Lets averages know, in the step that is traced inside, whether it is accepted."""
    return _during(_DECISION, Decision(is_accepted))


def accepted() -> jax.Array | None:
    """Returns whether the step is accepted, if that was decided before it."""
    decision = _DECISION.get()
    return None if decision is None else decision.accepted


def if_accepted(is_accepted: jax.Array | None, new: jax.Array, old: jax.Array) -> jax.Array:
    """Returns the new value, or the old one if the step is known not to be accepted."""
    return new if is_accepted is None else jnp.where(is_accepted, new, old)


def holding(tree: Any) -> Any:
    """Returns a part of a new state that holds still by itself, and records that."""
    decision = _DECISION.get()
    if decision is not None:
        decision.note(tree)
    return tree
