"""The engine: trains one arm at many rates and seeds, with one compilation, on all devices.

A trial is (arm, learning rate, seed). Rate and seed are arguments of the compiled program, so an arm compiles
once for any number of them. The seed alone determines the initial parameters, the order of the batches and
the loss's keys, so trials of different arms are paired by seed.

Trials run one chunk at a time. `Placement.mode` selects how:
    scan    one after another on each device, with the steps in a loop inside the program: CPUs, small models
    step    one trial per device, one call per step: CPUs, where XLA is slow inside loops (convolutions)
    vmap    in parallel: accelerators
At each validation point the program returns to Python, which reports progress.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from adaptive_optax._core.undefined import lowest_unless, or_nan
from adaptive_optax.monitoring.telemetry import measure
from adaptive_optax.study.evaluation import Arm, Evaluate, evaluated
from adaptive_optax.study.start import Origin, with_carried
from adaptive_optax.study.task import Task

TRAINING_POINTS = 100  # windows over which the training loss is averaged
TELEMETRY = (
    *("learning_rate", "effective_learning_rate", "update_to_weight", "snr"),
    *("step_limit", "curvature", "error"),
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the trials of a study share, apart from the task.

    Attributes:
        steps: Training steps per trial.
        validation_steps: The steps after which the metric is computed; the first is 0, the last `steps`.
        measurements: The most telemetry measurements per trial: more are not drawn, and each has a cost.
    """

    steps: int
    validation_steps: tuple[int, ...]
    measurements: int = 25

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
        """The number of steps between telemetry measurements, which start at the first step.

        Short trials have fewer measurements. The number is no multiple of a small prime, so that with
        accumulation over 2, 4 or 5 steps some measurements fall on emitting steps.
        """
        every = max(-(-self.steps // self.measurements), min(40, -(-self.steps // 8)))
        while any(every % prime == 0 for prime in (2, 3, 5)):
            every += 1
        return every

    @property
    def telemetry_steps(self) -> np.ndarray:
        """The steps that telemetry measures, counted from 1."""
        return np.arange(0, self.steps, self.telemetry_every) + 1


class Placement(NamedTuple):
    """How trials are placed on devices: `width` of them in one call, over `devices` devices."""

    mode: str
    width: int
    devices: int


class Trials(NamedTuple):
    """Which trials to train: arrays of equal length.

    `stream` is 0 for trials that are paired by their seed; a different number draws different batch orders
    and loss keys from the same seed. `base_seed` distinguishes studies.
    """

    rate: np.ndarray
    seed: np.ndarray
    stream: np.ndarray
    base_seed: np.ndarray


class ChunkCurves(NamedTuple):
    """What is measured of the trials of a chunk, with a leading axis of trials.

    Attributes:
        training: Training losses [trial, window].
        validation: Metrics [trial, validation point].
        telemetry: The fields of `TELEMETRY` [trial, measurement, field].
    """

    training: np.ndarray
    validation: np.ndarray
    telemetry: np.ndarray


# ---- One trial ----


class _State(NamedTuple):
    """The state of a trial after some steps."""

    params: Any
    model_state: Any
    opt_state: Any
    training: jax.Array  # the mean training loss of each window
    telemetry: jax.Array  # the fields of `TELEMETRY` at each measurement


class TrialFunctions(NamedTuple):
    """The pure functions of one trial of an arm; `trial` is one element of a `Trials`."""

    start: Callable[..., _State]
    order: Callable[..., jax.Array]
    step: Callable[..., _State]
    advance: Callable[..., _State]
    metric: Callable[..., jax.Array]


def make_trial(task: Task, arm: Arm, plan: Plan, evaluate: Evaluate | None) -> TrialFunctions:
    """Makes the functions of a trial, without tracing them."""
    size, per_epoch = task.batch_size, task.steps_per_epoch
    ends = plan.training_steps
    real = jax.dtypes.canonicalize_dtype(np.float64)  # float32, unless x64 is on
    window_sizes = np.diff(ends, prepend=0).astype(real)
    every = plan.telemetry_every

    def keys(trial):
        """The keys for the initial parameters, the batch orders and the loss."""
        base = jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), trial.base_seed)
        initial, rest = jax.random.split(jax.random.fold_in(base, trial.seed))
        order, loss = jax.random.split(jax.random.fold_in(rest, trial.stream))
        return initial, order, loss

    def start(trial, origin=None):
        params, model_state = task.start(keys(trial)[0]) if origin is None else origin[:2]
        opt_state = arm(trial.rate, plan.steps).init(params)
        if origin is not None:
            opt_state = with_carried(opt_state, origin)
        seen = jnp.zeros((len(plan.telemetry_steps), len(TELEMETRY)), jnp.float32)
        return _State(params, model_state, opt_state, jnp.zeros(len(ends), real), seen)

    def order(trial, index):
        """The order of the samples in the epoch of step `index`."""
        return jax.random.permutation(
            jax.random.fold_in(keys(trial)[1], index // per_epoch), task.train_count
        )

    def step(state, trial, index, samples, train):
        chosen = jax.lax.dynamic_slice(samples, (index % per_epoch * size,), (size,))
        batch = jax.tree.map(lambda x: x[chosen], train)
        key = jax.random.fold_in(keys(trial)[2], index)

        def loss_of(params):
            return task.training_loss(params, state.model_state, batch, key)

        (loss, model_state), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        gradient = jax.tree.map(jnp.conj, gradient)  # the direction of ascent for complex parameters
        updates, opt_state = optax.with_extra_args_support(arm(trial.rate, plan.steps)).update(
            gradient,
            state.opt_state,
            state.params,
            value=loss,
            grad=gradient,
            value_fn=lambda params: loss_of(params)[0],
        )
        params = optax.apply_updates(state.params, updates)
        window = index // plan.window
        share = loss.astype(real) / jnp.asarray(window_sizes)[window]
        training = state.training.at[window].add(share)

        def measurement():
            seen, defined = measure(gradient, updates, params, opt_state)
            fields = [
                # Keeps the program independent of `jax_debug_nans`.
                lowest_unless(getattr(defined, name), getattr(seen, name).astype(jnp.float32))
                for name in TELEMETRY
            ]
            return state.telemetry.at[index // every].set(jnp.stack(fields))

        seen = jax.lax.cond(index % every == 0, measurement, lambda: state.telemetry)
        return _State(params, model_state, opt_state, training, seen)

    def advance(state, trial, begin, end, train):
        """Steps from `begin` to `end`, epoch by epoch, to keep the order out of the inner loop's carry."""

        def epoch(at):
            index, state = at
            samples = order(trial, index)
            stop = jnp.minimum(end, (index // per_epoch + 1) * per_epoch)
            state = jax.lax.fori_loop(
                index, stop, lambda i, state: step(state, trial, i, samples, train), state
            )
            return stop, state

        return jax.lax.while_loop(lambda at: at[0] < end, epoch, (begin, state))[1]

    def metric(state, train, validation):
        params, model_state = evaluated(
            evaluate, task, state.params, state.opt_state, state.model_state, train
        )
        return task.validation_metric(params, model_state, validation).astype(real)

    return TrialFunctions(start, order, step, advance, metric)


# ---- Many trials ----


class Program:
    """An arm's compiled programs for one placement.

    Args:
        task: The task.
        arm: The arm; called only while tracing.
        plan: Steps and validation points.
        placement: How the trials are placed on the devices.
        evaluate: Returns what is judged; None for the trained parameters.
        origin: What trials begin with; None for the task's initial parameters.
    """

    def __init__(
        self,
        task: Task,
        arm: Arm,
        plan: Plan,
        placement: Placement,
        evaluate: Evaluate | None = None,
        origin: Origin | None = None,
    ):
        self.plan: Plan = plan
        self.placement: Placement = placement
        functions = make_trial(task, arm, plan, evaluate)
        split, whole = PartitionSpec("trials"), PartitionSpec()
        place = _place_data(task, placement.devices)
        mesh, self._train, self._validation = place
        self._split, self._whole = NamedSharding(mesh, split), NamedSharding(mesh, whole)
        each = {"scan": _sequentially, "vmap": jax.vmap, "step": _single}[placement.mode]

        def compiled(function, in_specs, out_specs, *arguments, donate=()):
            sharded = jax.shard_map(
                function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
            )
            return jax.jit(sharded, donate_argnums=donate).lower(*arguments).compile()

        number = jax.ShapeDtypeStruct((), jnp.int32, sharding=self._whole)
        trials = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((placement.width,), x.dtype, sharding=self._split),
            as_trials([0.0], [0]),
        )

        def start(trials, origin):
            return each(lambda trial: functions.start(trial, origin))(trials)

        origin = jax.device_put(origin, self._whole)
        begin = compiled(start, (split, whole), split, trials, origin)
        self._start = lambda trials: begin(trials, origin)
        states = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._split), begin.out_info
        )

        def measured(states, train, validation):
            return each(lambda state: functions.metric(state, train, validation))(states)

        if placement.mode == "step":

            def step(states, trials, index, samples, train):
                states = each(lambda state, t, order: functions.step(state, t, index, order, train))(
                    states, trials, samples
                )
                return states, index + 1

            def order(trials, index):
                return each(lambda t: functions.order(t, index))(trials)

            self._order = compiled(order, (split, whole), split, trials, number)
            samples = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._split), self._order.out_info
            )
            self._step = compiled(
                step,
                (split, split, whole, split, whole),
                (split, whole),
                *(states, trials, number, samples, self._train),
                donate=0,
            )
            data = self._train, self._validation
            self._measure = compiled(measured, (split, whole, whole), split, states, *data)
            self._per_epoch = task.steps_per_epoch
        else:

            def segment(states, trials, active, begin, end, train, validation):
                def one(state, t, is_active):
                    if placement.mode == "scan":  # padding trials take no steps
                        return functions.advance(state, t, begin, jnp.where(is_active, end, begin), train)
                    return functions.advance(state, t, begin, end, train)

                states = each(one)(states, trials, active)
                return states, measured(states, train, validation)

            active = jax.ShapeDtypeStruct((placement.width,), jnp.bool_, sharding=self._split)
            self._segment = compiled(
                segment,
                (split, split, split, whole, whole, whole, whole),
                (split, split),
                *(states, trials, active, number, number, self._train, self._validation),
                donate=0,
            )

    @property
    def bytes_needed(self) -> int:
        """The device memory of one call, in bytes per device, as reported by the compiler."""
        main = self._step if self.placement.mode == "step" else self._segment
        sizes = main.memory_analysis()
        if sizes is None:  # the backend does not report it
            return 0
        return sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes

    def run(self, trials: Trials, on_point: Callable[[int], None] = lambda step: None) -> ChunkCurves:
        """Trains up to `placement.width` trials.

        Args:
            trials: The trials; a smaller number is padded, and the padding discarded.
            on_point: Called at every validation point with the number of steps taken.
        """
        count = len(trials.rate)
        placed, active, home = self._place(trials)
        states, metrics, begin = self._start(placed), [], 0
        for end in self.plan.validation_steps:
            states, metric = self._advance(states, placed, active, begin, end)
            if metrics:  # wait for the previous point, so that the devices always have work
                metrics[-1].block_until_ready()
                on_point(begin)
            metrics.append(metric)
            begin = end
        training, seen = (np.asarray(x)[home][:count] for x in (states.training, states.telemetry))
        seen = or_nan(seen)
        on_point(begin)
        metrics = np.stack([np.asarray(metric)[home][:count] for metric in metrics], axis=1)
        return ChunkCurves(training, metrics, seen)

    def seconds(self, steps: int) -> float:
        """Times `steps` steps of a full chunk, and one evaluation."""
        width = self.placement.width
        trials, active, _ = self._place(as_trials(np.full(width, 1e-6), np.arange(width)))
        states = jax.block_until_ready(self._start(trials))
        began = time.perf_counter()
        jax.block_until_ready(self._advance(states, trials, active, 0, steps))
        return time.perf_counter() - began

    def _place(self, trials: Trials) -> tuple[Any, Any, np.ndarray]:
        """Distributes the trials over the devices in turn; also returns each trial's position."""
        width, count = self.placement.width, len(trials.rate)
        dealt = np.arange(width).reshape(-1, self.placement.devices).T.ravel()
        filled = (np.concatenate([x, np.repeat(x[-1:], width - count)])[dealt] for x in trials)
        placed = jax.device_put((Trials(*filled), dealt < count), self._split)
        return *placed, np.argsort(dealt)

    def _advance(self, states: Any, trials: Any, active: Any, begin: int, end: int) -> tuple[Any, Any]:
        if self.placement.mode != "step":
            first, last = jax.device_put((np.int32(begin), np.int32(end)), self._whole)
            return self._segment(states, trials, active, first, last, self._train, self._validation)
        index = jax.device_put(np.int32(begin), self._whole)
        samples = self._order(trials, index)
        for i in range(begin, end):
            if i > begin and i % self._per_epoch == 0:
                samples = self._order(trials, index)
            states, index = self._step(states, trials, index, samples, self._train)
        return states, self._measure(states, self._train, self._validation)


