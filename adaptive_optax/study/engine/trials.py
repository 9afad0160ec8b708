"""The engine: trains one arm at many rates and seeds, with one compilation, on all devices.

A trial is (arm, learning rate, seed). Rate and seed are arguments of the compiled program, so an arm compiles
once however many there are. The seed alone decides the initial parameters, the order of the batches and the
keys that the loss gets, so trials of different arms are paired by it.

Trials run a chunk at a time. `Layout.mode` says how:
    scan    on each device one after the other, the steps in a loop inside the program: CPUs, small models
    step    one trial a device, one call a step: CPUs, where XLA is slow inside loops (convolutions)
    vmap    side by side: accelerators
Between two validation points the program returns to Python, which reports progress there.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from adaptive_optax.control.telemetry import measure, with_nan
from adaptive_optax.study.task import Task

Arm = Callable[[Any, int], optax.GradientTransformation]
Evaluate = Callable[[Any, Any], Any]
TRAINING_POINTS = 100  # windows over which the training loss is averaged
TELEMETRY = ("learning_rate", "effective_learning_rate", "update_to_weight", "snr")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the trials of a study share, apart from the task.

    Attributes:
        steps: Training steps of every trial.
        validation_steps: The steps after which the metric is taken; the first is 0, the last `steps`.
        looks: How often the optimizer is looked at, at most: more is not drawn, and each look costs.
    """

    steps: int
    validation_steps: tuple[int, ...]
    looks: int = 25

    @property
    def window(self) -> int:
        """The number of steps over which the training loss is averaged."""
        return -(-self.steps // TRAINING_POINTS)

    @property
    def training_steps(self) -> np.ndarray:
        """The last step of each window."""
        return np.minimum(np.arange(0, self.steps, self.window) + self.window, self.steps)

    @property
    def telemetry_every(self) -> int:
        """Every how many steps the optimizer is looked at, from the first on; of a short run fewer times.

        No multiple of a small prime: where every 2nd, 4th or 5th step emits, some of those are met.
        """
        every = max(-(-self.steps // self.looks), min(40, -(-self.steps // 8)))
        while any(every % prime == 0 for prime in (2, 3, 5)):
            every += 1
        return every

    @property
    def telemetry_steps(self) -> np.ndarray:
        """The steps that are looked at, counted from 1."""
        return np.arange(0, self.steps, self.telemetry_every) + 1


class Layout(NamedTuple):
    """How trials are laid out: `width` trials a call, over `devices` devices."""

    mode: str
    width: int
    devices: int


class Records(NamedTuple):
    """What trials leave behind.

    Attributes:
        training: Training losses [trial, window].
        validation: Metrics [trial, validation point].
        telemetry: The fields of `TELEMETRY` [trial, look, field].
    """

    training: np.ndarray
    validation: np.ndarray
    telemetry: np.ndarray


class Trials(NamedTuple):
    """Which trials to run: arrays of one length.

    `stream` is 0 for trials that are paired by their seed; another number draws other batch orders and loss
    keys from the same seed. `base_seed` tells studies apart.
    """

    rate: np.ndarray
    seed: np.ndarray
    stream: np.ndarray
    base_seed: np.ndarray


# ---- One trial ----


class _Run(NamedTuple):
    """A trial under way."""

    params: Any
    model_state: Any
    opt_state: Any
    training: jax.Array  # the mean training loss of each window
    telemetry: jax.Array  # the fields of `TELEMETRY` at each look


class TrialFunctions(NamedTuple):
    """The pure functions of one trial of an arm; `trial` is one element of a `Trials`."""

    start: Callable[..., _Run]
    order: Callable[..., jax.Array]
    step: Callable[..., _Run]
    advance: Callable[..., _Run]
    measure: Callable[..., jax.Array]


def make_trial(task: Task, arm: Arm, plan: Plan, evaluate: Evaluate | None) -> TrialFunctions:
    """Makes the functions of a trial; nothing is traced yet."""
    size, per_epoch = task.batch_size, task.steps_per_epoch
    ends = plan.training_steps
    window_sizes = np.diff(ends, prepend=0).astype(np.float32)
    every = plan.telemetry_every

    def keys(trial):
        """The keys of the initial parameters, of the orders and of the loss."""
        base = jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), trial.base_seed)
        initial, rest = jax.random.split(jax.random.fold_in(base, trial.seed))
        order, loss = jax.random.split(jax.random.fold_in(rest, trial.stream))
        return initial, order, loss

    def start(trial):
        params, model_state = task.start(keys(trial)[0])
        opt_state = arm(trial.rate, plan.steps).init(params)
        seen = jnp.zeros((len(plan.telemetry_steps), len(TELEMETRY)), jnp.float32)
        return _Run(params, model_state, opt_state, jnp.zeros(len(ends), jnp.float32), seen)

    def order(trial, index):
        """The order of the samples in the epoch of step `index`."""
        return jax.random.permutation(
            jax.random.fold_in(keys(trial)[1], index // per_epoch), task.train_count
        )

    def step(run, trial, index, samples, train):
        chosen = jax.lax.dynamic_slice(samples, (index % per_epoch * size,), (size,))
        batch = jax.tree.map(lambda x: x[chosen], train)
        key = jax.random.fold_in(keys(trial)[2], index)

        def loss_of(params):
            return task.training_loss(params, run.model_state, batch, key)

        (loss, model_state), gradient = jax.value_and_grad(loss_of, has_aux=True)(run.params)
        gradient = jax.tree.map(jnp.conj, gradient)  # the direction of ascent where parameters are complex
        updates, opt_state = optax.with_extra_args_support(arm(trial.rate, plan.steps)).update(
            gradient,
            run.opt_state,
            run.params,
            value=loss,
            grad=gradient,
            value_fn=lambda params: loss_of(params)[0],
        )
        params = optax.apply_updates(run.params, updates)
        window = index // plan.window
        share = loss.astype(jnp.float32) / jnp.asarray(window_sizes)[window]
        training = run.training.at[window].add(share)

        def look():
            measured = with_nan(*measure(gradient, updates, params, opt_state))
            fields = jnp.stack([getattr(measured, name) for name in TELEMETRY])
            return run.telemetry.at[index // every].set(fields)

        seen = jax.lax.cond(index % every == 0, look, lambda: run.telemetry)
        return _Run(params, model_state, opt_state, training, seen)

    def advance(run, trial, begin, end, train):
        """Steps from `begin` to `end`, an epoch at a time: the order stays out of the inner loop's carry."""

        def epoch(at):
            index, run = at
            samples = order(trial, index)
            stop = jnp.minimum(end, (index // per_epoch + 1) * per_epoch)
            run = jax.lax.fori_loop(index, stop, lambda i, run: step(run, trial, i, samples, train), run)
            return stop, run

        return jax.lax.while_loop(lambda at: at[0] < end, epoch, (begin, run))[1]

    def metric(run, validation):
        params = run.params if evaluate is None else evaluate(run.params, run.opt_state)
        return task.validation_metric(params, run.model_state, validation).astype(jnp.float32)

    return TrialFunctions(start, order, step, advance, metric)


# ---- Many trials ----


class Program:
    """An arm's compiled programs for one layout.

    Args:
        task: The task.
        arm: The arm; called while tracing only.
        plan: Steps and validation points.
        layout: How the trials are laid out.
        evaluate: Gives the parameters that are judged; None for the trained ones.
    """

    def __init__(self, task: Task, arm: Arm, plan: Plan, layout: Layout, evaluate: Evaluate | None = None):
        self.plan, self.layout = plan, layout
        trial = make_trial(task, arm, plan, evaluate)
        split, whole = PartitionSpec("trials"), PartitionSpec()
        mesh, self._train, self._validation = _place_data(task, layout.devices)
        self._split, self._whole = NamedSharding(mesh, split), NamedSharding(mesh, whole)
        each = {"scan": _one_by_one, "vmap": jax.vmap, "step": _the_only_one}[layout.mode]

        def compiled(function, in_specs, out_specs, *arguments, donate=()):
            sharded = jax.shard_map(
                function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
            )
            return jax.jit(sharded, donate_argnums=donate).lower(*arguments).compile()

        number = jax.ShapeDtypeStruct((), jnp.int32, sharding=self._whole)
        trials = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((layout.width,), x.dtype, sharding=self._split),
            as_trials([0.0], [0]),
        )
        self._start = compiled(each(trial.start), split, split, trials)
        runs = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._split), self._start.out_info
        )

        def measured(runs, validation):
            return each(lambda run: trial.measure(run, validation))(runs)

        if layout.mode == "step":

            def step(runs, trials, index, samples, train):
                runs = each(lambda run, t, order: trial.step(run, t, index, order, train))(
                    runs, trials, samples
                )
                return runs, index + 1

            def order(trials, index):
                return each(lambda t: trial.order(t, index))(trials)

            self._order = compiled(order, (split, whole), split, trials, number)
            samples = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._split), self._order.out_info
            )
            self._step = compiled(
                step,
                (split, split, whole, split, whole),
                (split, whole),
                *(runs, trials, number, samples, self._train),
                donate=0,
            )
            self._measure = compiled(measured, (split, whole), split, runs, self._validation)
            self._per_epoch = task.steps_per_epoch
        else:

            def segment(runs, trials, active, begin, end, train, validation):
                def one(run, t, is_active):
                    if layout.mode == "scan":  # a trial that only fills the chunk takes no steps
                        return trial.advance(run, t, begin, jnp.where(is_active, end, begin), train)
                    return trial.advance(run, t, begin, end, train)

                runs = each(one)(runs, trials, active)
                return runs, measured(runs, validation)

            active = jax.ShapeDtypeStruct((layout.width,), jnp.bool_, sharding=self._split)
            self._segment = compiled(
                segment,
                (split, split, split, whole, whole, whole, whole),
                (split, split),
                *(runs, trials, active, number, number, self._train, self._validation),
                donate=0,
            )

    @property
    def bytes_needed(self) -> int:
        """The device memory of one call, in bytes on each device, as the compiler states it."""
        main = self._step if self.layout.mode == "step" else self._segment
        sizes = main.memory_analysis()
        if sizes is None:  # where the backend does not say
            return 0
        return sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes

    def run(self, trials: Trials, on_point: Callable[[int], None] = lambda step: None) -> Records:
        """Trains up to `layout.width` trials.

        Args:
            trials: The trials; missing ones are filled up and thrown away.
            on_point: Called with the steps taken whenever a validation point is reached.
        """
        count = len(trials.rate)
        placed, active, home = self._place(trials)
        runs, metrics, begin = self._start(placed), [], 0
        for end in self.plan.validation_steps:
            runs, metric = self._advance(runs, placed, active, begin, end)
            if metrics:  # waits for the point before, so that the devices always have work
                metrics[-1].block_until_ready()
                on_point(begin)
            metrics.append(metric)
            begin = end
        training, seen = (np.asarray(x)[home][:count] for x in (runs.training, runs.telemetry))
        on_point(begin)
        metrics = np.stack([np.asarray(metric)[home][:count] for metric in metrics], axis=1)
        return Records(training, metrics, seen)

    def seconds(self, steps: int) -> float:
        """Times `steps` steps of a full chunk, and one evaluation."""
        width = self.layout.width
        trials, active, _ = self._place(as_trials(np.full(width, 1e-6), np.arange(width)))
        runs = jax.block_until_ready(self._start(trials))
        began = time.perf_counter()
        jax.block_until_ready(self._advance(runs, trials, active, 0, steps))
        return time.perf_counter() - began

    def _place(self, trials: Trials) -> tuple[Any, Any, np.ndarray]:
        """Deals the trials out to the devices in turn; gives also where each of them lies."""
        width, count = self.layout.width, len(trials.rate)
        dealt = np.arange(width).reshape(-1, self.layout.devices).T.ravel()
        filled = (np.concatenate([x, np.repeat(x[-1:], width - count)])[dealt] for x in trials)
        placed = jax.device_put((Trials(*filled), dealt < count), self._split)
        return *placed, np.argsort(dealt)

    def _advance(self, runs: Any, trials: Any, active: Any, begin: int, end: int) -> tuple[Any, Any]:
        if self.layout.mode != "step":
            first, last = jax.device_put((np.int32(begin), np.int32(end)), self._whole)
            return self._segment(runs, trials, active, first, last, self._train, self._validation)
        index = jax.device_put(np.int32(begin), self._whole)
        samples = self._order(trials, index)
        for i in range(begin, end):
            if i > begin and i % self._per_epoch == 0:
                samples = self._order(trials, index)
            runs, index = self._step(runs, trials, index, samples, self._train)
        return runs, self._measure(runs, self._validation)


