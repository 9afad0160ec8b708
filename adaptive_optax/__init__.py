"""Adaptive learning rates for JAX, as composable optax transformations.

What holds for every transformation, and is not repeated in its docstring:

* A number may be a JAX scalar or a tracer, so that a sweep is a `vmap`. A concrete number out of range raises
  ValueError; the range of a tracer cannot be checked.
* Moments, arithmetic and updates are float32, or float64 where a parameter is, whatever the gradients' dtype.
  `optax.apply_updates` casts to the parameters' dtypes. `match_parameter_dtype` casts earlier, and wrappers
  around it keep its dtypes.
* `update` ignores extra arguments that it does not know; a wrapper forwards them to the inner transformation.
* Where nothing is remembered, as in clipping, a NaN or a huge gradient passes into the update of its step and
  no further.
* Second moments hold squares. Gradients must be 0 or between 1e-17 and 1e18 (1e15 where coordinates share a
  moment); smaller ones count as 0. A larger one can make a second moment infinite for good: the coordinates
  that share it stop moving, and a block of `Int8` becomes NaN. A NaN, or an infinite gradient, stays in any
  moment, and updates from it may be NaN. `reject_nonfinite` around the chain keeps all of these out.
"""

from typing import TYPE_CHECKING

from adaptive_optax import typing as typing
from adaptive_optax._core.coordinates import global_coordinates as global_coordinates

# Declarations of states, for transformations of your own
from adaptive_optax._core.states import carries_hyperparameters as carries_hyperparameters

# Hyperparameters, and conversion of states
from adaptive_optax.hyperparams import InjectHyperparamsState as InjectHyperparamsState
from adaptive_optax.hyperparams import get_hyperparams as get_hyperparams
from adaptive_optax.hyperparams import inject_hyperparams as inject_hyperparams
from adaptive_optax.hyperparams import set_hyperparams as set_hyperparams
from adaptive_optax.interop.adam_states import from_optax as from_optax
from adaptive_optax.interop.adam_states import to_optax as to_optax
from adaptive_optax.interop.convert_storage import convert_storage as convert_storage
from adaptive_optax.interop.convert_storage import state_bytes as state_bytes
from adaptive_optax.interop.sharding import state_sharding as state_sharding
from adaptive_optax.interop.torch_states import describe_from_torch as describe_from_torch
from adaptive_optax.interop.torch_states import from_torch as from_torch
from adaptive_optax.interop.torch_states import to_torch as to_torch
from adaptive_optax.interop.transfer import TransferRow as TransferRow
from adaptive_optax.interop.transfer import TransferTable as TransferTable
from adaptive_optax.interop.transfer import transfer_state as transfer_state

# Granularity and storage of a moment
from adaptive_optax.moments.adam_mini import FLAX_LAYOUT as FLAX_LAYOUT
from adaptive_optax.moments.adam_mini import AdamMiniBlocks as AdamMiniBlocks
from adaptive_optax.moments.bfloat16 import BFloat16 as BFloat16
from adaptive_optax.moments.by_path import ByPath as ByPath
from adaptive_optax.moments.carried import MomentField as MomentField
from adaptive_optax.moments.carried import carries_moments as carries_moments
from adaptive_optax.moments.formats import as_storage as as_storage
from adaptive_optax.moments.formats import dense as dense
from adaptive_optax.moments.granularity import Axis as Axis
from adaptive_optax.moments.granularity import Coordinate as Coordinate
from adaptive_optax.moments.granularity import Global as Global
from adaptive_optax.moments.granularity import Granularity as Granularity
from adaptive_optax.moments.granularity import Labels as Labels
from adaptive_optax.moments.granularity import Tensor as Tensor
from adaptive_optax.moments.granularity import as_granularity as as_granularity
from adaptive_optax.moments.int8 import Int8 as Int8
from adaptive_optax.moments.int8 import Int8Moment as Int8Moment
from adaptive_optax.moments.storage import CompressedMoment as CompressedMoment
from adaptive_optax.moments.storage import Float32 as Float32
from adaptive_optax.moments.storage import Storage as Storage

# Telemetry
from adaptive_optax.monitoring.log import TelemetryLog as TelemetryLog
from adaptive_optax.monitoring.telemetry import Telemetry as Telemetry
from adaptive_optax.monitoring.telemetry import TelemetryState as TelemetryState
from adaptive_optax.monitoring.telemetry import get_telemetry as get_telemetry
from adaptive_optax.monitoring.telemetry import telemetry as telemetry

# Optimizers
from adaptive_optax.optimizers import adam as adam
from adaptive_optax.optimizers import adam_mini as adam_mini
from adaptive_optax.optimizers import adamw as adamw
from adaptive_optax.optimizers import global_rmsprop as global_rmsprop
from adaptive_optax.optimizers import rmsprop as rmsprop
from adaptive_optax.optimizers import sgd as sgd

# Schedules
from adaptive_optax.schedules.batch_growth import BatchGrowth as BatchGrowth
from adaptive_optax.schedules.batch_growth import grow_batch as grow_batch
from adaptive_optax.schedules.cosine_restarts import cosine_restarts as cosine_restarts
from adaptive_optax.schedules.cyclical import cyclical as cyclical
from adaptive_optax.schedules.exponential_decay import exponential_decay as exponential_decay
from adaptive_optax.schedules.inverse_sqrt import inverse_sqrt as inverse_sqrt
from adaptive_optax.schedules.one_cycle import OneCycle as OneCycle
from adaptive_optax.schedules.one_cycle import one_cycle as one_cycle
from adaptive_optax.schedules.per_epoch import per_epoch as per_epoch
from adaptive_optax.schedules.replan import replan as replan
from adaptive_optax.schedules.step_decay import step_decay as step_decay
from adaptive_optax.schedules.warmup_cosine import warmup_cosine as warmup_cosine
from adaptive_optax.schedules.warmup_stable_decay import warmup_stable_decay as warmup_stable_decay

