"""Test session set-up: eight CPU devices, an option for the number of random examples, x64 as a fixture."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("project", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("project")


def pytest_addoption(parser):
    parser.addoption(
        "--random-examples", type=int, default=2000, help="how many test_random_chains.py draws in all"
    )


@pytest.fixture
def random_examples(request) -> int:
    """The value of `--random-examples`."""
    return request.config.getoption("--random-examples")


@pytest.fixture
def x64():
    """Enables 64-bit types for one test."""
    with jax.enable_x64(True):
        yield
