"""Schedules: functions of the step count, exact beyond 2**24 steps.

The count is 0-based, the number of updates so far. Counts below 0 are treated as 0, and the last value is
held after the end of the run. Peak values, initial values and rates may be traced, so that a sweep is a
`jax.vmap` over the factory; numbers of steps are concrete integers. The range of a traced value cannot be
checked.
"""

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