# Transformations
from adaptive_optax.transforms.adam import ScaleByAdamState as ScaleByAdamState
from adaptive_optax.transforms.adam import scale_by_adam as scale_by_adam
from adaptive_optax.transforms.adam_bound import adam_bound as adam_bound
from adaptive_optax.transforms.adgd import AdgdState as AdgdState
from adaptive_optax.transforms.adgd import adgd as adgd
from adaptive_optax.transforms.averaging import AverageParametersState as AverageParametersState
from adaptive_optax.transforms.averaging import EmaParametersState as EmaParametersState
from adaptive_optax.transforms.averaging import average_parameters as average_parameters
from adaptive_optax.transforms.averaging import averaged_parameters as averaged_parameters
from adaptive_optax.transforms.averaging import swap_averaged as swap_averaged
from adaptive_optax.transforms.clipping import clip_by_global_norm as clip_by_global_norm
from adaptive_optax.transforms.clipping import global_norm as global_norm
from adaptive_optax.transforms.learning_rate import ScaleByLearningRateState as ScaleByLearningRateState
from adaptive_optax.transforms.learning_rate import scale_by_learning_rate as scale_by_learning_rate
from adaptive_optax.transforms.match_parameter_dtype import (
    MatchParameterDtypeState as MatchParameterDtypeState,
)
from adaptive_optax.transforms.match_parameter_dtype import match_parameter_dtype as match_parameter_dtype
from adaptive_optax.transforms.momentum import TraceState as TraceState
from adaptive_optax.transforms.momentum import trace as trace
from adaptive_optax.transforms.reduce_on_plateau import ReduceOnPlateauState as ReduceOnPlateauState
from adaptive_optax.transforms.reduce_on_plateau import reduce_on_plateau as reduce_on_plateau
from adaptive_optax.transforms.rms import ScaleByRmsState as ScaleByRmsState
from adaptive_optax.transforms.rms import scale_by_global_rms as scale_by_global_rms
from adaptive_optax.transforms.rms import scale_by_rms as scale_by_rms
from adaptive_optax.transforms.stochastic_rounding import StochasticRoundingState as StochasticRoundingState
from adaptive_optax.transforms.stochastic_rounding import stochastic_rounding as stochastic_rounding
from adaptive_optax.transforms.weight_decay import (
    AddDecoupledWeightDecayState as AddDecoupledWeightDecayState,
)
from adaptive_optax.transforms.weight_decay import add_decoupled_weight_decay as add_decoupled_weight_decay

# Wrappers: control, low precision, groups
from adaptive_optax.wrappers.accumulation import AccumulateGradientsState as AccumulateGradientsState
from adaptive_optax.wrappers.accumulation import accumulate_gradients as accumulate_gradients
from adaptive_optax.wrappers.accumulation import noise_scale as noise_scale
from adaptive_optax.wrappers.error_control import ErrorControl as ErrorControl
from adaptive_optax.wrappers.error_control import ErrorControlledState as ErrorControlledState
from adaptive_optax.wrappers.error_control import error_controlled as error_controlled
from adaptive_optax.wrappers.error_control import get_error_control as get_error_control
from adaptive_optax.wrappers.freezing import FreezeState as FreezeState
from adaptive_optax.wrappers.freezing import freeze as freeze
from adaptive_optax.wrappers.kahan_summation import KahanSummationState as KahanSummationState
from adaptive_optax.wrappers.kahan_summation import kahan_summation as kahan_summation
from adaptive_optax.wrappers.loss_scale import DynamicLossScaleState as DynamicLossScaleState
from adaptive_optax.wrappers.loss_scale import dynamic_loss_scale as dynamic_loss_scale
from adaptive_optax.wrappers.loss_scale import get_loss_scale as get_loss_scale
from adaptive_optax.wrappers.loss_scale import scale_loss as scale_loss
from adaptive_optax.wrappers.master_weights import MasterWeightsState as MasterWeightsState
from adaptive_optax.wrappers.master_weights import master_weights as master_weights
from adaptive_optax.wrappers.partition import decay_mask as decay_mask
from adaptive_optax.wrappers.partition import describe_partition as describe_partition
from adaptive_optax.wrappers.partition import mask_by_path as mask_by_path
from adaptive_optax.wrappers.partition import partition_by_path as partition_by_path
from adaptive_optax.wrappers.reject_nonfinite import RejectNonfiniteState as RejectNonfiniteState
from adaptive_optax.wrappers.reject_nonfinite import reject_nonfinite as reject_nonfinite
from adaptive_optax.wrappers.rejections import Rejections as Rejections
from adaptive_optax.wrappers.rejections import get_rejections as get_rejections
from adaptive_optax.wrappers.rejections import keep_if_rejected as keep_if_rejected
from adaptive_optax.wrappers.step_controller import StepController as StepController
from adaptive_optax.wrappers.verified import verified as verified

__version__ = "0.1.0"


# The study needs pandas and matplotlib, so it is imported on first use. Type checkers see the import and
# not `__getattr__`, which would make any name an attribute.
if TYPE_CHECKING:
    from adaptive_optax import study as study
else:

    def __getattr__(name):
        if name == "study":
            import importlib

            return importlib.import_module("adaptive_optax.study")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), "study"})
