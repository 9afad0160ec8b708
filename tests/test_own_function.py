"""Comparing arms with the user's own training function: what it is told, may return, and how it may fail."""

import concurrent.futures
import functools
import json
import multiprocessing
import os
import shutil
import threading
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import own_script
import pandas as pd
import pytest
from own_script import ARMS, constant, train

import adaptive_optax as ao
from adaptive_optax import study
from adaptive_optax.study.engine import jobs
from adaptive_optax.study.engine.chunks import NO_STEPS, Curves, Key
from adaptive_optax.study.engine.code import digest_code
from adaptive_optax.study.engine.jobs import check_executor
from adaptive_optax.study.engine.progress import TrialProgress
from adaptive_optax.study.engine.runner import Runner
from adaptive_optax.study.engine.store import ArmPrograms, Store
from adaptive_optax.study.engine.trainers import FunctionTrainer

SETTINGS = {"learning_rates": [0.1, 0.3], "steps": 40, "seeds": 5, "tuning_seeds": 2, "growth": 0}


def compare(function, arms=ARMS, **settings):
    return study.compare(function, arms, **SETTINGS | settings)


@pytest.fixture(scope="module")
def undisturbed():
    """The comparison of the script's arms, in this process."""
    return compare(train)


# ---- What the function is told, and what it says ----


def test_a_run_tells_arm_rate_seed_and_steps():
    seen = []

    def function(run):
        seen.append((run.arm, run.learning_rate, run.seed, run.steps, run.transformation.peak))
        return 1.0 + 0.01 * run.seed

    compare(function)
    tuning = {(arm, rate, seed, 40, rate) for arm in ARMS for rate in (0.1, 0.3) for seed in (0, 1)}
    fresh = {(arm, 0.1, seed, 40, 0.1) for arm in ARMS for seed in range(1000, 1005)}
    assert set(seen) == tuning | fresh and len(seen) == len(tuning) + len(fresh)


def test_another_base_seed_gives_other_seeds_and_the_same_ones_again():
    def seeds(base_seed):
        seen = []
        compare(lambda run: seen.append(run.seed) or 1.0 + run.seed % 7, base_seed=base_seed)
        return seen

    first = seeds(1)
    assert first == seeds(1) != seeds(2)
    assert all(0 <= seed < 2**32 for seed in first)
    assert not set(first) & set(seeds(0))


def test_reports_are_the_curve_and_the_return_value_is_its_end(undisturbed):
    np.testing.assert_array_equal(undisturbed.validation_steps, [0, 10, 20, 30, 40])
    assert np.isfinite(undisturbed.validation_curves).all()
    row = undisturbed.table.iloc[0]
    run = study.Run(row["arm"], row["learning_rate"], row["seed"], 40, ARMS[row["arm"]])
    assert row["final_metric"] == undisturbed.validation_curves[0, -1] == train(run)
    assert row["initial_metric"] == undisturbed.validation_curves[0, 0]
    assert undisturbed.training_curves.shape[1] == undisturbed.telemetry_curves.shape[1] == 0


def test_arms_may_report_at_steps_of_their_own():
    def function(run):
        for step in (10, 20) if run.arm == "linear" else (15,):
            run.report(step, run.seed + step)
        return 1.0 + run.seed

    found = compare(function)
    np.testing.assert_array_equal(found.validation_steps, [10, 15, 20, 40])
    of_linear = (found.table["arm"] == "linear").to_numpy()
    reported = np.isfinite(found.validation_curves)
    assert (reported == np.where(of_linear[:, None], [1, 0, 1, 1], [0, 1, 0, 1])).all()
    assert found.table["initial_metric"].isna().all()
    found.plot()


