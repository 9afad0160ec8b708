"""Low-precision parameters that are right in expectation, and the choice among three ways to train them.

`optax.apply_updates` rounds to the nearest value of the parameter's dtype. In bfloat16, with 8 bits, a step
of less than 1/512 of a parameter has no effect. Three transformations keep what it loses:

| transformation        | keeps                    | extra state           | good for               |
| --------------------- | ------------------------ | --------------------- | ---------------------- |
| `stochastic_rounding` | the step, in expectation | none                  | most; adds noise       |
| `kahan_summation`     | about 16 bits            | 2 bytes per parameter | steps above 2⁻¹⁶ of p  |
| `master_weights`      | float32's 24 bits        | 4 bytes per parameter | everything             |

All three leave float32 and wider leaves unchanged.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adaptive_optax._core.checks import check_integer, check_params, check_same_tree
from adaptive_optax._core.coordinates import places
from adaptive_optax._core.low_precision import (
    check_low_precision,
    in_float32,
    rounded_growth,
    update_to_reach,
)
from adaptive_optax._core.precision import incremented, widen
from adaptive_optax._core.random_bits import (
    is_low_precision,
    random_bits,
    round_stochastically,
)
from adaptive_optax._core.sharding import traced_sharding
from adaptive_optax._core.state_check import check_state
from adaptive_optax._core.transformation import transformation
from adaptive_optax._core.trees import Count, by_leaf


class StochasticRoundingState(NamedTuple):
    """State of `stochastic_rounding`.

    Attributes:
        count: Number of steps taken.
    """

    count: Count


def stochastic_rounding(seed: int = 0) -> optax.GradientTransformationExtraArgs:
    r"""Rounds the new low-precision parameters up or down at random, so that they are right in expectation.

    Put it last in a chain. It is the first thing to try for bfloat16 or float16 parameters, since it costs no
    memory. A sum x = p + u between the neighbours a < b becomes b with probability (x - a) / (b - a). The
    standard deviation of the noise is at most half a unit in the last place, and the noise of different steps
    is independent. Nothing of a NaN is kept.

    Args:
        seed: The seed of the random bits, an integer in [0, 2^32). The bits are a hash of the seed, the
            coordinate, the step and the leaf: a restored run continues bit for bit, and the bits are the same
            under any sharding.

    Returns:
        The transformation; `update` needs `params`.

    Raises:
        ValueError: If `seed` is out of range (at construction), a leaf is not floating or has 8 bits (at
            init), or `params` is missing (at update).

    State cost: one counter.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp, optax
        >>> tx = optax.chain(ao.sgd(1.0), ao.stochastic_rounding())
        >>> params = jnp.ones(1000, jnp.bfloat16)
        >>> state = tx.init(params)
        >>> for _ in range(10):  # rounding to nearest would lose each of these steps
        ...     updates, state = tx.update(jnp.full(1000, -1e-3), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> bool(abs(params.astype(jnp.float32).mean() - 1.01) < 1e-3)
        True

    Source: Gupta et al. 2015, "Deep learning with limited numerical precision", section 3; for bfloat16
    training Zamirai et al. 2020, "Revisiting BFloat16 training", section 4.
    """
    check_integer("seed", seed, "[0, 4294967295]")

    def init_fn(params):
        check_low_precision("stochastic_rounding", params)
        return StochasticRoundingState(jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        check_params("stochastic_rounding", params)
        check_same_tree("stochastic_rounding", "updates", updates, "params", params)
        check_state("stochastic_rounding", state, init_fn, "params", params)

        updates = widen(updates)
        updates = _step_rounded((state.count, seed), updates, params, places(updates))
        return updates, StochasticRoundingState(incremented(state.count))

    return transformation("stochastic_rounding", init_fn, update_fn, growth=rounded_growth)


@by_leaf(like="u")
def _step_rounded(step: tuple[jax.Array, int], u: jax.Array, p: jax.Array, place: Any) -> jax.Array:
    count, seed = step
    if not is_low_precision(p):
        return u
    bits = random_bits(p.shape, count, place, "parameter", seed, sharding=traced_sharding(p))
    return update_to_reach(p, round_stochastically(in_float32(p) + in_float32(u), p.dtype, bits))
