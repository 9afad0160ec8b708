"""Storage: the format in which a moment is kept between two steps.

A transformation decodes a moment to float32, computes the step from float32 values, and encodes the result.
To add a format, write one subclass of `Storage`; no transformation checks which one it has.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_optax._core.paths import paths_and_leaves
from adaptive_optax._core.precision import cast, real_dtype, wide_dtype, widen
from adaptive_optax._core.trees import Count, Moment, Params, PyTree

Role = Literal["mu", "nu"]
"""Which moment is stored: the signed `mu`, or `nu`, which is never negative."""


class Storage(abc.ABC):
    """Interface for storage formats; instances are static and hashable.

    A moment takes one of two forms. It always keeps the structure, shapes and dtypes that `init` gave it.

    * *Plain*: a tree of floating arrays like the parameters that holds the values of the moment.
    * *Compressed*: a `CompressedMoment`, a NamedTuple of arrays and trees of arrays that decodes itself, so
      that `dense`, telemetry, `convert_storage` and the conversions between libraries can read a state
      without knowing its format.

    Building a transformation with any other kind of storage raises an error (`check_storage`).
    """

    @property
    def relative_error(self) -> float:
        """The largest |decode(encode(x)) - x| / |x|.

        If it is inf, the default, small values may be lost or come back larger, and a transformation applies
        a floor to restore the bounds it needs.
        """
        return math.inf

    @property
    def only_rounds(self) -> bool:
        """Whether `encode` only rounds each value to a neighbour in a dtype with float32's range.

        Then encoding a decoded moment gives the moment back, and finite values stay finite, which makes
        `reject_nonfinite` faster. False by default.
        """
        return False

    @property
    def largest_decay(self) -> float:
        """The largest decay with which a moving average still changes in this format; 1 (default) for any."""
        return 1.0

    @abc.abstractmethod
    def init(self, params_like: Params, role: Role) -> Moment:
        """Returns a moment that decodes to zeros.

        Args:
            params_like: Arrays or abstract arrays with the moment's shapes; there are no integer leaves.
            role: `"mu"`, signed (or complex), or `"nu"`, real and non-negative.
        """

    @abc.abstractmethod
    def decode(self, moment: Moment, *, lower: Callable[[], PyTree] | None = None) -> PyTree:
        """Returns the moment as a tree of float32 arrays (float64 and complex are kept).

        Args:
            moment: The result of `init` or `encode`.
            lower: Returns an elementwise floor for the result, as a tree. Formats with a finite
                `relative_error` never call it.
        """

    @abc.abstractmethod
    def encode(self, moment: Moment, values: PyTree, *, count: Count, role: Role) -> Moment:
        """Returns `values` in this format.

        Args:
            moment: The moment to replace; it has the structure, shapes and dtypes of the result.
            values: A tree of float32 (float64, complex) arrays.
            count: The number of the step, int32, which may seed random bits.
            role: As in `init`.
        """


@runtime_checkable
class CompressedMoment(Protocol):
    """Interface for a NamedTuple that decodes itself, for a moment whose arrays are not its values.

    A `Storage` that needs more than a tree of floating arrays makes such moments. Nothing has to be derived
    from this class: the two methods are enough.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> isinstance(ao.Int8().init(jnp.ones(64), "mu"), ao.CompressedMoment)
        True
    """

    def decoded(self) -> PyTree:
        """Returns the values, as `Storage.decode` does without a floor."""
        ...

    def encode_like(self, values: PyTree, *, count: Count, role: Role) -> Moment:
        """Encodes `values` in the format of this moment, as `Storage.encode` does."""
        ...


def check_storage(name: str, storage: Storage) -> None:
    """Raises if moments cannot be decoded without their storage, which `dense` would get wrong silently.

    It stores a few values in it, once per storage and process.

    Raises:
        ValueError: With the argument, the storage and the problem.
    """
    try:
        problem = _interface_violation(storage)
    except TypeError as error:
        raise ValueError(f"{name} must be hashable (a frozen dataclass), got {storage!r}.") from error
    if problem is not None:
        raise ValueError(f"{name} must follow the interface of Storage, got {storage!r}: {problem}.")


@functools.lru_cache(maxsize=256)
def _interface_violation(storage: Storage) -> str | None:
    """Finds what is wrong with a storage by storing a few values in it; None if nothing is."""
    with jax.ensure_compile_time_eval():
        for role in get_args(Role):
            problem = _violation(storage, role)
            if problem is not None:
                return f"{problem} (role {role!r})"
    return None


def _violation(storage: Storage, role: Role) -> str | None:
    ramp = np.linspace(0 if role == "nu" else -1, 1, 128, dtype=np.float32)
    values = {"long": jnp.asarray(ramp), "short": jnp.asarray(ramp[:3])}
    moment = storage.init(values, role)
    problem = _unreadable(moment, values)
    if problem is not None:
        return problem
    new = storage.encode(moment, values, count=jnp.asarray(1, jnp.int32), role=role)
    kept = [storage.decode(x) for x in (moment, new)]
    return _changed(moment, new) or _misread(kept, values, moment, new, role)


def _unreadable(moment: Any, values: Any) -> str | None:
    if isinstance(moment, CompressedMoment):
        return None if hasattr(moment, "_fields") else "a compressed moment must be a NamedTuple"
    if jax.tree.structure(moment) != jax.tree.structure(values):
        return (
            f"init returned a {type(moment).__name__} that is not a tree like the parameters, so it needs "
            "the methods decoded() and encode_like() of a CompressedMoment"
        )
    if not all(jnp.issubdtype(x.dtype, jnp.inexact) for x in jax.tree.leaves(moment)):
        return (
            "init returned a tree of integers, which cannot be the values: put them in a NamedTuple with the "
            "methods decoded() and encode_like() of a CompressedMoment"
        )
    return None


def _changed(old: Any, new: Any) -> str | None:
    if jax.tree.structure(old) != jax.tree.structure(new):
        return "encode returned a moment with another structure than init"
    if [jax.typeof(x) for x in jax.tree.leaves(old)] != [jax.typeof(x) for x in jax.tree.leaves(new)]:
        return "encode returned arrays with other shapes or dtypes than init"
    return None


def _misread(kept: list[Any], values: Any, old: Any, new: Any, role: Role) -> str | None:
    for tree in kept:
        if jax.tree.structure(tree) != jax.tree.structure(values) or any(
            x.shape != y.shape or x.dtype != jnp.float32
            for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(values), strict=True)
        ):
            return "decode must return a tree of float32 arrays in the moment's shapes"
    if any(np.any(np.asarray(x)) for x in jax.tree.leaves(kept[0])):
        return "the result of init must decode to zeros"
    for tree, moment in zip(kept, (old, new), strict=True):
        read = moment.decoded() if isinstance(moment, CompressedMoment) else widen(moment)
        if not _are_equal(read, tree):
            return "decode and the moment itself give different values, so other code could not read it"
    if isinstance(new, CompressedMoment):
        again = new.encode_like(values, count=jnp.asarray(1, jnp.int32), role=role)
        if not _are_equal(again, new):
            return "encode_like() and encode give different moments"
    return None


def _are_equal(x: Any, y: Any) -> bool:
    if jax.tree.structure(x) != jax.tree.structure(y):
        return False
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def zeros(params_like: PyTree, role: Role) -> Any:
    """Returns a moment of zeros in the dtypes in which moments are computed."""
    dtype = real_dtype if role == "nu" else wide_dtype
    return jax.tree.map(lambda x: jnp.zeros_like(x, dtype=dtype(x)), params_like)


@dataclasses.dataclass(frozen=True)
class Float32(Storage):
    """Keeps a moment as it is computed: float32, or float64 or complex if the parameters are.

    State cost: 4 bytes per value. The moment has its parameter's sharding if the state is initialised from
    sharded parameters outside `jit`.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> ao.scale_by_adam(nu_storage=ao.Float32()).init(jnp.ones(3, jnp.bfloat16)).nu.dtype
        dtype('float32')
    """

    @property
    def relative_error(self) -> float:
        """Zero: nothing is rounded."""
        return 0.0

    @property
    def only_rounds(self) -> bool:
        """True."""
        return True

    def init(self, params_like: Params, role: Role) -> Moment:
        """Returns zeros like the parameters."""
        return zeros(params_like, role)

    def decode(self, moment: Moment, *, lower: Callable[[], PyTree] | None = None) -> PyTree:
        """Returns the moment itself."""
        check_kept_as(self, moment, wide_dtype)
        return moment

    def encode(self, moment: Moment, values: PyTree, *, count: Count, role: Role) -> Moment:
        """Returns the values in the moment's dtypes."""
        return cast_like(moment, values)


