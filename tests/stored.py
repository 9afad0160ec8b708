"""Storages that several tests use."""

import pytest

import adaptive_optax as ao

SMALL_INT8 = ao.Int8(block_size=64, min_size=1)

# Statistics are compared with their predictions at this many standard errors: a false alarm of 6e-7 each,
# were the seeds not fixed. (The bits' own tests are in test_random_bits.py.)
SIGMAS = 5.0

each_role = pytest.mark.parametrize("role", ["mu", "nu"])
