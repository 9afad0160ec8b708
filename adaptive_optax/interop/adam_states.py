"""Converting Adam's state from and to optax, so that a run can switch libraries midway.

Both libraries, and PyTorch, keep the same two moving averages. The additions of this library, the sums of
weights and the bound, follow from the count and the decays.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_optax._core.checks import check_same_tree
from adaptive_optax._core.paths import paths_and_leaves
from adaptive_optax._core.states import replace_states, states_of, unwrapped
from adaptive_optax._core.trees import Moment, OptState, Params
from adaptive_optax.hyperparams import InjectHyperparamsState
from adaptive_optax.moments.formats import dense, encode_like
from adaptive_optax.moments.storage import Role
from adaptive_optax.transforms.adam import ScaleByAdamState
from adaptive_optax.transforms.adam_bound import scalars_after
from adaptive_optax.transforms.learning_rate import LEARNING_RATE_STATES
from adaptive_optax.transforms.weight_decay import AddDecoupledWeightDecayState

OPTAX_ADAM = (optax.ScaleByAdamState, optax.ScaleByAmsgradState)
_SCHEDULED = (
    InjectHyperparamsState,
    optax.ScaleByScheduleState,
    optax.InjectStatefulHyperparamsState,
)


class AdamMoments(NamedTuple):
    """The state of another library's Adam.

    Attributes:
        count: The number of steps.
        mu: The first moments.
        nu: The second moments.
        nu_max: AMSGrad's maximum, or None.
        decays: b1 and b2 of these steps; None if they are not known.
    """

    count: int
    mu: Moment
    nu: Moment
    nu_max: Moment | None = None
    decays: tuple[float, float] | None = None


def from_optax(
    opt_state: OptState, tx: optax.GradientTransformation, params: Params, *, trusted: bool = False
) -> OptState:
    """Converts a state of optax's Adam to one of this library's, so that a run continues with `tx`.

    Args:
        opt_state: The state of `optax.adam`, `adamw`, `amsgrad` or `scale_by_adam`, at any depth of a chain
            or wrapper.
        tx: The transformation that continues the run. It must have as many `scale_by_adam` as `opt_state` has
            Adam states, per coordinate and in any storage; or several, in groups, for a single state with all
            moments. Moments of parameters for which `tx` has no Adam, such as frozen ones, are omitted.
        params: The parameters.
        trusted: Whether to accept second moments that could be Adamax's infinity norms, which optax keeps in
            a state of the same type: those that are everywhere at least as large as the first moments, and
            small. For gradients well above 1 the two cannot be distinguished.

    Returns:
        A state of `tx`, with the moments and the count of `opt_state`. The sums of weights are computed with
        the decays that `tx` starts with, held constant. Schedules continue from the count. Everything else is
        as `tx` initialises it.

    Raises:
        ValueError: If the number of Adam states, their counts, trees or shapes do not fit; if a value is
            impossible for such a state: NaN, infinite, too large for the dtype, complex for a real parameter,
            or negative in the second moment; if the second moments could be Adamax's, unless `trusted`; if
            optax.MultiSteps is in the middle of a step.

    Yogi's second moment is not a moving average, but optax keeps it in a state of the same type: it is
    treated as Adam's.

    In `flax.nnx.Optimizer`, use `integrations.flax.optimizer_from_state`.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp, optax
        >>> params = jnp.ones(2)
        >>> theirs = optax.adamw(1e-3)
        >>> _, state = theirs.update(params, theirs.init(params), params)
        >>> tx = ao.adamw(1e-3, nu_storage="bfloat16")
        >>> updates, state = tx.update(params, ao.from_optax(state, tx, params), params)
        >>> int(state[0].count)
        2
    """
    found = states_of(OPTAX_ADAM, opt_state)
    if not found:
        raise ValueError(
            f"from_optax: opt_state must hold a state of optax's Adam, got a {type(opt_state).__name__}."
        )
    if any(int(unwrapped(s.mini_step)) for s in states_of(optax.MultiStepsState, opt_state)):
        raise ValueError(
            "from_optax: the state of optax.MultiSteps is in the middle of a step, whose gradients would be "
            "lost; convert it after the last micro-batch."
        )
    kept = [AdamMoments(_count("from_optax", s.count), s.mu, s.nu, getattr(s, "nu_max", None)) for s in found]
    if not trusted:
        slots = states_of(ScaleByAdamState, tx.init(params))
        for moments, slot in zip(kept, slots, strict=False):
            _refuse_infinity_norm(moments, decimal(slot.b2))
    return state_with_moments("from_optax", tx, params, kept)


def to_optax(
    opt_state: OptState, tx: optax.GradientTransformation | None = None, params: Params | None = None
) -> OptState:
    """Converts a state of this library's Adam to one of optax's.

    Args:
        opt_state: A state that contains `scale_by_adam`, per coordinate and in any storage.
        tx: The optax transformation that continues the run. None means the same chain in optax, with a
            constant learning rate and no mask: `optax.adam` for `adam`, `optax.adamw` for `adamw`.
        params: The parameters, needed with `tx`.

    Returns:
        The state of `tx`, with moments in float32 (or in the dtypes of `tx`, if given).

    Raises:
        ValueError: If there is no Adam state, `tx` is given without `params`, or the two do not fit.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp, optax
        >>> params = jnp.ones(2)
        >>> state = ao.to_optax(ao.adam(1e-3).init(params))
        >>> updates, state = optax.adam(1e-3).update(params, state)
    """
    found = states_of(ScaleByAdamState, opt_state)
    if not found:
        raise ValueError(
            f"to_optax: opt_state must hold a state of scale_by_adam, got a {type(opt_state).__name__}."
        )
    for state in found:
        check_per_coordinate("to_optax", state.mu, state.nu)
    if tx is None:
        kinds = (ScaleByAdamState, *LEARNING_RATE_STATES, AddDecoupledWeightDecayState)
        return replace_states(kinds, opt_state, _as_optax)
    if params is None:
        raise ValueError("to_optax needs params= with tx=, to initialise the state of tx.")
    target = tx.init(params)
    slots = states_of(OPTAX_ADAM, target)
    if len(slots) != len(found):
        raise ValueError(f"to_optax: opt_state has {len(found)} Adam states, the state of tx {len(slots)}.")
    states = iter([_as_optax(state) for state in found])

    def fill(slot):
        state = next(states)
        check_same_tree("to_optax", "opt_state", state.mu, "the state of tx", slot.mu)
        if type(state) is not type(slot):
            raise ValueError("to_optax: amsgrad must be the same in opt_state and tx.")
        return jax.tree.map(lambda old, new: jnp.asarray(new, old.dtype), slot, state)

    target = replace_states(OPTAX_ADAM, target, fill)
    return _scheduled_from(target, unwrapped(found[0].count))


def _as_optax(state: Any) -> Any:
    if not isinstance(state, ScaleByAdamState):
        return optax.EmptyState()
    mu, nu = dense(state.mu), dense(state.nu)
    if state.nu_max is None:
        return optax.ScaleByAdamState(state.count, mu, nu)
    return optax.ScaleByAmsgradState(state.count, mu, nu, dense(state.nu_max))


def check_per_coordinate(owner: str, mu: Moment, nu: Moment) -> None:
    """Raises if coordinates share second moments."""
    shapes = [[x.shape for x in jax.tree.leaves(dense(moment))] for moment in (mu, nu)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{owner} needs second moments per coordinate: granularity='coordinate'.")


def state_with_moments(
    owner: str, tx: optax.GradientTransformation, params: Params, kept: list[AdamMoments]
) -> Any:
    """Returns a state of `tx` with the given counts and moments for each `scale_by_adam` in it."""
    target = tx.init(params)
    slots = states_of(ScaleByAdamState, target)
    if len(kept) == 1 and slots:
        kept = kept * len(slots)  # each group takes its own part
    if len(slots) != len(kept):
        raise ValueError(f"{owner}: got {len(kept)} Adam states for the {len(slots)} of tx.")
    counts = {moments.count for moments in kept}
    if len(counts) != 1:
        raise ValueError(f"{owner}: the counts of the Adam states must be the same, got {sorted(counts)}.")
    steps = counts.pop()
    count = jnp.asarray(steps, jnp.int32)
    remaining = iter(kept)

    def fill(slot):
        given = next(remaining)
        check_per_coordinate(owner, slot.mu, slot.nu)
        like = dense(slot.mu)
        given = given._replace(
            mu=_part(owner, "the moment", given.mu, like, params),
            nu=_part(owner, "the second moment", given.nu, like, params),
            nu_max=_part(owner, "the largest second moment", given.nu_max, like, params),
        )
        if (given.nu_max is None) != (slot.nu_max is None):
            raise ValueError(f"{owner}: amsgrad must be the same in the state and in tx.")
        b1, b2 = given.decays or (decimal(slot.b1), decimal(slot.b2))

        def scalar(value):
            return jnp.asarray(value, unwrapped(slot.bound_sq).dtype)

        def moment(name, role):
            # In the tree of the slot, which may be wrapped, and in its dtypes.
            old, values = getattr(slot, name), getattr(given, name)
            if values is None:
                return None
            like, treedef = jax.tree.flatten(dense(old))
            pairs = zip(paths_and_leaves(values), like, strict=True)
            leaves = [_checked(owner, f"{name}/{path}", x, y.dtype, role, steps) for (path, x), y in pairs]
            return encode_like(old, treedef.unflatten(leaves), count=count, role=role)

        return slot._replace(
            count=count,
            mu=moment("mu", "mu"),
            nu=moment("nu", "nu"),
            nu_max=moment("nu_max", "nu"),
            **{name: scalar(value) for name, value in scalars_after(steps, b1, b2).items()},
        )

    target = replace_states(ScaleByAdamState, target, fill)
    return _scheduled_from(target, count)


def _part(owner: str, name: str, moment: Any, like: Any, params: Any) -> Any:
    """The leaves of a moment that `tx` keeps (groups and `freeze` hide others), as a tree like its state."""
    if moment is None:
        return None
    leaves, known = dict(paths_and_leaves(moment)), dict(paths_and_leaves(params))
    own = {path for path, _ in paths_and_leaves(like)}
    shown = {path: x for path, x in leaves.items() if path in own or path not in known}
    check_same_tree(owner, name, shown, "params", dict(paths_and_leaves(like)), ordered=False)
    return jax.tree.unflatten(jax.tree.structure(like), [shown[path] for path, _ in paths_and_leaves(like)])


def _checked(owner: str, name: str, x: Any, dtype: Any, role: Role, steps: int) -> jax.Array:
    """Casts an array of a moment, after checks."""

    def refuse(what):
        raise ValueError(f"{owner}: {name.rstrip('/')!r} {what}, which is impossible for a moment of Adam.")

    x = np.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        refuse(f"is {x.dtype}")
    if np.iscomplexobj(x) and not jnp.issubdtype(dtype, jnp.complexfloating):
        refuse(f"is {x.dtype} for {dtype}")
    if not np.isfinite(x).all():
        refuse("is not finite")
    with np.errstate(over="ignore"):
        cast = x.astype(dtype)
    if not np.isfinite(cast).all():
        refuse(f"is beyond {dtype} (up to {np.abs(x).max():.3g})")
    if role == "nu" and (x < 0).any():
        refuse(f"is negative (down to {x.min():.3g})")
    if steps == 0 and x.any():
        refuse("is not zero after 0 steps")
    return jnp.asarray(cast)


def _count(owner: str, count: Any) -> int:
    count = np.asarray(unwrapped(count))
    if count.ndim or count.dtype.kind not in "iu" or not 0 <= count < 2**31:
        raise ValueError(f"{owner}: the count must be an integer in [0, 2147483647], got {count!r}.")
    return int(count)


def _refuse_infinity_norm(moments: AdamMoments, b2: float) -> None:
    """Raises if nu is probably Adamax's u = max(b2 u, |g|) and not a mean of squares v.

    |m| <= 1.01 u holds for every u at the usual decays. It holds for every v only if gradients are well above
    1, and then v divided by its weight is not small either.
    """
    pairs = list(zip(jax.tree.leaves(moments.mu), jax.tree.leaves(moments.nu), strict=False))
    pairs = [(np.abs(np.asarray(m, np.complex128)), np.asarray(v, np.float64)) for m, v in pairs]
    if not all(m.shape == v.shape and (v >= 0.99 * m).all() for m, v in pairs):
        return
    moved = np.concatenate([v[m > 0] for m, v in pairs] or [np.zeros(0)])
    if moved.size and np.median(moved) * (1 - b2**moments.count) < 0.5:
        raise ValueError(
            "from_optax: every second moment is at least as large as the first moment, like the infinity "
            "norm of Adamax, which optax keeps in a state of the same type. If it is Adam's, pass "
            "trusted=True."
        )


def decimal(decay: Any) -> float:
    """The decimal number before rounding: with 0.999 rounded to float32, 1 - b2 would be off by 1e-5."""
    return float(str(np.asarray(unwrapped(decay))))


def _scheduled_from(opt_state: Any, count: Any) -> Any:
    """Sets the schedules in a state to a step."""

    def at_step(state):
        if not isinstance(state, optax.InjectStatefulHyperparamsState):
            return state._replace(count=count)
        schedules = {
            name: s._replace(count=count) if getattr(s, "_fields", ()) == ("count",) else s
            for name, s in state.hyperparams_states.items()
        }
        return state._replace(count=count, hyperparams_states=schedules)

    for kind in _SCHEDULED:  # one by one, because injected hyperparameters contain the others
        opt_state = replace_states(kind, opt_state, at_step)
    return opt_state