@functools.lru_cache(maxsize=4)
def _place_data(task: Task, devices: int) -> tuple[jax.sharding.Mesh, Any, Any]:
    """Copies the data to the devices, once for all arms; returns the mesh, training and validation data."""
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()[:devices]), ("trials",))
    return mesh, *jax.device_put((task.train, task.validation), NamedSharding(mesh, PartitionSpec()))


def _sequentially(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: jax.lax.map(lambda each: function(*each), arguments)


def _single(function: Callable[..., Any]) -> Callable[..., Any]:
    """Maps over a leading axis of length 1 without a loop."""

    def mapped(*arguments):
        result = function(*jax.tree.map(lambda x: x[0], arguments))
        return jax.tree.map(lambda x: x[None], result)

    return mapped


def as_trials(rate: Any, seed: Any, stream: int = 0, base_seed: int = 0) -> Trials:
    """Makes trials from lists of rates and seeds."""
    rates = np.asarray(rate, jax.dtypes.canonicalize_dtype(np.float64))
    seeds = np.asarray(seed, np.uint32)
    return Trials(rates, seeds, *(np.full_like(seeds, each) for each in (stream, base_seed)))


# JAX settings that affect the engine's random numbers or the arithmetic of its programs.
_SETTINGS = (
    "jax_threefry_partitionable",
    "jax_threefry_gpu_kernel_lowering",
    "jax_default_prng_impl",
    "jax_random_seed_offset",
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_default_matmul_precision",
    "jax_softmax_custom_jvp",
    "jax_disable_most_optimizations",
    "jax_optimization_level",
    "jax_exec_time_optimization_effort",
)


def jax_settings() -> dict[str, str]:
    """The current JAX settings that affect results; studies with different settings do not mix."""
    return {name: str(jax.config.values.get(name)) for name in _SETTINGS}


def at_rate(arm: Arm, rate: float | None) -> Arm:
    """Returns the arm fixed at a learning rate, for a program of that rate only; None leaves it free."""
    return arm if rate is None else lambda _, steps: arm(rate, steps)


class _ByIdentity:
    """Compares values by identity: functions that compare equal may do different things."""

    def __init__(self, function: Any):
        self.function = function

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and self.function is other.function

    def __hash__(self) -> int:
        return id(self.function)


def program(
    task: Task,
    arm: Arm,
    plan: Plan,
    placement: Placement,
    evaluate: Evaluate | None,
    rate: float | None = None,
    origin: Origin | None = None,
) -> Program:
    """Compiles an arm, or finds it already compiled for this task object; with `rate`, for that rate only."""
    return _program(task, _ByIdentity(arm), plan, placement, _ByIdentity(evaluate), rate, _ByIdentity(origin))


@functools.lru_cache(maxsize=32)
def _program(
    task: Task,
    arm: _ByIdentity,
    plan: Plan,
    placement: Placement,
    evaluate: _ByIdentity,
    rate: float | None,
    origin: _ByIdentity,
) -> Program:
    return Program(task, at_rate(arm.function, rate), plan, placement, evaluate.function, origin.function)


@contextlib.contextmanager
def one_study() -> Iterator[None]:
    """On exit, drops the compiled programs and the data placed on devices."""
    try:
        yield
    finally:
        _program.cache_clear()
        _place_data.cache_clear()
