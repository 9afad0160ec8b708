"""Hyperparameters in the state: what the last step used, and values that replace the given ones."""

from __future__ import annotations

import functools
import inspect
import itertools
import numbers
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from adaptive_optax._checks import check_scalar, check_state
from adaptive_optax._precision import incremented, value_at
from adaptive_optax._rounding import is_low_precision
from adaptive_optax._states import unwrapped
from adaptive_optax.control.plateau import ReduceOnPlateauState
from adaptive_optax.transforms.learning_rate import ScaleByLearningRateState


class InjectHyperparamsState(NamedTuple):
    """State of `inject_hyperparams`.

    Attributes:
        count: Number of steps taken, int32 scalar.
        hyperparams: Name to the value that the last step used, or the next one is to use.
        given: Name to the value that the number or schedule that was given had in the last step.
        overridden: Name to whether the value in `hyperparams` was set from outside, bool scalars.
        inner_state: The inner transformation's.
    """

    count: jax.Array
    hyperparams: dict[str, jax.Array]
    given: dict[str, jax.Array]
    overridden: dict[str, jax.Array]
    inner_state: Any


Factory = Callable[..., optax.GradientTransformation]


def inject_hyperparams(
    factory: Factory, static_args: str | Iterable[str] = (), hyperparam_dtype: Any = jnp.float32
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """Puts the hyperparameters of a factory into the state, where they can be read, set and swept.

    optax's function of the same name, for every factory of this library and of optax. A value in the state
    is data, so changing it costs no compilation: sweep it, anneal it by hand, or `vmap` over states with a
    value for each member. Read values with `get_hyperparams`, set them with `set_hyperparams`.

    Which arguments are in the state: real numbers (not bools; not where the annotation says `int`), and
    schedules. A callable is a schedule where the parameter's default is a number or its annotation has a
    number beside the callable (`optax.ScalarOrSchedule`); everything else, masks, label functions, dtypes,
    goes to the factory as it is. Differences from optax: values are float32 whatever the parameters' dtype
    (in bfloat16 a b2 of 0.999 is 1), a mask is not taken for a schedule, and a value set from outside stays,
    also in place of a schedule and by assignment to `state.hyperparams[name]`.

    Where parameters are bfloat16 or float16, the inner state has from the start the dtypes that its first
    update gives it (optax's states widen then), unless that update needs extra arguments.

    Args:
        factory: Returns a transformation; its signature names the hyperparameters.
        static_args: Names of arguments that go to the factory as they are, whatever they are.
        hyperparam_dtype: The dtype of the values in the state.

    Returns:
        A function with the factory's signature that returns the transformation. Its `update` passes extra
        arguments on.

    Raises:
        ValueError: If `factory` is not callable, `static_args` names no parameter of it, or
            `hyperparam_dtype` is not floating; what the factory raises for the values given, at once.

    State cost: the inner state, and three scalars a hyperparameter.

    Example:
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
    try:  # None would be NumPy's float64
        is_floating = hyperparam_dtype is not None and jnp.issubdtype(hyperparam_dtype, jnp.floating)
    except TypeError:
        is_floating = False
    if not is_floating:
        raise ValueError(f"hyperparam_dtype must be a floating dtype, got {hyperparam_dtype!r}.")
    dtype, hints = jnp.dtype(hyperparam_dtype), _hints(factory)

    def is_hyperparameter(name, value):
        return _is_hyperparameter(value, signature.parameters[name].default, hints.get(name))

    @functools.wraps(factory)
    def wrapped(*args, **kwargs) -> optax.GradientTransformationExtraArgs:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        values = {}
        for name, value in bound.arguments.items():
            if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                values |= {key: x for key, x in value.items() if key not in static and _is_number(x)}
            elif name not in static and is_hyperparameter(name, value):
                values[name] = value

        def build(numbers):
            """The inner transformation with numbers for the hyperparameters."""
            arguments = inspect.BoundArguments(signature, dict(bound.arguments))
            for name, value in bound.arguments.items():
                if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                    arguments.arguments[name] = value | {key: numbers[key] for key in value if key in numbers}
                elif name in numbers:
                    arguments.arguments[name] = numbers[name]
            return optax.with_extra_args_support(factory(*arguments.args, **arguments.kwargs))

        def given_at(count):
            return {name: value_at(value, count, dtype) for name, value in values.items()}

        build(given_at(jnp.zeros((), jnp.int32)))  # so that the factory refuses what it refuses now

        def init_fn(params):
            count = jnp.zeros((), jnp.int32)
            given = given_at(count)
            inner = build(given)
            return InjectHyperparamsState(
                count=count,
                hyperparams=given,
                given=given_at(count),  # arrays of its own, so that the state can be donated
                overridden={name: jnp.zeros((), bool) for name in values},
                inner_state=_settled(inner, inner.init(params), params),
            )

        def update_fn(updates, state, params=None, **extra_args):
            check_state("inject_hyperparams", state, InjectHyperparamsState)
            given = given_at(state.count)
            used, overridden = {}, {}
            for name, value in given.items():
                current, before = jnp.asarray(state.hyperparams[name], dtype), state.given[name]
                # What was assigned to the dictionary without the flag differs from what was given; a NaN that
                # a schedule gave is no assignment.
                changed = (current != before) & ~(jnp.isnan(current) & jnp.isnan(before))
                overridden[name] = state.overridden[name] | changed
                used[name] = jnp.where(overridden[name], current, value)
            updates, inner_state = build(used).update(updates, state.inner_state, params, **extra_args)
            count = incremented(state.count)
            return updates, InjectHyperparamsState(count, used, given, overridden, inner_state)

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return wrapped


def _hints(factory: Factory) -> dict[str, Any]:
    target = factory.func if isinstance(factory, functools.partial) else factory
    target = target if inspect.isroutine(target) else type(target).__call__
    hints, names = {}, getattr(inspect.unwrap(target), "__globals__", {})
    # One by one: an annotation that only a type checker can resolve leaves the others as they are.
    for name, annotation in inspect.get_annotations(target).items():
        try:
            hints[name] = eval(annotation, names) if isinstance(annotation, str) else annotation
        except (NameError, AttributeError, TypeError, SyntaxError):
            continue
    return hints


def _is_number(value: Any) -> bool:
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.number)
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_hyperparameter(value: Any, default: Any, hint: Any) -> bool:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = set(typing.get_args(hint)) if union else {hint}
    takes_real = float in members
    if callable(value):
        return takes_real or _is_number(default)
    return _is_number(value) and (takes_real or int not in members)


def _settled(inner: optax.GradientTransformationExtraArgs, state: Any, params: Any) -> Any:
    """A fresh state in the dtypes that its first update gives it.

    States of optax are made in the parameters' dtype and then follow float32 hyperparameters.
    """
    if not any(is_low_precision(x) for x in jax.tree.leaves(params)):
        return state
    try:
        _, later = jax.eval_shape(inner.update, params, state, params)
    except TypeError:  # an extra argument is missing, which only the caller of update has
        return state
    return jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), state, later)


def get_hyperparams(opt_state: Any) -> dict[str, jax.Array]:
    """Returns the hyperparameters that the last step used.

    Every state of this library carries the values that may move: learning rate, decays, eps, momentum,
    weight decay. Before the first step they are those of the first step; a value that was set is shown at
    once. Values that `inject_hyperparams` holds hide those of the same name inside it.

    Args:
        opt_state: The state of any transformation, at any depth of `optax.chain`, `optax.partition` and
            wrappers; also `nnx.Optimizer(...).opt_state`.

    Returns:
        Name to scalar array. A name that occurs once stands bare; one that occurs more often has before it
        what tells its occurrences apart, a chain index or a partition label: `"0/decay"`, `"head/b1"`.

    Raises:
        ValueError: If there is none, as in an optimizer in place of its state.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> state = ao.adam(ao.exponential_decay(0.1, 100, 0.5)).init(jnp.ones(2))
        >>> sorted(ao.get_hyperparams(state))
        ['b1', 'b2', 'eps', 'learning_rate']
    """
    return {key: unwrapped(found.value) for key, found in _found(opt_state).items()}


def learning_rates(opt_state: Any) -> list[jax.Array]:
    """Returns the learning rates that the last step used, those that injected ones hide left out."""
    return [found.value for found in _walk(opt_state, (), frozenset()) if found.name == "learning_rate"]


T = TypeVar("T")
_SETTABLE = (InjectHyperparamsState, ScaleByLearningRateState, ReduceOnPlateauState)


def set_hyperparams(opt_state: T, **values: Any) -> T:
    """Sets hyperparameters, in place of the numbers or schedules that were given, until released with None.

    Settable are those of `inject_hyperparams`, the learning rate of `scale_by_learning_rate`, which every
    optimizer of this library ends in, and the scale of `reduce_on_plateau`, which goes on from there (None
    puts it to 1).

    Args:
        opt_state: The state of any transformation, at any depth.
        **values: Name, as `get_hyperparams` has it, to a scalar, or None to release it to what was given.
            Names with a slash go in a dictionary: `set_hyperparams(state, **{"head/learning_rate": 1e-4})`.
            A state that was made under `vmap` takes one value for all members or an array of them.

    Returns:
        The state; the one given stays as it is.

    Raises:
        ValueError: If a name is unknown, has several places, or can only be read (listing the keys), or a
            value is no real scalar or, for a learning rate, negative.

    Example:
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
            problem = f"stands for {same}" if same else "is unknown"
            raise ValueError(f"set_hyperparams: {key!r} {problem}; the keys are {', '.join(found)}.")
        place = found[key]
        if not isinstance(place.owner, _SETTABLE):
            raise ValueError(
                f"set_hyperparams: {key!r} of {type(place.owner).__name__} can only be read; wrap the "
                f"factory in inject_hyperparams to set it. The keys are {', '.join(found)}."
            )
        opt_state = _replaced(opt_state, place.path, _with_value(place.owner, place.name, value))
    return opt_state


def _with_value(owner: Any, name: str, value: Any) -> Any:
    """The state that holds a hyperparameter, with a value for it or, for None, released."""
    if isinstance(owner, ScaleByLearningRateState):
        if value is None:
            return owner._replace(override=_filled(owner.override, -1.0))
        _check_value(name, value, owner.override, "[0, inf)")
        return owner._replace(
            learning_rate=_filled(owner.learning_rate, value), override=_filled(owner.override, value)
        )
    if isinstance(owner, ReduceOnPlateauState):
        scale = 1.0 if value is None else value
        _check_value(name, scale, owner.scale, "[0, inf)")
        return owner._replace(scale=_filled(owner.scale, scale))
    if value is not None:
        interval = "[0, inf)" if name == "learning_rate" else "(-inf, inf)"
        _check_value(name, value, owner.given[name], interval)
    new = unwrapped(owner.given[name]) if value is None else value
    return owner._replace(
        hyperparams=owner.hyperparams | {name: _filled(owner.given[name], new)},  # it may hold a plain float
        overridden=owner.overridden | {name: _filled(owner.overridden[name], value is not None)},
    )


def _check_value(name: str, value: Any, like: Any, interval: str) -> None:
    """Refuses a value that is no scalar, or an array of them where a vmapped state has one a member."""
    shape, members = unwrapped(like).shape, [value]
    if shape and np.shape(value) == shape:
        members = [jnp.ravel(value)[0]] if isinstance(value, Tracer) else np.ravel(value)
    for member in members:
        check_scalar(name, member, interval)


def _filled(like: Any, value: Any) -> Any:
    array = unwrapped(like)
    new = jnp.broadcast_to(jnp.asarray(value, array.dtype), array.shape) + jnp.zeros_like(array)
    return like.replace(new) if hasattr(like, "get_value") else new


class _Found(NamedTuple):
    owner: Any
    path: tuple[Any, ...]
    name: str
    value: Any


def _found(opt_state: Any) -> dict[str, _Found]:
    """The hyperparameters by the shortest key that tells them apart."""
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
        result["/".join([*_telling(place, others), one.name])] = one
    return result


def _place(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(key) for key in path)


def _walk(state: Any, path: tuple[Any, ...], hidden: frozenset[str]) -> Iterator[_Found]:
    # Variables of nnx: OptVariable and OptArray wrap arrays, never containers that hold hyperparameters.
    if isinstance(state, InjectHyperparamsState):
        own = state.hyperparams
        yield from (_Found(state, path, name, own[name]) for name in own if name not in hidden)
        yield from _walk(state.inner_state, (*path, "inner_state"), hidden | own.keys())
        return
    for name in getattr(state, "hyperparameters", ()):
        if name not in hidden:
            yield _Found(state, path, name, getattr(state, name))
    for key, child in _children(state):
        yield from _walk(child, (*path, key), hidden)


def _children(state: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(state, dict):
        return state.items()
    if hasattr(state, "_fields"):
        return state._asdict().items()
    return enumerate(state) if isinstance(state, tuple | list) else ()


def _replaced(state: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The state with a part of it replaced."""
    if not path:
        return new
    key, *rest = path
    if hasattr(state, "_fields"):
        return state._replace(**{key: _replaced(getattr(state, key), tuple(rest), new)})
    child = _replaced(state[key], tuple(rest), new)
    if isinstance(state, dict):
        return type(state)(state | {key: child})
    return type(state)([*state[:key], child, *state[key + 1 :]])


def _telling(place: tuple[str, ...], others: list[tuple[str, ...]]) -> tuple[str, ...]:
    """The shortest part of a place that tells it from the others, without what all of them begin with."""
    if not others:
        return ()
    together = zip(place, *others, strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda parts: len(set(parts)) == 1, together))
    ends = (n for n in range(shared, len(place)) if all(other[:n] != place[:n] for other in others))
    return place[shared : next(ends, len(place))]