@pytest.mark.parametrize("how", ["returned", "reported", "generated", "with steps", "with an end"])
def test_the_final_metric_may_be_returned_reported_or_generated(how, undisturbed):
    def metrics(run):
        random, x = np.random.default_rng(run.seed), 0.0
        for _ in range(4):
            x += run.learning_rate + random.normal()
            yield x**2

    def function(run):
        found = list(metrics(run))
        if how == "returned":
            return found[-1]
        for i, metric in enumerate(found, start=1):
            run.report(10 * i, metric)

    def generated(run):
        for i, metric in enumerate(metrics(run), start=1):
            if how == "with steps":
                yield 10 * i, np.float32(metric)
            elif how == "with an end" and i == 4:
                return metric
            else:
                yield metric

    expected = [list(metrics(study.Run("", 0.1, seed, 40, None)))[-1] for seed in range(1000, 1005)]
    found = compare(function if how.endswith("ed") and how != "generated" else generated)
    judged = found.table.query("phase == 'verdict' and arm == 'linear' and learning_rate == 0.1")
    if len(judged):
        np.testing.assert_allclose(judged["final_metric"], expected, rtol=1e-6)
    last = {"returned": [40], "with an end": [13, 27, 40]}.get(how, [10, 20, 30, 40])
    np.testing.assert_array_equal(found.validation_steps, last)


def test_telemetry_that_is_reported_is_in_the_record_and_its_picture():
    tx = ao.telemetry(ao.adam(0.1))
    params = {"w": np.ones(3, np.float32)}
    _, state = tx.update(params, tx.init(params), params)

    def function(run):
        run.report(1, 2.0, telemetry=ao.get_telemetry(state))
        run.report(9, 2.0, telemetry={"effective_learning_rate": 0.5, "learning_rate": run.learning_rate})
        return 1.0 + run.seed

    found = compare(function)
    np.testing.assert_array_equal(found.telemetry_steps, [1, 9])
    seen = found.telemetry_curves
    np.testing.assert_allclose(seen[:, 0, 0], 0.1, rtol=1e-6)
    np.testing.assert_array_equal(seen[:, 1, 1], 0.5)
    assert np.isnan(seen[:, 1, 2:]).all()
    assert len(found.plot().axes) == 4 and len(compare(train).plot().axes) == 3


def test_it_is_judged_saved_and_shown_as_a_task_is(undisturbed, tmp_path):
    verdict = undisturbed.verdict()
    assert verdict.baseline == "constant" and verdict.seeds == 5
    assert verdict == study.judge(undisturbed.table, baseline="constant", look=1)["linear"]
    undisturbed.save(tmp_path / "saved.npz")
    undisturbed.to_csv(tmp_path / "trials.csv")
    again = study.load(tmp_path / "saved.npz")
    pd.testing.assert_frame_equal(again.table, undisturbed.table)
    assert again.details == undisturbed.details
    undisturbed.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Effective learning rates" not in page and "None" not in page
    assert "one call of the training function per trial" in page
    undisturbed.print_summary()


def test_higher_is_better_where_maximize_says_so():
    def function(run):
        return run.learning_rate + (0.1 if run.arm == "linear" else 0.0) + 0.001 * (run.seed % 5)

    found = compare(function, maximize=True)
    assert found.details.best_rates == {"constant": 0.3, "linear": 0.3}
    assert found.details.maximize
    assert compare(function).details.best_rates == {"constant": 0.1, "linear": 0.1}


def test_standard_arms_are_built_for_it():
    def function(run):
        assert isinstance(run.transformation, optax.GradientTransformation)
        assert run.transformation is run.transformation
        return 1.0 + run.seed

    found = compare(function, ["adam:constant", "sgd:cosine"])
    assert (found.table["error"] == "").all()


# ---- What fails ----


def test_a_trial_that_raises_is_an_outcome_with_its_traceback():
    def function(run):
        run.report(0, 5.0)
        if run.seed == 1001 and run.arm == "linear":
            run.report(7, 3.0)
            raise FloatingPointError("went wrong")
        return 1.0 + run.seed / 1000

    found = compare(function)
    failed = found.table[found.table["error"] != ""]
    assert failed[["arm", "seed", "diverged", "best_metric"]].values.tolist() == [["linear", 1001, True, 3.0]]
    text = failed["error"].iloc[0]
    assert text.startswith("Traceback") and "FloatingPointError: went wrong" in text
    assert "in function" in text and "run_trial" not in text
    assert found.verdicts["linear"].diverged == (1, 0)


