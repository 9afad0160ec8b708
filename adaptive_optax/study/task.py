"""A task: what to train, on what, and how it is judged; everything that the learning rate is not.

A `Task` is made of pure functions and arrays, so any JAX model fits: Flax linen (`model.init` and
`model.apply`), nnx (`nnx_task`), Equinox, or a dictionary of arrays. It is checked by tracing alone when it
is made: nothing is compiled, and nothing is run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_optax._checks import check_bool, check_integer
from adaptive_optax._paths import paths_and_leaves

Params = Any
ModelState = Any
Batch = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Describes a training task to the study.

    What is trained is a tree of arrays. An Equinox model also holds functions: `init` returns
    `eqx.filter(model, eqx.is_inexact_array)`, and `loss` puts the model together with `eqx.combine`.

    Attributes:
        init: `init(key) -> params`; the key is a typed key (`jax.random.key`). With model state:
            `init(key) -> (params, model_state)`.
        loss: `loss(params, batch, key) -> scalar`, which is differentiated. `batch` has the structure of
            `train` with a leading axis of `batch_size`; `key` is new at every step (dropout). With model
            state: `loss(params, model_state, batch, key) -> (scalar, model_state)`.
        train: The training data: a tree of arrays with one leading axis. Each epoch draws a new order and
            leaves out the remainder that does not fill a batch.
        validation: The validation data, likewise.
        batch_size: Samples in a batch, between 1 and the number of training samples.
        metric: `metric(params, batch) -> scalar`, lower is better, called on the validation data; with model
            state `metric(params, model_state, batch)`. By default the loss, with one fixed key.
        name: What reports call the task.
        has_model_state: Whether there is state that is not trained, such as batch statistics.
        evaluation_batch_size: None evaluates the metric on the whole validation set at once; a number
            evaluates that many samples at a time and takes the mean over samples, which is right for metrics
            that are means, and needs less memory.

    Raises:
        ValueError: If the data's leading axes differ, the batch is larger than the data, a parameter is not
            floating or complex, the loss or the metric is no real scalar, the loss ignores its parameters, or
            one of the functions cannot be traced.

    >>> import jax, jax.numpy as jnp
    >>> from adaptive_optax import study
    >>> x = jnp.linspace(-1, 1, 64)[:, None]
    >>> task = study.Task(
    ...     init=lambda key: jax.random.normal(key, (1,)),
    ...     loss=lambda w, batch, key: jnp.mean((batch["x"] @ w - batch["y"]) ** 2),
    ...     train={"x": x, "y": 3 * x[:, 0]},
    ...     validation={"x": x, "y": 3 * x[:, 0]},
    ...     batch_size=16,
    ... )
    >>> task.parameter_count, task.steps_per_epoch
    (1, 4)
    """

    init: Callable[..., Any]
    loss: Callable[..., Any]
    train: Batch
    validation: Batch
    _: dataclasses.KW_ONLY
    batch_size: int
    metric: Callable[..., Any] | None = None
    name: str = "task"
    has_model_state: bool = False
    evaluation_batch_size: int | None = None

    def __post_init__(self):
        check_bool("has_model_state", self.has_model_state)
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name must be a non-empty string, got {self.name!r}.")
        for name in ("init", "loss", "metric"):
            function = getattr(self, name)
            if not (callable(function) or (name == "metric" and function is None)):
                raise ValueError(f"{name} must be a function, got {function!r}.")
        count = sample_count("train", self.train)
        sample_count("validation", self.validation)
        check_integer("batch_size", self.batch_size, f"[1, {count}]", f"train has {count} samples")
        if self.evaluation_batch_size is not None:
            check_integer("evaluation_batch_size", self.evaluation_batch_size, "[1, inf)")
        _check_functions(self)

    @property
    def train_count(self) -> int:
        """The number of training samples."""
        return sample_count("train", self.train)

    @property
    def validation_count(self) -> int:
        """The number of validation samples."""
        return sample_count("validation", self.validation)

    @property
    def steps_per_epoch(self) -> int:
        """The number of whole batches in the training data."""
        return self.train_count // self.batch_size

    @property
    def metric_name(self) -> str:
        """What reports call the metric: the function's name, if it has one."""
        name = "loss" if self.metric is None else getattr(self.metric, "__name__", "metric")
        return "metric" if name == "<lambda>" else name

    @property
    def parameter_count(self) -> int:
        """The number of trained values."""
        params, _ = jax.eval_shape(self.start, jax.random.key(0))
        return sum(leaf.size for leaf in jax.tree.leaves(params))

    # The three functions that the engine calls; model_state is None where there is none.

    def start(self, key: jax.Array) -> tuple[Params, ModelState]:
        """Draws the initial parameters and model state."""
        return self.init(key) if self.has_model_state else (self.init(key), None)

    def training_loss(
        self, params: Params, model_state: ModelState, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, ModelState]:
        """Gives the loss on one batch and the new model state."""
        if self.has_model_state:
            return self.loss(params, model_state, batch, key)
        return self.loss(params, batch, key), None

    def validation_metric(self, params: Params, model_state: ModelState, data: Batch) -> jax.Array:
        """Gives the metric on `data`, in parts of `evaluation_batch_size` where that is set."""
        count = len(jax.tree.leaves(data)[0])
        size = min(self.evaluation_batch_size or count, count)
        whole = count // size * size
        parts = jax.tree.map(lambda x: x[:whole].reshape(whole // size, size, *x.shape[1:]), data)
        if whole == size == count:
            return self._metric(params, model_state, data)
        metrics = jax.lax.map(lambda part: self._metric(params, model_state, part), parts)
        total = size * jnp.sum(metrics)
        if whole < count:
            rest = jax.tree.map(lambda x: x[whole:], data)
            total += (count - whole) * self._metric(params, model_state, rest)
        return total / count

    def _metric(self, params: Params, model_state: ModelState, batch: Batch) -> jax.Array:
        if self.metric is None:
            key = jax.random.key(0, impl="threefry2x32")
            return self.training_loss(params, model_state, batch, key)[0]
        arguments = (params, model_state, batch) if self.has_model_state else (params, batch)
        return self.metric(*arguments)


def nnx_task(
    build: Callable[..., Any],
    loss: Callable[..., Any],
    train: Batch,
    validation: Batch,
    *,
    batch_size: int,
    metric: Callable[..., Any] | None = None,
    name: str = "task",
    evaluation_batch_size: int | None = None,
) -> Task:
    """Makes a task of a Flax nnx module.

    `nnx.Param`s are trained; everything else (batch statistics, dropout's random state) is model state, which
    the loss may update. The loss sees the module after `train()`, the metric after `eval()`.

    Args:
        build: `build(rngs) -> nnx.Module`, for instance `lambda rngs: MLP(64, 10, rngs=rngs)`.
        loss: `loss(model, batch) -> scalar`.
        train: As in `Task`.
        validation: As in `Task`.
        batch_size: As in `Task`.
        metric: `metric(model, batch) -> scalar`, lower is better; by default the loss, evaluated after
            `eval()`.
        name: As in `Task`.
        evaluation_batch_size: As in `Task`.

    Raises:
        ValueError: As `Task`, and if `build` does not give an nnx module.
    """
    try:
        from flax import nnx
    except ImportError as error:
        raise ImportError("nnx_task needs Flax: pip install 'adaptive-optax[flax]'.") from error

    def split(key):
        model = build(nnx.Rngs(key))
        if not isinstance(model, nnx.Module):
            raise ValueError(f"build must give an nnx.Module, got {type(model).__name__}.")
        return nnx.split(model, nnx.Param, ...)

    graphs = []  # the static part of the module is the same for every key: seen once, while tracing
    jax.eval_shape(lambda key: graphs.append(split(key)[0]), jax.random.key(0))
    graph = graphs[0]

    def merged(params, rest):
        # Variables may only be changed in the trace that made them, so they are made anew in this one.
        return nnx.merge(graph, *jax.tree.map(lambda x: x, (params, rest)))

    def loss_of(params, rest, batch, key):
        del key  # the module's own random state moves on
        model = merged(params, rest)
        model.train()
        value = loss(model, batch)
        return value, nnx.state(model, nnx.Not(nnx.Param))

    def metric_of(params, rest, batch):
        model = merged(params, rest)
        model.eval()
        return (metric or loss)(model, batch)

    metric_of.__name__ = getattr(metric, "__name__", "metric") if metric else "loss"  # for reports
    return Task(
        lambda key: split(key)[1:],
        loss_of,
        train,
        validation,
        batch_size=batch_size,
        metric=metric_of,
        name=name,
        has_model_state=True,
        evaluation_batch_size=evaluation_batch_size,
    )


def sample_count(name: str, data: Batch) -> int:
    """Gives the length of the leading axis that all arrays of `data` share, or refuses them."""
    leaves = paths_and_leaves(data)
    if not leaves:
        raise ValueError(f"{name} must be a tree of arrays, got {type(data).__name__} without any.")
    for path, leaf in leaves:
        if not isinstance(leaf, jax.Array | np.ndarray) or leaf.ndim == 0 or leaf.dtype == object:
            raise ValueError(
                f"{name} must hold arrays with a leading axis of samples, got {type(leaf).__name__} "
                f"at {_place(path)}."
            )
    lengths = {path: len(leaf) for path, leaf in leaves}
    (first, count), *others = lengths.items()
    for path, length in others:
        if length != count:
            raise ValueError(
                f"{name} must have one leading axis, got {count} samples in {first!r} "
                f"and {length} in {path!r}."
            )
    if count == 0:
        raise ValueError(f"{name} must have at least one sample, got none.")
    return count


def _place(path: str) -> str:
    return repr(path) if path else "its root"


# ---- Checks by tracing ----


def _check_functions(task: Task) -> None:
    key = jax.random.key(0)
    start = _trace("init", task.init, key)
    if task.has_model_state and not (isinstance(start, tuple) and len(start) == 2):
        raise ValueError(
            "init must return (params, model_state) as has_model_state=True, "
            f"got {type(start).__name__}{f' of {len(start)}' if isinstance(start, tuple) else ''}."
        )
    params, model_state = start if task.has_model_state else (start, None)
    leaves = paths_and_leaves(params)
    if not leaves:
        raise ValueError("init must return parameters, got a tree without arrays.")
    for path, leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise ValueError(
                f"init must return floating or complex parameters, got {leaf.dtype} at {_place(path)}; "
                "what is not trained belongs into the model state (has_model_state=True)."
            )

    def samples(data, count):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype)),
            data,
        )

    batch = samples(task.train, task.batch_size)
    arguments = (params, model_state, batch, key) if task.has_model_state else (params, batch, key)
    value = _trace("loss", task.loss, *arguments)
    if task.has_model_state:
        if not (isinstance(value, tuple) and len(value) == 2):
            raise ValueError(
                f"loss must return (scalar, model_state) as has_model_state=True, got {type(value).__name__}."
            )
        value, new_state = value
        _check_unchanged(model_state, new_state)
    elif isinstance(value, tuple):
        raise ValueError(
            f"loss must return a scalar, got a tuple of {len(value)}; a loss that returns model state needs "
            "has_model_state=True, and one with auxiliary output must drop it."
        )
    _check_real_scalar("loss", value)
    if not _depends_on_first(task.loss, *arguments):
        raise ValueError("loss must depend on its parameters; this one gives the same for all of them.")

    size = min(task.evaluation_batch_size or task.validation_count, task.validation_count)
    data = samples(task.validation, size)
    what = "metric" if task.metric is not None else "loss (the metric, as none is given)"
    _check_real_scalar(what, _trace(what, task._metric, params, model_state, data))


