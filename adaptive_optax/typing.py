"""Type aliases used in the public API, for your own annotations.

Those of arrays and trees say what is held, in which dtype and shape: `Count.__metadata__` is
`("int32, shape ()",)`.
"""

from adaptive_optax._core.trees import Count as Count
from adaptive_optax._core.trees import Counts as Counts
from adaptive_optax._core.trees import Flag as Flag
from adaptive_optax._core.trees import Mask as Mask
from adaptive_optax._core.trees import Measured as Measured
from adaptive_optax._core.trees import Moment as Moment
from adaptive_optax._core.trees import OptState as OptState
from adaptive_optax._core.trees import Params as Params
from adaptive_optax._core.trees import PyTree as PyTree
from adaptive_optax._core.trees import Scalar as Scalar
from adaptive_optax._core.trees import Scalars as Scalars
from adaptive_optax._core.trees import Updates as Updates
from adaptive_optax._core.values import ScheduleState as ScheduleState
from adaptive_optax.hyperparams import Factory as Factory
from adaptive_optax.interop.torch_layout import Layout as Layout
from adaptive_optax.moments.granularity import Reduce as Reduce
from adaptive_optax.moments.storage import Role as Role
from adaptive_optax.transforms.adam import AdamVariants as AdamVariants
from adaptive_optax.transforms.adam import EpsForm as EpsForm
from adaptive_optax.transforms.adgd import AdgdRule as AdgdRule
from adaptive_optax.transforms.reduce_on_plateau import Mode as Mode
from adaptive_optax.transforms.reduce_on_plateau import Preset as Preset
from adaptive_optax.transforms.weight_decay import Coupling as Coupling
from adaptive_optax.wrappers.error_control import Estimate as Estimate
from adaptive_optax.wrappers.reporting import OnReject as OnReject
from adaptive_optax.wrappers.step_controller import ControllerPreset as ControllerPreset