def test_an_arm_whose_every_trial_raises_ends_the_study_and_shows_the_first():
    def function(run):
        if run.arm == "linear":
            raise KeyError(f"no {run.learning_rate}")
        return 1.0

    with pytest.raises(
        RuntimeError,
        match=r"all 4 trials of arm 'linear' raised, the first with KeyError: 'no 0.1'(?s:.*)no 0.1",
    ) as error:
        compare(function)
    assert len(error.value.comparison.table) == 8  # nothing that was computed is lost


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda run: None, "train must return the final metric or report it"),
        (lambda run: "high", "metric must be a number, got 'high'"),
        (lambda run: "0.5", "metric must be a number, got '0.5'"),
        (lambda run: np.complex64(1), "metric must be a number"),
        (lambda run: jnp.ones((), jnp.complex64), "metric must be a number"),
        (lambda run: 1j, "metric must be a number"),
        (lambda run: True, "metric must be a number, got True"),
        (lambda run: np.ones(2).sum() > 1, "metric must be a number"),
        (lambda run: run.report(-1, 0.0), "step must be an integer of at least 0, got -1"),
        (lambda run: run.report(1.5, 0.0), "step must be an integer"),
        (
            lambda run: (run.report(5, 0.0), run.report(4, 0.0)),
            "step must not be before the last",
        ),
        (lambda run: run.report(1, [1.0, 2.0]), "metric must be a number"),
        (lambda run: run.report(1, 1.0, telemetry=3), "telemetry must be what get_telemetry returns"),
        (lambda run: iter([(1, 2.0), 3.0]), "train must yield metrics alone, or"),
        (lambda run: iter([3.0, (1, 2.0)]), "train must yield metrics alone, or"),
        (lambda run: iter([(1, 2.0, 3.0)]), "train must yield metrics alone, or"),
        (lambda run: iter([]), "train must return the final metric or report it"),
        (lambda run: exit("done"), "SystemExit: done"),
    ],
)
def test_a_mistaken_function_is_told_what_is_wrong(wrong, message):
    with pytest.raises(RuntimeError, match="trials of arm 'constant' raised") as error:
        compare(wrong)
    assert message in str(error.value)


def test_what_is_not_finite_has_diverged():
    def function(run):
        run.report(0, 4.0)
        return np.nan if run.learning_rate == 0.3 else 1.0 + run.seed

    found = compare(function)
    assert found.details.best_rates == {"constant": 0.1, "linear": 0.1}
    assert (found.table["diverged"] == (found.table["learning_rate"] == 0.3)).all()
    assert (found.table["error"] == "").all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation_points": 5}, "validation_points must be left out for a training function"),
        ({"evaluate": lambda params, state: params}, "evaluate must be left out"),
        ({"mode": "scan"}, "mode must be left out"),
        ({"chunk": 2}, "chunk must be left out"),
        ({"paired_batches": False}, "paired_batches must be left out"),
        ({"arms": {"a": constant, "b": 3}}, "arm 'b' must be a function of"),
        ({"maximize": "yes"}, "maximize must be True or False"),
        ({"executor": 3}, "executor must be a concurrent.futures.Executor, or None to train here, got int"),
        ({"function": 3}, "task must be a study.Task or a function train"),
    ],
)
def test_what_has_no_meaning_is_refused_before_anything_is_trained(settings, message):
    def function(run):
        raise AssertionError("it was called")

    with pytest.raises(ValueError, match=message):
        compare(settings.pop("function", function), **settings)


# ---- The folder ----


def test_a_folder_resumes_and_adds_seeds(tmp_path, undisturbed, monkeypatch):
    def function(run):
        if len(own_script.calls) == own_script.most:
            raise KeyboardInterrupt
        own_script.calls.append(run)
        return own_script.train(run)

    calls = []
    monkeypatch.setattr(own_script, "calls", calls)
    monkeypatch.setattr(own_script, "most", 11, raising=False)
    with pytest.raises(KeyboardInterrupt):
        compare(function, out=tmp_path)
    assert len(calls) == 11
    own_script.most = 99
    found = compare(function, out=tmp_path)
    assert len(calls) == len(undisturbed.table)
    pd.testing.assert_frame_equal(found.table, undisturbed.table)
    np.testing.assert_array_equal(found.validation_curves, undisturbed.validation_curves)
    more = compare(function, out=tmp_path, seeds=7)
    assert len(calls) == len(undisturbed.table) + 4 and more.details.looks == (5, 7)