def _trace(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return jax.eval_shape(function, *arguments)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{name} cannot be traced: {type(error).__name__}: {reason}") from error


def _check_real_scalar(name: str, value: Any) -> None:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape != () or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        found = f"shape {shape} and dtype {dtype}" if shape is not None else f"{type(value).__name__}"
        raise ValueError(f"{name} must return a real scalar, got {found}.")


def _check_unchanged(before: ModelState, after: ModelState) -> None:
    described = [
        {path: (leaf.shape, leaf.dtype) for path, leaf in paths_and_leaves(state)}
        for state in (before, after)
    ]
    if jax.tree.structure(before) != jax.tree.structure(after) or described[0] != described[1]:
        changed = sorted(
            path
            for path in described[0].keys() | described[1].keys()
            if described[0].get(path) != described[1].get(path)
        )
        where = f" at {changed[0]!r}" if changed else ""
        raise ValueError(
            "loss must return model state of the structure, shapes and dtypes that init gave; "
            f"it differs{where}."
        )


def _depends_on_first(function: Callable[..., Any], *arguments: Any) -> bool:
    """Whether the scalar that `function` returns first depends on any array in its first argument."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    count = len(jax.tree.leaves(arguments[0]))
    return _reaches(jaxpr, [i < count for i in range(len(jaxpr.invars))])[0]


def _reaches(jaxpr: Any, marked: list[bool]) -> list[bool]:
    """Which outputs of a jaxpr depend on the marked inputs; inner functions of the same arity are entered."""
    reached = {var for var, mark in zip(jaxpr.invars, marked, strict=True) if mark}

    def is_reached(atom: Any) -> bool:
        return not hasattr(atom, "val") and atom in reached  # literals have a value

    for equation in jaxpr.eqns:
        inputs = [is_reached(atom) for atom in equation.invars]
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        inner = getattr(inner, "jaxpr", inner)
        if equation.primitive.name in ("jit", "pjit", "closed_call") and inner is not None:
            outputs = _reaches(inner, inputs)
        else:
            outputs = [any(inputs)] * len(equation.outvars)
        reached |= {var for var, mark in zip(equation.outvars, outputs, strict=True) if mark}
    return [is_reached(atom) for atom in jaxpr.outvars]
