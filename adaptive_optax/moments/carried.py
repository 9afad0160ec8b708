"""Which fields of a state are moments, declared beside the state.

`convert_storage` and `transfer_state` work with any state that declares its moments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, get_args

from adaptive_optax._core.checks import check_choice, check_same_tree
from adaptive_optax._core.entries import attributes_of
from adaptive_optax._core.states import unwrapped
from adaptive_optax._core.trees import PyTree
from adaptive_optax.moments.formats import dense, encode_like, is_rounded
from adaptive_optax.moments.storage import Role

State = TypeVar("State")

Values = dict[str, PyTree]  # decoded moments by field


class MomentField(NamedTuple):
    """A moment in a state, as declared by `carries_moments`.

    Attributes:
        role: "mu", signed and like the parameters, or "nu", non-negative, one value per group.
        weight: The field with the sum of its weights, which `transfer_state` uses to rescale a moment from
            another state; "" if there is none.
        decay: The field with its last decay, which a format must be able to follow; "" if there is none.
    """

    role: Role
    weight: str = ""
    decay: str = ""


class _Declared(NamedTuple):
    fields: dict[str, MomentField]
    repair: Callable[[Any, Values], Values] | None = None


# Keyed by the type of a state. It cannot be an annotated attribute, which in a NamedTuple would be a field.
_DECLARED: dict[type, _Declared] = {}


def carries_moments(
    repair: Callable[[Any, dict[str, PyTree]], dict[str, PyTree]] | None = None,
    /,
    **fields: MomentField | Role,
) -> Callable[[type[State]], type[State]]:
    """Declares the moments of a state for `convert_storage` and `transfer_state`.

    The state is a NamedTuple with a field `count`, the number of steps. A moment is as a `Storage` made it,
    or None. A subclass inherits the declaration; another one for the same type replaces it.

    Args:
        repair: `repair(state, values) -> new`, where `values` has a tree of decoded values for each field
            and `new` those that change. It restores what relates the moments to each other, such as a lower
            bound on the second, after a format has rounded them or coordinates have got the mean of a group.
            None if nothing relates them.
        **fields: A `MomentField` for each field that is one, or only its role, "mu" or "nu".

    Returns:
        A decorator for the type of the state. It returns the type itself.

    Raises:
        ValueError: If there is no field, a role is unknown, or `repair` is not a function; when the type is
            decorated, if it lacks a field that is named here.

    Examples:
        >>> import adaptive_optax as ao, jax, jax.numpy as jnp
        >>> from typing import Any, NamedTuple
        >>> @ao.carries_moments(average="mu")
        ... class AverageState(NamedTuple):
        ...     count: jax.Array
        ...     average: Any
        >>> state = AverageState(jnp.zeros((), jnp.int32), ao.Float32().init(jnp.ones(3), "mu"))
        >>> ao.convert_storage(state, mu_storage="bfloat16").average.dtype
        dtype(bfloat16)
    """
    if repair is not None and (isinstance(repair, type) or not callable(repair)):
        raise ValueError(f"repair must be a function (state, values) -> new values, got {repair!r}.")
    if not fields:
        raise ValueError('carries_moments needs at least one moment, such as carries_moments(mu="mu").')
    moments = {name: x if isinstance(x, MomentField) else MomentField(x) for name, x in fields.items()}
    for name, moment in moments.items():
        check_choice(f"The role of {name!r}", moment.role, get_args(Role))
        for kind, field in (("weight", moment.weight), ("decay", moment.decay)):
            if not isinstance(field, str):
                raise ValueError(f"The {kind} of {name!r} must be the name of a field, got {field!r}.")

    def declare(state_type):
        named = ["count", *moments, *(x for m in moments.values() for x in (m.weight, m.decay) if x)]
        for name in named:
            if name not in attributes_of(state_type):
                raise ValueError(
                    f"carries_moments: {state_type.__name__} must be a NamedTuple with the fields "
                    f"{', '.join(named)}, got one without {name!r}."
                )
        _DECLARED[state_type] = _Declared(moments, repair)
        return state_type

    return declare


def types_with_moments() -> tuple[type, ...]:
    """Returns the types of states that declare moments."""
    return tuple(_DECLARED)


def _declared_by(state_type: type) -> _Declared:
    return next((_DECLARED[kind] for kind in state_type.__mro__ if kind in _DECLARED), _Declared({}))


def moments_declared_by(state_type: type, role: Role | None = None) -> dict[str, MomentField]:
    """Returns the moments that states of a type declare, or those of one role, by field."""
    fields = _declared_by(state_type).fields
    return {name: moment for name, moment in fields.items() if role in (None, moment.role)}


def moments_of(state: Any) -> Values:
    """Returns the values of a state's moments as the next step will decode them, by field."""
    moments = {name: getattr(state, name) for name in moments_declared_by(type(state))}
    values = {name: dense(moment) for name, moment in moments.items()}
    return _repaired(state, values) if any(map(is_rounded, moments.values())) else values


def with_repaired_moments(state: Any) -> Any:
    """Returns a state whose moments are again related as its declaration says, each in its own format."""
    declared = moments_declared_by(type(state))
    values = {name: dense(getattr(state, name)) for name in declared}
    encoded = {
        name: encode_like(getattr(state, name), x, count=unwrapped(state.count), role=declared[name].role)
        for name, x in _repaired(state, values).items()
        if x is not values[name]
    }
    return state._replace(**encoded)


def _repaired(state: Any, values: Values) -> Values:
    repair = _declared_by(type(state)).repair
    if repair is None:
        return values
    repaired = repair(state, values)
    if not isinstance(repaired, dict) or not repaired.keys() <= values.keys():
        raise ValueError(
            f"{type(state).__name__}: repair must return a dictionary of moments among "
            f"{', '.join(map(repr, values))}, got {repaired!r}."
        )
    new = values | repaired
    for name, x in values.items():
        if new[name] is not x:
            check_same_tree(type(state).__name__, f"the repaired {name}", new[name], "the state", x)
    return new