def test_trials_that_raised_run_again_when_what_they_lacked_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(own_script, "calls", [])
    calls, there = own_script.calls, tmp_path / "data"

    def function(run):
        own_script.calls.append(run)
        if run.seed >= 1000 and run.arm == "linear":
            there.read_text()
        return 1.0 + run.seed

    found = compare(function, out=tmp_path / "out")
    raised = found.table[found.table["error"] != ""]
    assert len(raised) == 5 and len(calls) == len(found.table)
    there.write_text("")
    calls.clear()
    again = compare(function, out=tmp_path / "out")
    assert len(calls) == 5 and not again.table["error"].any()
    calls.clear()
    pd.testing.assert_frame_equal(compare(function, out=tmp_path / "out").table, again.table)
    assert not calls


def test_an_arm_whose_trials_all_raised_is_tried_again(tmp_path):
    there = tmp_path / "data"

    def function(run):
        if run.arm == "linear":
            there.read_text()
        return 1.0 + run.seed

    with pytest.raises(RuntimeError, match="'linear' raised, the first with FileNotFoundError: ") as error:
        compare(function, out=tmp_path / "out")
    assert "from which the study can resume; trials that raised run again." in error.value.__notes__[0]
    there.write_text("")
    assert compare(function, out=tmp_path / "out").verdict()


def test_another_process_does_not_repeat_what_was_repeated(tmp_path):
    key = Key("a", 0.1, 0)
    failed, trained = (_outcome(error) for error in ("Traceback", ""))
    stores = [Store(tmp_path, {}, {"a": ArmPrograms(False, lambda rate: {"code": "x"})}) for _ in range(2)]
    stores[0].write({key: failed})
    for store in stores:
        store.read()
        store.forget_raised()
        assert not store.read()
    stores[0].write({key: trained})
    assert str(stores[1].read()[key].error) == "" and not stores[1].read()


def _outcome(error):
    steps = np.array([1])
    return Curves(np.zeros(0), np.ones(1), np.zeros((0, 4)), steps, NO_STEPS, np.array(error))


def test_a_changed_function_or_arm_is_refused(tmp_path):
    compare(lambda run: 1.0 + run.seed, out=tmp_path)
    with pytest.raises(ValueError, match="holds another study; changed: train code"):
        compare(lambda run: 2.0 + run.seed, out=tmp_path)
    with pytest.raises(ValueError, match="changed: arm 'linear' code"):
        compare(lambda run: 1.0 + run.seed, ARMS | {"linear": constant}, out=tmp_path)
    with pytest.raises(ValueError, match="changed: steps"):
        compare(lambda run: 1.0 + run.seed, out=tmp_path, steps=50)
    with pytest.raises(ValueError, match="changed: maximize"):
        compare(lambda run: 1.0 + run.seed, out=tmp_path, maximize=True)


def _scaled(factor):
    return lambda x: factor * x


def test_code_is_recognized_by_what_it_does():
    def with_default(x, power=2):
        return x**power

    same = [_scaled(2.0), _scaled(2.0)]
    assert digest_code(same[0]) == digest_code(same[1]) != digest_code(_scaled(3.0))
    assert digest_code(functools.partial(_scaled, 1)) != digest_code(functools.partial(_scaled, 2))
    before = digest_code(with_default)
    with_default.__defaults__ = (3,)
    assert digest_code(with_default) != before
    arrays = [_scaled(np.arange(3)), _scaled(np.arange(3)), _scaled(np.ones(3))]
    assert digest_code(arrays[0]) == digest_code(arrays[1]) != digest_code(arrays[2])


def test_code_includes_what_it_uses_of_its_own_module(monkeypatch):
    before = digest_code(train), digest_code(constant)
    monkeypatch.setattr(own_script, "Rate", type("Rate", (), {"__module__": own_script.__name__}))
    assert digest_code(train) == before[0]  # it does not use it
    assert digest_code(constant) != before[1]


# ---- Executors ----


