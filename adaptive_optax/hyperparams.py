"""Hyperparameters in the state: read what the last step used, and override it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import numbers
import types
import typing
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike
from optax.schedules import StatefulSchedule

from adaptive_optax._core.overrides import assigned, in_effect, replacement
from adaptive_optax._core.precision import incremented
from adaptive_optax._core.random_bits import is_low_precision
from adaptive_optax._core.state_check import check_state
from adaptive_optax._core.states import (
    carries_hyperparameters,
    children,
    hyperparameters_of,
    unwrapped,
    with_children,
)
from adaptive_optax._core.transformation import transformation, with_array_state, with_stable_dtypes
from adaptive_optax._core.trees import Count, Flag, OptState, PyTree
from adaptive_optax._core.values import value_at


def _set_injected(state: Any, name: str, value: Any) -> Any:
    new, flag = replacement(name, value, state.given[name], state.overridden[name])
    flags = state.overridden | {name: flag}
    return state._replace(hyperparams=state.hyperparams | {name: new}, overrides=tuple(flags.values()))


@carries_hyperparameters(set_value=_set_injected)  # the names are the keys of `hyperparams`
class InjectHyperparamsState(NamedTuple):
    """State of `inject_hyperparams`.

    Attributes:
        count: Number of steps taken.
        hyperparams: Maps each name to the value used by the last step, or to be used by the next one. A value
            assigned here is used from then on.
        given_values: What the number or schedule gave in the last step, in the order of the sorted names.
        overrides: Whether the value in `hyperparams` was set by the user, bool scalars, in the same order.
        schedule_states: States of optax's stateful schedules, in the order of their sorted names.
        inner_state: State of the inner transformation.

    Only `hyperparams` is keyed by name, so that `optax.tree_utils.tree_get` finds each name once.
    """

    count: Count
    hyperparams: dict[str, jax.Array]
    given_values: tuple[jax.Array, ...]
    overrides: tuple[Flag, ...]
    schedule_states: tuple[PyTree, ...]
    inner_state: OptState

    @property
    def given(self) -> dict[str, jax.Array]:
        """`given_values` by name."""
        return dict(zip(sorted(self.hyperparams), self.given_values, strict=True))

    @property
    def overridden(self) -> dict[str, Flag]:
        """`overrides` by name."""
        return dict(zip(sorted(self.hyperparams), self.overrides, strict=True))


Factory = Callable[..., optax.GradientTransformation]
"""A function from hyperparameters to a transformation, such as `adam` or `optax.sgd`."""


def inject_hyperparams(
    factory: Factory, static_args: str | Iterable[str] = (), hyperparam_dtype: DTypeLike = jnp.float32
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """Puts the hyperparameters of a factory into the state, where they can be read, set and swept.

    Like optax's function of the same name; it works with every factory of this library and of optax. Values
    in the state are data, so changing one does not recompile: sweep it, anneal it by hand, or `vmap` over
    states with one value per member. Read values with `get_hyperparams` and set them with `set_hyperparams`.

    The state holds real numbers (but not bools, nor arguments annotated as `int`) and schedules. A callable
    counts as a schedule if the parameter's default is a number, or if its annotation allows a number as well
    as a callable (`optax.ScalarOrSchedule`). Everything else (masks, label functions, dtypes) goes to the
    factory unchanged, and so do schedules of `error_controlled`, which needs their shape. Integers whose
    default is an integer too stay int32. optax's stateful schedules are supported.

    Differences from optax: values are float32 whatever the parameters' dtype (in bfloat16 a b2 of 0.999
    is 1); a mask is never mistaken for a schedule; and a value that you set stays, even in place of a
    schedule, whether by assignment to `state.hyperparams[name]` or by
    `optax.tree_utils.tree_set(state, name=value)`.

    A NaN or a huge gradient has the same effect as on the factory's transformation.

    With bfloat16 or float16 parameters, the inner state has from the start the dtypes that its first update
    gives it (optax's states would widen at that point), unless that update needs extra arguments.

    Args:
        factory: Returns a transformation; its signature names the hyperparameters.
        static_args: Names of arguments that are passed to the factory unchanged, whatever they are.
        hyperparam_dtype: The dtype of the values in the state.

    Returns:
        A function with the factory's signature that returns the transformation. Its `update` forwards extra
        arguments.

    Raises:
        ValueError: If `factory` is not callable, `static_args` names a parameter it does not have, or
            `hyperparam_dtype` is not floating. Errors of the factory for the given values are raised at once.

    State cost: the inner state, plus two scalars and a flag per hyperparameter.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> tx = ao.inject_hyperparams(ao.adam)(ao.exponential_decay(0.1, 10, 0.5), b2=0.99)
        >>> state = ao.set_hyperparams(tx.init(jnp.ones(2)), learning_rate=0.5)
        >>> _, state = tx.update(jnp.ones(2), state)
        >>> {name: round(float(x), 3) for name, x in sorted(ao.get_hyperparams(state).items())}
        {'b1': 0.9, 'b2': 0.99, 'eps': 0.0, 'eps_root': 0.0, 'learning_rate': 0.5}
    """
    if not callable(factory):
        raise ValueError(f"factory must be a function that returns a transformation, got {factory!r}.")
    signature = inspect.signature(factory)
    static = {static_args} if isinstance(static_args, str) else set(static_args)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())
    if (unknown := static - signature.parameters.keys()) and not takes_any:
        raise ValueError(f"static_args must be names of {list(signature.parameters)}, got {sorted(unknown)}.")
    try:  # NumPy reads None as float64
        is_floating = hyperparam_dtype is not None and jnp.issubdtype(hyperparam_dtype, jnp.floating)
    except TypeError:
        is_floating = False
    if not is_floating:
        raise ValueError(f"hyperparam_dtype must be a floating dtype, got {hyperparam_dtype!r}.")
    dtype, hints = jnp.dtype(hyperparam_dtype), _hints(factory)

    def is_hyperparameter(name, value):
        if callable(value) and name in getattr(factory, "keeps_schedules", ()):
            return False
        return _is_hyperparameter(value, signature.parameters[name].default, hints.get(name))

    def dtype_of(name, value):
        default = signature.parameters[name].default if name in signature.parameters else None
        return jnp.dtype(jnp.int32) if _stays_integer(value, default, hints.get(name)) else dtype

    @functools.wraps(factory)
    def wrapped(*args, **kwargs) -> optax.GradientTransformationExtraArgs:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments, values = dict(bound.arguments), {}
        for name, value in arguments.items():
            if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                values |= {key: x for key, x in value.items() if key not in static and _is_number(x)}
            elif name not in static and is_hyperparameter(name, value):
                values[name] = value
        # Tuples rather than dictionaries, because Equinox hashes what the closures below hold.
        names = tuple(sorted(values))
        hyperparameters = tuple((name, values[name], dtype_of(name, values[name])) for name in names)
        all_arguments = tuple(arguments.items())

        def build(numbers):
            """The inner transformation with numbers for the hyperparameters."""
            new = {}
            for name, value in all_arguments:
                if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                    new[name] = value | {key: numbers[key] for key in value if key in numbers}
                else:
                    new[name] = numbers.get(name, value)
            call = inspect.BoundArguments(signature, OrderedDict(new))
            return with_array_state(factory(*call.args, **call.kwargs))

        def given_at(count, schedule_states, **extra_args):
            given, states = {}, iter(schedule_states)
            for name, value, dtype in hyperparameters:
                if isinstance(value, StatefulSchedule):
                    value = value(next(states), **extra_args)
                given[name] = value_at(value, count, dtype)
            return given

        def stateful():
            return [value for _, value, _ in hyperparameters if isinstance(value, StatefulSchedule)]

        def start():
            schedule_states = tuple(schedule.init() for schedule in stateful())
            count = jnp.zeros((), jnp.int32)
            return count, given_at(count, schedule_states), schedule_states

        build(start()[1])  # so that the factory raises its errors now

        def own_init(params):
            del params
            count, _, schedule_states = start()
            return InjectHyperparamsState(
                count=count,
                hyperparams={},
                # Fresh arrays, so that the state can be donated.
                given_values=tuple(given_at(count, schedule_states).values()),
                overrides=tuple(jnp.zeros((), bool) for _ in names),
                schedule_states=schedule_states,
                inner_state=None,
            )

        def init_fn(params):
            given = start()[1]
            inner = build(given)
            inner_state = inner.init(params)
            if any(map(is_low_precision, jax.tree.leaves(params))):
                # optax creates states in the parameters' dtype, and float32 hyperparameters then widen them.
                inner_state = with_stable_dtypes(inner, inner_state, params, params)
            return own_init(params)._replace(hyperparams=given, inner_state=inner_state)

        def update_fn(updates, state, params=None, **extra_args):
            # Values set in `hyperparams` are checked where they are used.
            own = state._replace(hyperparams={}) if isinstance(state, InjectHyperparamsState) else state
            check_state("inject_hyperparams", own, own_init, "updates", updates)
            if state.hyperparams.keys() != set(names):
                raise ValueError(
                    f"inject_hyperparams: hyperparams must have the keys {', '.join(names)}, "
                    f"got {', '.join(sorted(state.hyperparams))}."
                )
            given = given_at(state.count, state.schedule_states, **extra_args)
            used, kept, overrides = {}, [], []
            for name, before, overridden in zip(names, state.given_values, state.overrides, strict=True):
                current = assigned(name, state.hyperparams[name], before)
                used[name], overridden, before = in_effect(current, before, overridden, given[name])
                kept.append(before)
                overrides.append(overridden)
            updates, inner_state = build(used).update(updates, state.inner_state, params, **extra_args)
            schedules = zip(stateful(), state.schedule_states, strict=True)
            state = InjectHyperparamsState(
                count=incremented(state.count),
                hyperparams=used,
                given_values=tuple(kept),
                overrides=tuple(overrides),
                schedule_states=tuple(schedule.update(s, **extra_args) for schedule, s in schedules),
                inner_state=inner_state,
            )
            return updates, state

        return transformation(None, init_fn, update_fn)

    return wrapped


def _hints(factory: Factory) -> dict[str, Any]:
    """The types in the annotations of a factory.

    They distinguish a schedule from a mask or a label function where an argument has no default, as in
    `adam(schedule)`. Factories of optax and of users declare nothing else.
    """
    target = factory.func if isinstance(factory, functools.partial) else factory
    target = target if inspect.isroutine(target) else type(target).__call__
    hints, names = {}, getattr(inspect.unwrap(target), "__globals__", {})
    # One by one, so that an annotation that only a type checker can resolve does not affect the others.
    for name, annotation in inspect.get_annotations(target).items():
        holder = types.SimpleNamespace(__annotations__={name: annotation})
        with contextlib.suppress(NameError, AttributeError, TypeError, SyntaxError):
            hints |= typing.get_type_hints(holder, names)
    return hints


def _is_number(value: Any) -> bool:
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.number)
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return _is_number(value) and jnp.issubdtype(jnp.result_type(value), jnp.integer)


def _is_hyperparameter(value: Any, default: Any, hint: Any) -> bool:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = set(typing.get_args(hint)) if union else {hint}
    takes_real = float in members
    if isinstance(value, StatefulSchedule):
        return True
    if callable(value):
        return takes_real or _is_number(default)
    return _is_number(value) and (takes_real or int not in members)


def _stays_integer(value: Any, default: Any, hint: Any) -> bool:
    """Whether the default and the annotation say that a number is a count, such as of iterations."""
    members = set(typing.get_args(hint)) or {hint}
    is_real = float in members and int not in members
    return not is_real and _is_integer(value) and _is_integer(default)


def get_hyperparams(opt_state: OptState) -> dict[str, jax.Array]:
    """Returns the hyperparameters that the last step used.

    Every state of this library carries the values that may change: learning rate, decays, eps, momentum,
    weight decay. Before the first step they are the values that step will use; a value that was set shows
    immediately. Values held by `inject_hyperparams` hide inner ones of the same name.

    Args:
        opt_state: The state of any transformation, at any depth of `optax.chain`, `optax.partition` and
            wrappers; also `nnx.Optimizer(...).opt_state`.

    Returns:
        A dictionary from names to scalar arrays. A name that occurs more than once is prefixed with a chain
        index or a partition label that makes it unique: `"0/decay"`, `"head/b1"`.

    Raises:
        ValueError: If there are no hyperparameters, for instance if you pass an optimizer instead of its
            state.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> state = ao.adam(ao.exponential_decay(0.1, 100, 0.5)).init(jnp.ones(2))
        >>> sorted(ao.get_hyperparams(state))
        ['b1', 'b2', 'eps', 'learning_rate']
    """
    return {key: unwrapped(found.value) for key, found in _found(opt_state).items()}


def learning_rates(opt_state: OptState) -> list[jax.Array]:
    """Returns the learning rates that the last step used, except those hidden by injected ones."""
    return [found.value for found in _walk(opt_state, (), frozenset()) if found.name == "learning_rate"]


T = TypeVar("T")


def set_hyperparams(opt_state: T, **values: ArrayLike | None) -> T:
    """Overrides hyperparameters, replacing the given numbers or schedules until released with None.

    You can set the hyperparameters of `inject_hyperparams`, the learning rate of `scale_by_learning_rate`
    (part of every optimizer of this library), the scale of `reduce_on_plateau`, which continues from the new
    value (None resets it to 1), and the learning rate of `adgd`, which does too (None changes nothing).

    Args:
        opt_state: The state of any transformation, at any depth.
        **values: Names, as in `get_hyperparams`, with a scalar each, or None to go back to what was given.
            Pass names with a slash in a dictionary: `set_hyperparams(state, **{"head/learning_rate": 1e-4})`.
            A state that was made under `vmap` takes one value for all members, or an array with one for each.

    Returns:
        The new state; the given one is unchanged.

    Raises:
        ValueError: If a name is unknown, ambiguous or read-only (the message lists the keys). Also if a
            value, once rounded to the state's dtype, is not a real scalar in the range that the constructors
            accept; for a name that this library does not use, if it is not finite.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> tx = ao.adam(ao.exponential_decay(0.1, 100, 0.5))
        >>> state = ao.set_hyperparams(tx.init(jnp.ones(2)), learning_rate=0.02)
        >>> _, state = tx.update(jnp.ones(2), state)
        >>> round(float(ao.get_hyperparams(state)["learning_rate"]), 3)
        0.02
    """
    for key, value in values.items():
        found = _found(opt_state)
        if key not in found:
            same = [k for k in found if k.rpartition("/")[2] == key]
            problem = f"is ambiguous: {same}" if same else "is unknown"
            raise ValueError(f"set_hyperparams: {key!r} {problem}; the keys are {', '.join(found)}.")
        place = found[key]
        set_value = hyperparameters_of(type(place.owner)).set_value
        if set_value is None:
            raise ValueError(
                f"set_hyperparams: {key!r} of {type(place.owner).__name__} is read-only; wrap the "
                f"factory in inject_hyperparams to set it. The keys are {', '.join(found)}."
            )
        opt_state = _replaced(opt_state, place.path, set_value(place.owner, place.name, value))
    return opt_state


class _Found(NamedTuple):
    owner: Any
    path: tuple[Any, ...]
    name: str
    value: Any


def _found(opt_state: Any) -> dict[str, _Found]:
    """The hyperparameters, keyed by the shortest unique name."""
    found = list(_walk(opt_state, (), frozenset()))
    if not found:
        raise ValueError(
            f"opt_state holds no hyperparameters of this library, got a {type(opt_state).__name__}; pass the "
            "state that the transformation's init returned, or the optimizer's `.opt_state`."
        )
    result = {}
    for one in found:
        place = _place(one.path)
        others = [_place(p.path) for p in found if p.name == one.name and p is not one]
        result["/".join([*_shortest_unique_key(place, others), one.name])] = one
    return result


def _place(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(key) for key in path)


def _walk(state: Any, path: tuple[Any, ...], hidden: frozenset[str]) -> Iterator[_Found]:
    # nnx's OptVariable and OptArray wrap arrays, never containers that hold hyperparameters.
    if isinstance(state, InjectHyperparamsState):
        own = state.hyperparams
        yield from (_Found(state, path, name, own[name]) for name in own if name not in hidden)
        yield from _walk(state.inner_state, (*path, "inner_state"), hidden | own.keys())
        return
    for name in hyperparameters_of(type(state)).names:
        if name not in hidden:
            yield _Found(state, path, name, getattr(state, name))
    for key, child in children(state):
        yield from _walk(child, (*path, key), hidden)


def _replaced(state: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Returns the state with the part at `path` replaced."""
    if not path:
        return new
    first, *rest = path
    parts = [_replaced(x, tuple(rest), new) if key == first else x for key, x in children(state)]
    return with_children(state, parts)


def _shortest_unique_key(place: tuple[str, ...], others: list[tuple[str, ...]]) -> tuple[str, ...]:
    """The shortest part of a place that makes it unique, without the prefix that all places share."""
    if not others:
        return ()
    together = zip(place, *others, strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda parts: len(set(parts)) == 1, together))
    ends = (n for n in range(shared, len(place)) if all(other[:n] != place[:n] for other in others))
    return place[shared : next(ends, len(place))]
