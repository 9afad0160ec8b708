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

from adaptive_optax._paths import paths_and_leaves
from adaptive_optax._precision import cast, real_dtype, wide_dtype, widen

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

    @property
    def largest_decay(self) -> float:
        """The largest decay of a moving average that moves in this format; 1, the default, for any."""
        return 1.0

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


def zeros(params_like: Any, role: Role) -> Any:
    """Returns a moment of zeros in the dtypes in which it is computed."""
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
        return zeros(params_like, role)

    def decode(self, moment: Any, *, lower: Callable[[], Any] | None = None) -> Any:
        """Returns the moment itself."""
        check_kept_as(self, moment, wide_dtype)
        return moment

    def encode(self, moment: Any, values: Any, *, count: jax.Array, role: Role) -> Any:
        """Returns the values in the moment's dtypes."""
        return cast_like(moment, values)


@dataclasses.dataclass(frozen=True)
class NearestCast(Storage):
    """Keeps a moment in another dtype, rounded to nearest: what optax's `mu_dtype` means."""

    dtype: Any

    @property
    def largest_decay(self) -> float:
        """That of a step which takes half a unit in the last place: a smaller one rounds back."""
        return 1 - float(jnp.finfo(self.dtype).eps) / 2

    @property
    def relative_error(self) -> float:
        """Half a unit in the last place; without bound where the dtype's range is smaller than float32's."""
        limits = jnp.finfo(self.dtype)
        return float(limits.eps) / 2 if limits.tiny <= jnp.finfo(jnp.float32).tiny else math.inf

    def init(self, params_like: Any, role: Role) -> Any:
        """Returns zeros in the dtype; complex leaves stay complex."""
        return jax.tree.map(lambda x: x.astype(self._kept_as(x)), zeros(params_like, role))

    def decode(self, moment: Any, *, lower: Callable[[], Any] | None = None) -> Any:
        """Returns the moment widened to float32."""
        check_kept_as(self, moment, self._kept_as)
        return widen(moment)

    def encode(self, moment: Any, values: Any, *, count: jax.Array, role: Role) -> Any:
        """Rounds the values to the moment's dtypes."""
        return cast_like(moment, values)

    def _kept_as(self, x: Any) -> Any:
        return x.dtype if jnp.iscomplexobj(x) else jnp.dtype(self.dtype)


def cast_like(moment: Any, values: Any) -> Any:
    """Returns the values in the dtypes of a plain moment, rounded to nearest."""
    return jax.tree.map(lambda old, new: cast(new, old.dtype), moment, values)


def check_kept_as(storage: Storage, moment: Any, dtype: Callable[[Any], Any]) -> None:
    """Refuses a plain moment that was kept in another format, which a restored one may have been."""
    for path, x in paths_and_leaves(moment):
        if x.dtype != dtype(x):
            raise ValueError(
                f"A moment of {storage} must hold {dtype(x)}, got {x.dtype} at {path!r}: it was kept in "
                "another format. Move the state with convert_storage."
            )


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