@pytest.fixture(scope="module")
def spawned():
    """A pool of two processes."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as executor:
        yield executor


def test_a_process_pool_gives_what_this_process_gives(spawned, undisturbed):
    found = compare(train, executor=spawned)
    pd.testing.assert_frame_equal(found.table, undisturbed.table)
    np.testing.assert_array_equal(found.validation_curves, undisturbed.validation_curves)
    assert found.details.executor == "ProcessPoolExecutor"


def test_threads_give_it_too_and_need_no_pickling(undisturbed):
    lock = threading.Lock()

    def function(run):
        with lock:
            return train(run)

    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        found = compare(function, executor=executor)
    pd.testing.assert_frame_equal(found.table, undisturbed.table)


def test_open_locks_stay_below_the_limit_of_open_files(tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 100
    enough = 2 * in_use + 40  # half of it is free for locks
    settings = {"learning_rates": np.geomspace(0.01, 0.3, 10), "tuning_seeds": enough // 10, "steps": 1}
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, limits[1]))
        with concurrent.futures.ThreadPoolExecutor(2) as executor:
            found = compare(train, executor=executor, out=tmp_path, **settings)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(found.table) > enough


def test_a_trial_that_kills_its_worker_is_named_and_does_not_stop_the_study_for_ever(tmp_path):
    def kills(run):
        if run.seed == 1 and run.arm == "linear" and run.learning_rate == 0.1:
            os._exit(1)
        return 1.0 + run.seed + run.learning_rate

    def attempt():
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:
            return compare(kills, executor=executor, out=tmp_path, progress=False)

    named = "arm 'linear' at learning rate 0.1 with seed 1."
    with pytest.raises(BrokenProcessPool) as first:
        attempt()
    assert f"A worker process died while these trials ran: {named}" in first.value.__notes__
    assert "The next call runs them last, and one at a time." in first.value.__notes__
    with pytest.raises(BrokenProcessPool) as second:
        attempt()
    assert len(second.value.comparison.table) == 8  # all others of tuning, and this one
    assert "It counts as diverged from now on; call again to go on." in second.value.__notes__
    found = attempt()
    failed = found.table[found.table["error"] != ""]
    assert len(failed) == 1 and "died in this trial" in failed["error"].iloc[0] and len(found.table) == 18


def test_a_trial_that_kills_every_worker_of_a_scheduler_is_an_outcome(tmp_path):
    class Killed(Exception):
        pass

    Killed.__name__ = "KilledWorker"  # as Dask raises after several attempts

    class Scheduler:
        def submit(self, function, parcel, keys):
            future = concurrent.futures.Future()
            try:
                if keys[0].seed == 1001:
                    raise Killed("attempted 4 times")
                future.set_result(function(parcel, keys))
            except Exception as error:
                future.set_exception(error)
            return future

    found = compare(train, executor=Scheduler())
    failed = found.table[found.table["error"] != ""]
    assert set(failed["seed"]) == {1001} and set(failed["diverged"]) == {True}
    assert failed["error"].str.contains("Workers that tried this trial died: attempted 4 times").all()


def test_what_cannot_travel_is_named(spawned):
    lock = threading.Lock()
    with pytest.raises(ValueError, match="executor: train cannot be sent to another process: .*lock"):
        compare(lambda run: lock and 1.0, executor=spawned)
    arms = ARMS | {"locked": lambda rate, steps: lock}
    with pytest.raises(ValueError, match="executor: arm 'locked' cannot be sent"):
        compare(train, arms, executor=spawned)


def test_a_forked_pool_is_refused():
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:
        with pytest.raises(ValueError, match="executor must not fork this process"):
            compare(train, executor=executor)


def test_a_study_of_a_task_can_be_sent_a_chunk_a_job(spawned):
    task = own_script.task()
    settings = SETTINGS | {"learning_rates": [0.03, 0.1], "steps": 20}
    arms = {"constant": own_script.sgd, "slower": own_script.slower}
    expected = study.compare(task, arms, **settings, mode="scan", chunk=2)
    found = study.compare(task, arms, **settings, mode="scan", chunk=2, executor=spawned)
    pd.testing.assert_frame_equal(found.table, expected.table)
    np.testing.assert_array_equal(found.training_curves, expected.training_curves)
    chosen = study.compare(task, arms, **settings, executor=spawned)  # a worker chooses the placement
    assert chosen.details.mode in ("scan", "step") and chosen.details.seconds_per_step
    np.testing.assert_allclose(chosen.table["final_metric"], expected.table["final_metric"], rtol=1e-5)


class Elsewhere:
    """An executor whose workers see no files of this process, and may turn named tuples into tuples."""

    def __init__(self, workers, at_once):
        self.at_once = at_once
        self.pool = concurrent.futures.ThreadPoolExecutor(1)
        self.loaded = [{} for _ in range(workers)]
        self.jobs, self.sent, self.loads = 0, 0, [0] * workers

    def submit(self, function, *arguments):
        parcel, keys = arguments
        self.sent += parcel.content is not None
        worker = self.jobs % len(self.loaded)
        self.jobs += 1
        future = self.pool.submit(self.run, worker, function, (parcel[0], "nowhere", *parcel[2:]), keys)
        if self.at_once:
            concurrent.futures.wait([future])
        return future

    def run(self, worker, function, parcel, keys):
        before, name = dict(jobs._LOADED), jobs.socket.gethostname
        jobs._LOADED.clear()
        jobs._LOADED.update(self.loaded[worker])
        jobs.socket.gethostname = lambda: f"machine{worker}"
        try:
            return function(parcel, [tuple(key) for key in keys])
        finally:
            self.loads[worker] += len(jobs._LOADED) - len(self.loaded[worker])
            self.loaded[worker] = dict(jobs._LOADED)
            jobs._LOADED.clear()
            jobs._LOADED.update(before)
            jobs.socket.gethostname = name


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("at_once", [True, False], ids=["done at once", "done later"])
def test_data_travel_to_a_worker_once(undisturbed, workers, at_once):
    data = np.zeros(100_000)

    def function(run):
        return train(run) + data.sum()

    executor = Elsewhere(workers, at_once)
    found = compare(function, executor=executor)
    pd.testing.assert_frame_equal(found.table, undisturbed.table)
    assert max(executor.loads) == 1
    assert executor.jobs >= len(found.table)
    if (
        workers == 1
    ):  # otherwise a job that takes the content along may end at a worker that has it, each time
        assert executor.sent == 1


def test_a_worker_that_cannot_load_the_function_says_so(spawned, monkeypatch, tmp_path):
    (tmp_path / "only_here.py").write_text("def train(run):\n    return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    import only_here

    shutil.rmtree(tmp_path)  # a worker that starts now has this path too
    with pytest.raises(RuntimeError, match="a worker could not load what trains.*only_here"):
        compare(only_here.train, executor=spawned)


def test_a_job_that_fails_keeps_what_has_finished(tmp_path):
    class Breaks(concurrent.futures.ThreadPoolExecutor):
        def submit(self, function, *arguments):
            self.count = getattr(self, "count", 0) + 1
            if self.count == 6:
                raise RuntimeError("no more jobs")
            return super().submit(function, *arguments)

    with Breaks(1) as executor, pytest.raises(RuntimeError, match="no more jobs") as error:
        compare(train, executor=executor, out=tmp_path)
    kept = error.value.comparison.table
    again = compare(train, out=tmp_path)
    assert len(kept) <= 5 and len(again.table) == 18


def test_a_dask_worker_that_is_killed_is_replaced(undisturbed, tmp_path):
    distributed = pytest.importorskip("distributed")
    quiet = {"dashboard_address": None, "silence_logs": 50}
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, **quiet) as cluster:
        with distributed.Client(cluster) as client:
            found = compare(own_script.dying(str(tmp_path)), executor=client.get_executor())
    assert (tmp_path / "died").exists()
    pd.testing.assert_frame_equal(found.table, undisturbed.table)
    np.testing.assert_array_equal(found.validation_curves, undisturbed.validation_curves)


def test_submitit_runs_it_as_jobs_of_a_scheduler(undisturbed, tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    folders = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(folders))
    executor, submitted = submitit.LocalExecutor(folder=tmp_path), []
    executor.update_parameters(timeout_min=5)
    submit = executor.submit
    monkeypatch.setattr(executor, "submit", lambda *call: submitted.append(submit(*call)) or submitted[-1])
    check_executor(executor)
    runner = Runner(FunctionTrainer(train, ARMS, 40), None, TrialProgress(2, False), executor)
    runner.run(keys := [Key("constant", 0.1, 1000), Key("linear", 0.1, 1000)], "verdict")
    runner.close()
    expected = undisturbed.table.query("seed == 1000")["final_metric"]
    assert [runner.results[key].validation[-1] for key in keys] == expected.tolist()
    for job in submitted:  # it leaves them to be collected as running processes
        job._process.wait()


def test_the_report_says_what_a_trial_raised(tmp_path):
    def function(run):
        if run.seed == 1002 and run.arm == "linear":
            raise ValueError("too <steep>")
        return 1.0 + run.seed / 1000

    compare(function).to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "ValueError: too &lt;steep&gt;" in page
    assert page.count('data-heading="raised"') == 18 and 'data-heading="compiled"' not in page


# ---- What is judged ----


def averaging(rate, steps):
    return optax.chain(ao.sgd(rate), ao.average_parameters(power=0.0))


@study.judged_by(lambda params, opt_state: params + 100)
def elsewhere(rate, steps):
    return ao.sgd(rate)


def descend(run, ask=True):
    """SGD from 0 towards 1, exactly."""
    run.report(0, 2.0)
    params, tx = np.zeros(1, np.float32), run.transformation
    state = tx.init(params)
    for _ in range(run.steps):
        updates, state = tx.update(params - 1, state, params)
        params = optax.apply_updates(params, updates)
    judged = run.eval_params(params, state) if ask else params
    return float(np.abs(judged - 1).sum()) + 1e-3 * (run.seed % 7)


AVERAGING = {"constant": study.arm("sgd:constant"), "mine": averaging, "elsewhere": elsewhere}
AVERAGING |= {name: study.arm(name) for name in ("sgd:constant:averaged", "schedule_free:sgd")}


@pytest.fixture(scope="module")
def averaged():
    return compare(descend, AVERAGING, learning_rates=[0.1], steps=10, maximize=False)


def test_eval_params_is_what_the_arm_is_judged_by(averaged):
    path = [1 - 0.9 ** (i + 1) for i in range(10)]
    expected = {"constant": 1 - path[-1], "mine": 1 - np.mean(path), "elsewhere": 99 + path[-1]}
    final = averaged.table.query("seed == 1001").set_index("arm")["final_metric"]  # 1001 % 7 == 0
    for name, metric in expected.items():
        np.testing.assert_allclose(final[name], metric, rtol=1e-5)
    assert final["sgd:constant:averaged"] > final["constant"]
    judged = {name: found.by for name, found in averaged.details.judged.items()}
    assert judged["constant"] == "its trained parameters"
    assert judged["mine"] == judged["sgd:constant:averaged"] == "the average of its parameters"
    assert judged["schedule_free:sgd"] == "its schedule-free average"


def test_the_report_of_a_function_says_what_was_judged(averaged, tmp_path, capsys):
    averaged.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "mine, sgd:constant:averaged by the average of its parameters" in page
    averaged.print_summary()
    assert "mine: judged by the average of its parameters" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("arm", ["mine", "elsewhere", "sgd:constant:averaged", "schedule_free:sgd"])
def test_a_function_that_evaluates_other_parameters_than_the_arm_says_is_refused(arm):
    arms = {name: AVERAGING[name] for name in ("constant", arm)}
    with pytest.raises(ValueError, match=rf"arm '{arm}' is judged by .*: train must report the metric of "):
        compare(functools.partial(descend, ask=False), arms, learning_rates=[0.1], steps=10)


def test_a_trial_that_diverged_need_not_ask_what_is_judged():
    def function(run):
        return np.nan if run.arm != "constant" else 1.0 + run.seed

    found = compare(function, {name: AVERAGING[name] for name in ("constant", "mine")}, maximize=False)
    assert found.verdict().decision == "worse"


def test_what_needs_a_task_cannot_judge_a_function():
    @study.judged_by(lambda params, opt_state, model_state: (params, model_state))
    def arm(rate, steps):
        return ao.sgd(rate)

    with pytest.raises(ValueError, match="evaluate of arm 'b' must be a function of .* which has no task"):
        compare(descend, {"a": constant, "b": arm})


# ---- Schedules and names ----


@pytest.mark.parametrize("schedule", ["constant", "halved", "linear", "one_cycle", "inverse_sqrt"])
def test_the_schedule_of_a_standard_arm_is_a_number_for_any_framework(schedule):
    name = f"sgd:{schedule}"
    run = study.Run(name, 0.1, 0, 30, build=study.arm(name))
    state, params = run.transformation.init(np.ones(1, np.float32)), np.ones(1, np.float32)
    for step in range(30):
        updates, state = run.transformation.update(np.ones(1, np.float32), state, params)
        rate = run.schedule(step)
        assert type(rate) is float
        np.testing.assert_allclose(-updates[0], rate, rtol=1e-5)
    run.schedule(5000)


def test_an_arm_of_ones_own_has_no_schedule_of_its_name():
    with pytest.raises(ValueError, match="run.schedule must be called for a standard arm .*got 'mine'"):
        study.Run("mine", 0.1, 0, 30, build=constant).schedule(0)


def test_an_average_without_a_schedule_is_told_its_name():
    with pytest.raises(ValueError, match="did you mean adam:constant:averaged?"):
        study.arm("adam:averaged")


def test_a_function_is_named_in_the_report(tmp_path):
    compare(train, name="my network", metric_name="error").to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<h1>my network: " in page and "error, lower is better" in page
    with pytest.raises(ValueError, match="must be left out for a study.Task"):
        compare(own_script.task(), ["sgd:constant", "sgd:linear"], name="mine")
    with pytest.raises(ValueError, match="name must be"):
        compare(train, name=3)


# ---- Which metrics are better, and what is used ----


def rising(run):
    """An accuracy that grows with the rate: the worst rate of either arm looks best if it is minimized."""
    noise = 0.001 * (run.seed % 5) * (1 if run.arm == "linear" else 2)
    return 0.9 + run.learning_rate / 1000 - (0.2 if run.arm == "linear" else 0) + noise


def test_an_accuracy_that_is_minimized_by_mistake_gets_no_verdict():
    found = compare(rising)
    verdict = found.verdict()
    assert (verdict.decision, verdict.reason) == ("undecided", "unknown direction")
    assert "Pass maximize=True" in verdict.sentence and "run.report(0, metric)" in verdict.sentence
    with pytest.raises(ValueError, match="Pass maximize=True"):
        found.recommend()
    assert compare(rising, maximize=True).verdict().decision == "worse"
    assert compare(rising, maximize=False).verdict().decision == "better"


def test_a_metric_before_training_shows_the_direction():
    def function(run, before):
        run.report(0, before)
        return rising(run)

    wrong = compare(functools.partial(function, before=0.1)).verdict()
    assert wrong.reason == "untrained" and "set maximize=True" in wrong.sentence
    assert compare(functools.partial(function, before=5.0)).verdict().decision == "better"


def test_the_summary_says_how_to_state_the_direction(capsys):
    compare(rising).print_summary()
    assert "study.compare(..., maximize=True)" in capsys.readouterr().out


def test_arms_that_never_differ_may_not_be_used():
    found = compare(lambda run: 1.0 + 0.01 * (run.seed % 7)).verdict()
    assert found.decision == "equivalent"
    assert found.sentence.endswith("Does train use run.transformation (or run.arm)?")


def test_seeds_that_never_differ_may_not_be_used():
    found = compare(lambda run: 1.0 + (run.arm == "linear")).verdict()
    assert found.reason == "deterministic task"
    assert found.sentence.endswith("Does train use run.seed?")


def test_status_needs_only_to_read_and_says_what_is_not_there_yet(tmp_path, monkeypatch):
    compare(train, out=tmp_path / "out")
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "study.json").write_text("{}")
    store = Store(tmp_path / "out", {**json.loads((tmp_path / "out" / "study.json").read_text())["study"]})
    with store.claim([Key("linear", 0.1, 7)]):
        open_file = os.open

        def read_only(path, flags, *more, **settings):
            if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
                raise PermissionError(13, "Permission denied", path)
            return open_file(path, flags, *more, **settings)

        monkeypatch.setattr(os, "open", read_only)
        status = study.read_status(tmp_path / "out")
    assert status.finished == status.wanted == 18 and status.running == 1
    for folder, reason in (
        ("empty", "it holds no study yet"),
        ("begun", "its study has just begun, and no trial yet"),
        ("absent", "there is no folder"),
    ):
        with pytest.raises(ValueError, match=reason):
            study.read_status(tmp_path / folder)


def test_the_class_of_an_executor_is_no_executor():
    with pytest.raises(ValueError, match="executor must be .*, got the class ThreadPoolExecutor"):
        compare(train, executor=concurrent.futures.ThreadPoolExecutor)
