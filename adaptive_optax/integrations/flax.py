"""The public place for Flax's train state and functions; the code is in `adaptive_optax.interop.flax`."""

from adaptive_optax.interop.flax import TrainState as TrainState
from adaptive_optax.interop.flax import optimizer_from_state as optimizer_from_state
from adaptive_optax.interop.flax import value_fn as value_fn