@dataclasses.dataclass(frozen=True)
class NearestCast(Storage):
    """Keeps a moment in another dtype, rounded to nearest, as optax's `mu_dtype` does."""

    dtype: Any

    @property
    def largest_decay(self) -> float:
        """One minus half a unit in the last place; with a larger decay, a step would round back."""
        return 1 - float(jnp.finfo(self.dtype).eps) / 2

    @property
    def relative_error(self) -> float:
        """Half a unit in the last place; unbounded if the dtype's range is smaller than float32's."""
        return float(jnp.finfo(self.dtype).eps) / 2 if self.only_rounds else math.inf

    @property
    def only_rounds(self) -> bool:
        """Whether the dtype has float32's range."""
        return bool(jnp.finfo(self.dtype).tiny <= jnp.finfo(jnp.float32).tiny)

    def init(self, params_like: Params, role: Role) -> Moment:
        """Returns zeros in the dtype; complex leaves stay complex."""
        return jax.tree.map(lambda x: x.astype(self._kept_as(x)), zeros(params_like, role))

    def decode(self, moment: Moment, *, lower: Callable[[], PyTree] | None = None) -> PyTree:
        """Returns the moment widened to float32."""
        check_kept_as(self, moment, self._kept_as)
        return widen(moment)

    def encode(self, moment: Moment, values: PyTree, *, count: Count, role: Role) -> Moment:
        """Rounds the values to the moment's dtypes."""
        return cast_like(moment, values)

    def _kept_as(self, x: Any) -> Any:
        return x.dtype if jnp.iscomplexobj(x) else jnp.dtype(self.dtype)


def cast_like(moment: PyTree, values: PyTree) -> Any:
    """Returns the values in the dtypes of a plain moment, rounded to nearest."""
    return jax.tree.map(lambda old, new: cast(new, old.dtype), moment, values)


def check_kept_as(storage: Storage, moment: PyTree, dtype: Callable[[Any], Any]) -> None:
    """Raises if a plain moment, which may have been restored, was stored in another format."""
    for path, x in paths_and_leaves(moment):
        if x.dtype != dtype(x):
            raise ValueError(
                f"A moment of {storage} must have dtype {dtype(x)}, got {x.dtype} at {path!r}, which is "
                "another format. Convert the state with convert_storage."
            )


def as_nearest(name: str, dtype: Any) -> Storage:
    """Returns the storage for an argument such as optax's `mu_dtype`; `Float32` for None."""
    if dtype is None:
        return Float32()
    try:
        dtype = jnp.dtype(dtype)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            dtype = jnp.finfo(dtype).dtype  # for real leaves; complex leaves stay complex in any case
        floating = jnp.issubdtype(dtype, jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise ValueError(f"{name} must be None or a floating dtype, got {dtype!r}.")
    return NearestCast(dtype)
