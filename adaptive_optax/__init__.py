"""Adaptive learning rates for JAX, as composable optax transformations."""

# Granularity and storage of a second moment
# Reading and checking
from adaptive_optax.control.hyperparams import get_hyperparams as get_hyperparams
from adaptive_optax.invariants import verified as verified
from adaptive_optax.moments.granularity import Axis as Axis
from adaptive_optax.moments.granularity import Coordinate as Coordinate
from adaptive_optax.moments.granularity import Global as Global
from adaptive_optax.moments.granularity import Granularity as Granularity
from adaptive_optax.moments.granularity import Labels as Labels
from adaptive_optax.moments.granularity import Tensor as Tensor
from adaptive_optax.moments.storage import Float32 as Float32
from adaptive_optax.moments.storage import Storage as Storage

# Optimizers
from adaptive_optax.optimizers import adam as adam
from adaptive_optax.optimizers import adamw as adamw
from adaptive_optax.optimizers import global_rmsprop as global_rmsprop
from adaptive_optax.optimizers import rmsprop as rmsprop
from adaptive_optax.optimizers import sgd as sgd

# Schedules
from adaptive_optax.schedules import OneCycle as OneCycle
from adaptive_optax.schedules import cyclical as cyclical
from adaptive_optax.schedules import exponential_decay as exponential_decay
from adaptive_optax.schedules import inverse_sqrt as inverse_sqrt
from adaptive_optax.schedules import one_cycle as one_cycle
from adaptive_optax.schedules import per_epoch as per_epoch
from adaptive_optax.schedules import step_decay as step_decay
from adaptive_optax.schedules import warmup_cosine as warmup_cosine
from adaptive_optax.schedules import warmup_stable_decay as warmup_stable_decay

# Transformations
from adaptive_optax.transforms.adam import ScaleByAdamState as ScaleByAdamState
from adaptive_optax.transforms.adam import adam_bound as adam_bound
from adaptive_optax.transforms.adam import scale_by_adam as scale_by_adam
from adaptive_optax.transforms.averaging import AverageParametersState as AverageParametersState
from adaptive_optax.transforms.averaging import average_parameters as average_parameters
from adaptive_optax.transforms.averaging import averaged_parameters as averaged_parameters
from adaptive_optax.transforms.clipping import clip_by_global_norm as clip_by_global_norm
from adaptive_optax.transforms.clipping import global_norm as global_norm
from adaptive_optax.transforms.learning_rate import ScaleByLearningRateState as ScaleByLearningRateState
from adaptive_optax.transforms.learning_rate import scale_by_learning_rate as scale_by_learning_rate
from adaptive_optax.transforms.momentum import TraceState as TraceState
from adaptive_optax.transforms.momentum import trace as trace
from adaptive_optax.transforms.rms import ScaleByRmsState as ScaleByRmsState
from adaptive_optax.transforms.rms import scale_by_global_rms as scale_by_global_rms
from adaptive_optax.transforms.rms import scale_by_rms as scale_by_rms
from adaptive_optax.transforms.weight_decay import (
    AddDecoupledWeightDecayState as AddDecoupledWeightDecayState,
)
from adaptive_optax.transforms.weight_decay import add_decoupled_weight_decay as add_decoupled_weight_decay

__version__ = "0.1.0"


def __getattr__(name: str):
    # The study needs pandas and matplotlib, so it is imported when it is used.
    if name == "study":
        import importlib

        return importlib.import_module("adaptive_optax.study")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
