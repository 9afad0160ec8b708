"""Schedules: functions of the step count, exact beyond 2**24 steps.

The count is 0-based, the number of updates so far. Counts below 0 are treated as 0, and the last value is
held after the end of the run. Peak values, initial values and rates may be traced, so that a sweep is a
`jax.vmap` over the factory; numbers of steps are concrete integers. The range of a traced value cannot be
checked.
"""
