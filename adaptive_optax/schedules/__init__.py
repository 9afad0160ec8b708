"""Schedules: functions of the step count, exact beyond 2**24 steps, whose peak values may be traced."""

from adaptive_optax.schedules.batch_growth import BatchGrowth as BatchGrowth
from adaptive_optax.schedules.batch_growth import grow_batch as grow_batch
from adaptive_optax.schedules.cyclical import cyclical as cyclical
from adaptive_optax.schedules.decay import exponential_decay as exponential_decay
from adaptive_optax.schedules.decay import inverse_sqrt as inverse_sqrt
from adaptive_optax.schedules.decay import per_epoch as per_epoch
from adaptive_optax.schedules.decay import step_decay as step_decay
from adaptive_optax.schedules.decay import warmup_cosine as warmup_cosine
from adaptive_optax.schedules.decay import warmup_stable_decay as warmup_stable_decay
from adaptive_optax.schedules.one_cycle import OneCycle as OneCycle
from adaptive_optax.schedules.one_cycle import one_cycle as one_cycle
from adaptive_optax.schedules.restarts import cosine_restarts as cosine_restarts
