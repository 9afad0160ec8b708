"""Storage: the format in which a moment is kept between two steps.

A transformation decodes a moment to float32, computes the step from float32 values, and encodes what is
kept. Formats are added here and nowhere else: no transformation asks which one it has.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from adaptive_optax._precision import real_dtype, wide_dtype

Role = Literal["mu", "nu"]


class Storage(abc.ABC):
    """Interface of a format; instances are static and hashable.

    A moment is a tree of arrays, or a NamedTuple of parallel trees of arrays. Its structure, shapes and
    dtypes are those that `init` gave it, for ever.
    """

    @property
    def relative_error(self) -> float:
        """The largest |decode(encode(x)) - x| / |x|.

        Where it is inf, the default, small values may be lost or come back larger, and a transformation
        restores the bounds that it needs by a floor.
        """
        return math.inf

    @abc.abstractmethod
    def init(self, params_like: Any, role: Role) -> Any:
        """Returns the moment that decodes to zeros.

        Args:
            params_like: Arrays, or abstract arrays, with the moment's shapes; integer leaves do not occur.
            role: `"mu"`, signed (or complex), or `"nu"`, real and non-negative.
        """

    @abc.abstractmethod
    def decode(self, moment: Any, *, lower: Callable[[], Any] | None = None) -> Any:
        """Returns the moment as a tree of float32 arrays (float64 and complex stay what they are).

        Args:
            moment: What `init` or `encode` returned.
            lower: Returns an elementwise floor for the result, as a tree. Formats with a finite
                `relative_error` never call it.
        """

    @abc.abstractmethod
    def encode(self, moment: Any, values: Any, *, count: jax.Array, role: Role) -> Any:
        """Returns `values` in this format.

        Args:
            moment: The moment that is replaced; it has the structure, shapes and dtypes of the result.
            values: A tree of float32 (float64, complex) arrays.
            count: The number of the step, int32, from which random bits may be drawn.
            role: As in `init`.
        """


def _zeros(params_like: Any, role: Role) -> Any:
    dtype = real_dtype if role == "nu" else wide_dtype
    return jax.tree.map(lambda x: jnp.zeros_like(x, dtype=dtype(x)), params_like)


@dataclasses.dataclass(frozen=True)
class Float32(Storage):
    """Keeps a moment as it is computed: float32, or float64 and complex where the parameters are.

    State cost: 4 bytes a value. The moment shards as its parameter does when the state is initialised from
    sharded parameters outside `jit`.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> ao.scale_by_adam(nu_storage=ao.Float32()).init(jnp.ones(3, jnp.bfloat16)).nu.dtype
        dtype('float32')
    """

    @property
    def relative_error(self) -> float:
        """Zero: nothing is rounded."""
        return 0.0

    def init(self, params_like: Any, role: Role) -> Any:
        """Returns zeros like the parameters."""
        return _zeros(params_like, role)

    def decode(self, moment: Any, *, lower: Callable[[], Any] | None = None) -> Any:
        """Returns the moment itself."""
        return moment

    def encode(self, moment: Any, values: Any, *, count: jax.Array, role: Role) -> Any:
        """Returns the values in the moment's dtypes."""
        return jax.tree.map(lambda old, new: new.astype(old.dtype), moment, values)


@dataclasses.dataclass(frozen=True)
class NearestCast(Storage):
    """Keeps a moment in another dtype, rounded to nearest: what optax's `mu_dtype` means."""

    dtype: Any

    @property
    def relative_error(self) -> float:
        """Half a unit in the last place; without bound where the dtype's range is smaller than float32's."""
        limits = jnp.finfo(self.dtype)
        return float(limits.eps) / 2 if limits.tiny <= jnp.finfo(jnp.float32).tiny else math.inf

    def init(self, params_like: Any, role: Role) -> Any:
        """Returns zeros in the dtype; complex leaves stay complex."""

        def cast(x):
            return x if jnp.iscomplexobj(x) else x.astype(self.dtype)

        return jax.tree.map(cast, _zeros(params_like, role))

    def decode(self, moment: Any, *, lower: Callable[[], Any] | None = None) -> Any:
        """Returns the moment widened to float32."""
        return jax.tree.map(lambda x: x.astype(wide_dtype(x)), moment)

    def encode(self, moment: Any, values: Any, *, count: jax.Array, role: Role) -> Any:
        """Rounds the values to the moment's dtypes."""
        return Float32().encode(moment, values, count=count, role=role)


_BY_NAME = {"float32": Float32()}


def as_storage(name: str, value: Storage | str) -> Storage:
    """Returns the storage that the argument called `name` means."""
    if isinstance(value, Storage):
        return value
    if isinstance(value, str) and value in _BY_NAME:
        return _BY_NAME[value]
    known = ", ".join(map(repr, _BY_NAME))
    raise ValueError(f"{name} must be a Storage or one of {known}, got {value!r}.")


def as_nearest(name: str, dtype: Any) -> Storage:
    """Returns the storage that an argument such as optax's `mu_dtype` means: `Float32` for None."""
    if dtype is None:
        return Float32()
    try:
        dtype = jnp.dtype(dtype)
        floating = jnp.issubdtype(dtype, jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise ValueError(f"{name} must be None or a floating dtype, got {dtype!r}.")
    return NearestCast(dtype)
