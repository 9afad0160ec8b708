"""How trials lie on devices: what is chosen from given speeds and memory, without timing anything."""

import jax
import pytest
from quadratic import constant, quadratic_task

from adaptive_optax import study
from adaptive_optax.study.engine import placement as module
from adaptive_optax.study.engine.placement import settle_placement
from adaptive_optax.study.engine.trainers import ArmSpec
from adaptive_optax.study.engine.trials import Placement, Plan

ARMS = {"a": ArmSpec(constant, "once", None, 0)}
PLAN = Plan(1000, (0, 1000))


class Device:
    def __init__(self, limit):
        self.limit = limit

    def memory_stats(self):
        return {"bytes_limit": self.limit}


@pytest.fixture
def machine(monkeypatch):
    """Pretends to a backend, devices with so much memory, and times a step of the modes."""

    def pretend(backend="cpu", devices=2, limit=0, seconds=None, bytes_a_trial=1):
        class Program:
            def __init__(self, task, arm, plan, placement, evaluate, rate, origin):
                self.placement, self.plan = placement, plan
                self.bytes_needed = bytes_a_trial * placement.width // placement.devices

            def seconds(self, steps):
                return 0.01 + steps * seconds[self.placement.mode]

        monkeypatch.setattr(module, "program", Program)
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        monkeypatch.setattr(jax, "local_devices", lambda: [Device(limit)] * devices)

    return pretend


def settle(trials=18, **keywords):
    return settle_placement(quadratic_task(), ARMS, PLAN, trials=trials, example_rate=0.1, **keywords)


def test_cpus_take_the_faster_of_loop_and_calls(machine):
    machine(seconds={"scan": 0.010, "step": 0.002})
    placement, seconds = settle()
    assert placement == Placement("step", 2, 2)
    assert seconds == pytest.approx({"scan": 0.010, "step": 0.002})
    machine(seconds={"scan": 0.010, "step": 0.009})  # not by enough
    assert settle()[0].mode == "scan"


def test_a_chunk_takes_about_two_seconds(machine):
    # 1000 steps of 0.5 ms are half a second: four trials a call on each device.
    machine(seconds={"scan": 0.0005, "step": 1.0})
    assert settle()[0] == Placement("scan", 8, 2)
    machine(seconds={"scan": 0.1, "step": 1.0})
    assert settle()[0] == Placement("scan", 2, 2)
    machine(seconds={"scan": 1e-6, "step": 1.0})  # but no fewer than two chunks
    assert settle()[0] == Placement("scan", 8, 2)


def test_accelerators_run_side_by_side_what_fits_into_memory(machine):
    machine(backend="gpu", devices=2, limit=1000, bytes_a_trial=10)
    assert settle(trials=17)[0] == Placement("vmap", 18, 2)
    machine(backend="gpu", devices=1, limit=1000, bytes_a_trial=10)
    placement, _ = settle(trials=256)
    assert placement.mode == "vmap" and 30 <= placement.width <= 67
    machine(backend="gpu", devices=1, limit=1000, bytes_a_trial=2000)
    assert settle(trials=256)[0] == Placement("vmap", 1, 1)


def test_what_is_asked_for_is_taken(machine):
    machine(seconds={"scan": 0.001, "step": 0.001})
    assert settle(mode="step")[0] == Placement("step", 2, 2)
    assert settle(mode="vmap", chunk=3)[0] == Placement("vmap", 6, 2)
    assert settle(mode="scan", chunk=3)[0] == Placement("scan", 6, 2)
    assert settle(chunk=3)[0] == Placement("scan", 6, 2)
    assert settle(trials=1)[0].devices == 1


def test_the_layout_is_measured_on_the_real_thing():
    comparison = study.compare(
        quadratic_task(1.0, 0.1),
        {"a": constant, "b": constant},
        learning_rates=[0.1, 0.2],
        steps=20,
        seeds=5,
        growth=0,
        progress=False,
    )
    assert comparison.info["mode"] in ("scan", "step")
    assert set(comparison.info["seconds_per_step"]) == {"scan", "step"}
    assert all(seconds > 0 for seconds in comparison.info["seconds_per_step"].values())
