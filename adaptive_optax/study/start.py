"""A run under way, from which arms go on: should the learning rate decay now?

Arms go on with the run's parameters and its optimizer's moments; their schedules and averages begin now.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_optax._core.checks import check_integer
from adaptive_optax._core.paths import paths_and_leaves
from adaptive_optax.interop.state_nodes import nodes
from adaptive_optax.interop.transfer import carry_moments, nodes_with_moments, undeclared_states
from adaptive_optax.study.task import ModelState, Params, Task


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Start:
    """A checkpoint of a run under way.

    Attributes:
        params: The parameters, as the task's `init` returns them.
        opt_state: The optimizer's state. Arms take over its moments with their counts, at any depth of chains
            and wrappers: this library's, optax's, and those declared with `carries_moments`; the moments of
            Adam, RMSprop and momentum also from one library to the other. Everything else begins now:
            schedules, averages, accumulated gradients. None begins with moments of zero, with a warning.
        model_state: The model state, if the task has one.
        step: The steps taken so far, for reports.

    Raises:
        ValueError: If `step` is not an integer of at least 0.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> from adaptive_optax import study
        >>> params = jnp.ones(3)
        >>> start = study.Start(params, ao.adam(1e-3).init(params), step=0)
    """

    params: Params
    opt_state: Any
    model_state: ModelState = None
    step: int = 0

    def __post_init__(self) -> None:
        check_integer("step", self.step, "[0, inf)")

    def __repr__(self) -> str:
        count = sum(np.size(x) for x in jax.tree.leaves(self.params))
        return f"Start(step={self.step}, {count:,} parameters)"


class Origin(NamedTuple):
    """What the trials of an arm begin with.

    Attributes:
        params: The parameters.
        model_state: The model state.
        carried: The leaves of the arm's state that come from the run, by their number.
    """

    params: Params
    model_state: ModelState
    carried: dict[int, Any]


def check_start(start: Any, task: Task) -> None:
    """Refuses a start that does not fit the task.

    Raises:
        ValueError: If a leaf of the parameters or of the model state has another path, shape or dtype than in
            the task.
    """
    if not isinstance(start, Start):
        raise ValueError(f"start must be a study.Start, got {type(start).__name__}.")
    expected = jax.eval_shape(task.start, jax.random.key(0))
    for name, wanted in zip(("params", "model_state"), expected, strict=True):
        has, needs = (_shapes(tree) for tree in (getattr(start, name), wanted))
        for path in [*needs, *has]:
            if has.get(path) != needs.get(path):
                raise ValueError(
                    f"start.{name} must be as in the task: {path!r} is {needs.get(path, 'nothing')} there, "
                    f"got {has.get(path, 'nothing')}."
                )


def _shapes(tree: Any) -> dict[str, str]:
    return {path: f"{jnp.result_type(x)}{list(np.shape(x))}" for path, x in paths_and_leaves(tree)}


def origin_of(start: Start, opt_state: Any, arm: str = "") -> Origin:
    """Returns what the trials of an arm begin with.

    Args:
        start: The run.
        opt_state: The arm's initial state, with concrete values.
        arm: The arm's name.

    Raises:
        ValueError: If the arm has moments, and the run's state none that it could take over.

    Warns:
        UserWarning: If the arm has moments, and the run's state is None.
    """
    before = jax.tree.leaves(opt_state)
    after = jax.tree.leaves(carry_moments(start.opt_state, opt_state, start.params))
    carried = {i: x for i, (x, old) in enumerate(zip(after, before, strict=True)) if x is not old}
    if not carried:
        _begin_cold(start, opt_state, arm)
    return Origin(start.params, start.model_state, carried)


def _begin_cold(start: Start, opt_state: Any, arm: str) -> None:
    """Refuses an arm that goes on with none of its moments, unless that was asked for."""
    undeclared = _names(undeclared_states(opt_state))
    needed = _names(node.state for node in nodes_with_moments(opt_state, start.params)) | undeclared
    if not needed:
        return
    if start.opt_state is None:
        warnings.warn(
            f"start.opt_state is None: arm {arm!r} begins with moments of zero, unlike the run.", stacklevel=3
        )
        return
    found = _names(node.state for node in nodes(start.opt_state, "")) | _names(
        undeclared_states(start.opt_state)
    )
    got = _listed(found) or f"a {type(start.opt_state).__name__}"
    if undeclared:
        remedy = f"Declare those of {_listed(undeclared)} with carries_moments"
    else:
        got += ", of other parameters or groups" if needed & found else ""
        remedy = (
            "Pass the state of the run's optimizer as its init and update return it, with arms of the same "
            "optimizer"
        )
    raise ValueError(
        f"start.opt_state must hold moments that arm {arm!r} can go on with, of {_listed(needed)}; "
        f"got {got}. {remedy}; or pass None to begin with moments of zero."
    )


def _names(states: Iterable[Any]) -> set[str]:
    """The types of states, as one imports them."""
    types = {type(state) for state in states}
    return {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in types}


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))


def with_carried(opt_state: Any, origin: Origin) -> Any:
    """Returns an arm's initial state with the leaves that come from the run."""
    leaves, structure = jax.tree.flatten(opt_state)
    return structure.unflatten(origin.carried.get(i, leaf) for i, leaf in enumerate(leaves))