@functools.lru_cache(maxsize=4)
def _place_data(task: Task, devices: int) -> tuple[jax.sharding.Mesh, Any, Any]:
    """Copies the data to the devices, once for all arms; gives the mesh, the training and validation data."""
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()[:devices]), ("trials",))
    return mesh, *jax.device_put((task.train, task.validation), NamedSharding(mesh, PartitionSpec()))


def _one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: jax.lax.map(lambda each: function(*each), arguments)


def _the_only_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """Maps over a leading axis of length 1 without a loop."""

    def mapped(*arguments):
        result = function(*jax.tree.map(lambda x: x[0], arguments))
        return jax.tree.map(lambda x: x[None], result)

    return mapped


def as_trials(rate: Any, seed: Any, stream: int = 0, base_seed: int = 0) -> Trials:
    """Makes trials of lists of rates and seeds."""
    rates = np.asarray(rate, jax.dtypes.canonicalize_dtype(np.float64))
    seeds = np.asarray(seed, np.uint32)
    return Trials(rates, seeds, *(np.full_like(seeds, each) for each in (stream, base_seed)))


@functools.lru_cache(maxsize=32)
def program(
    task: Task, arm: Arm, plan: Plan, layout: Layout, evaluate: Evaluate | None, rate: float | None = None
) -> Program:
    """Compiles an arm, or finds it compiled; with `rate` for that rate only."""
    fixed = arm if rate is None else lambda _, steps: arm(rate, steps)
    return Program(task, fixed, plan, layout, evaluate)
