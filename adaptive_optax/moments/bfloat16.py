"""bfloat16 moments: half the memory, and unbiased with stochastic rounding.

bfloat16 has float32's range and 8 bits of precision. Rounded to nearest, a moment with a decay near 1 never
changes: 0.999 v rounds back to v. Rounded up or down at random, with probabilities that give the right
expected value, it follows the float32 moment for any decay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_optax._core.checks import check_choice
from adaptive_optax._core.coordinates import places
from adaptive_optax._core.random_bits import is_low_precision, random_bits, round_stochastically
from adaptive_optax._core.sharding import traced_sharding
from adaptive_optax._core.trees import Count, Moment, Params, PyTree, by_leaf
from adaptive_optax.moments.storage import NearestCast, Role, Storage

_NEAREST = NearestCast(jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class BFloat16(Storage):
    r"""Keeps a moment in bfloat16.

    Use it to halve the state of Adam. With `"stochastic"` rounding a value x between the bfloat16 neighbours
    a < b becomes b with probability (x - a) / (b - a), so its expectation is x. In a moving average with
    decay $\beta$, rounding adds a relative standard deviation of about
    $2^{-8} / \sqrt{2.8 (1 - \beta^2)}$, 0.5 % at 0.9, and less where a step is far below a unit in the
    last place: 4 % rather than 5 % for the second moment at 0.999.

    The random bits are a hash of the coordinate, the step and the leaf. They need no state, a restored run
    continues bit for bit, and they are the same under any sharding. Under `vmap` all members draw the same
    bits; under `shard_map` coordinates count from the shard's own corner.

    On a CPU compile the step with `jax.jit(step, donate_argnums=(0, 1), compiler_options={
    "xla_cpu_copy_insertion_use_region_analysis": True})`. Without the option XLA copies the old moments
    before overwriting them, which takes longer than the rest of the step, as with optax's `mu_dtype`.

    Complex moments stay complex64.

    Args:
        rounding: `"stochastic"` (default), or `"nearest"`, which is not allowed with decays above 1 - 2^-8.

    Raises:
        ValueError: If `rounding` is unknown; when a transformation is built, if the decay is too close to 1
            for `"nearest"` (decays that are schedules or tracers are not known, so they are not checked).

    State cost: 2 bytes per value.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> tx = ao.scale_by_adam(mu_storage="bfloat16", nu_storage=ao.BFloat16())
        >>> tx.init(jnp.ones(3)).nu.dtype
        dtype(bfloat16)

    Source: stochastic rounding as in Gupta et al. 2015, "Deep learning with limited numerical precision",
    section 3.
    """

    rounding: Literal["stochastic", "nearest"] = "stochastic"

    def __post_init__(self) -> None:
        check_choice("rounding", self.rounding, ("stochastic", "nearest"))

    @property
    def relative_error(self) -> float:
        """One unit in the last place; half of it when rounding to nearest."""
        return _NEAREST.relative_error * (1 if self.rounding == "nearest" else 2)

    @property
    def only_rounds(self) -> bool:
        """True."""
        return True

    @property
    def largest_decay(self) -> float:
        """1, so any decay works; 1 - 2^-8 when rounding to nearest."""
        return _NEAREST.largest_decay if self.rounding == "nearest" else 1.0

    def init(self, params_like: Params, role: Role) -> Moment:
        """Returns bfloat16 zeros."""
        return _NEAREST.init(params_like, role)

    def decode(self, moment: Moment, *, lower: Callable[[], PyTree] | None = None) -> PyTree:
        """Returns the moment widened to float32."""
        return _NEAREST.decode(moment)

    def encode(self, moment: Moment, values: PyTree, *, count: Count, role: Role) -> Moment:
        """Rounds the values to bfloat16."""
        if self.rounding == "nearest":
            return _NEAREST.encode(moment, values, count=count, role=role)

        return _round((count, role), moment, values, places(moment))


@by_leaf(like="old")
def _round(step: tuple[jax.Array, Role], old: jax.Array, x: jax.Array, place: Any) -> jax.Array:
    count, role = step
    if not is_low_precision(old):  # complex
        return x.astype(old.dtype)
    bits = random_bits(x.shape, count, place, role, sharding=traced_sharding(x))
    rounded = round_stochastically(x.astype(jnp.float32), jnp.bfloat16, bits)
    # The lower half is now 0, or belongs to a NaN. Dropping it keeps a NaN one, since arithmetic makes quiet
    # NaNs, whose bit is in the upper half. On a CPU dropping it is faster than rounding again.
    upper = jax.lax.bitcast_convert_type(rounded, jnp.uint32) >> np.uint32(16)
    return jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)
