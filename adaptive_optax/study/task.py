"""A task: what to train, on which data, and how it is judged; everything except the learning rate.

A `Task` is made of pure functions and arrays, so any JAX model works: Flax linen (`model.init` and
`model.apply`), nnx (`nnx_task`), Equinox, or a dictionary of arrays. Construction checks it by tracing only:
nothing is compiled or run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_optax._core.checks import check_bool, check_integer, check_name
from adaptive_optax._core.paths import paths_and_leaves
from adaptive_optax._core.trees import Params as Params
from adaptive_optax.study.origin import described

ModelState: TypeAlias = Annotated[Any, "a tree of what is not trained, such as batch statistics"]
"""A tree of what is not trained, such as batch statistics."""

Batch: TypeAlias = Annotated[Any, "a tree of arrays with one leading axis of samples"]
"""A tree of arrays with one leading axis of samples."""


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Describes a training task to the study.

    The parameters are a tree of arrays. An Equinox model also holds functions, so let `init` return
    `eqx.filter(model, eqx.is_inexact_array)`, and let `loss` reassemble the model with `eqx.combine`.

    Attributes:
        init: `init(key) -> params`; the key is a typed key (`jax.random.key`). With model state:
            `init(key) -> (params, model_state)`.
        loss: `loss(params, batch, key) -> scalar`, which is differentiated. `batch` has the structure of
            `train` with a leading axis of `batch_size`; `key` is new at every step (for dropout). With model
            state: `loss(params, model_state, batch, key) -> (scalar, model_state)`.
        train: The training data: a tree of arrays with one leading axis. Each epoch draws a new order and
            drops the remainder that does not fill a batch.
        validation: The validation data, in the same form.
        batch_size: Samples per batch, between 1 and the number of training samples.
        metric: `metric(params, batch) -> scalar`, called on the validation data; with model state
            `metric(params, model_state, batch)`. By default the loss, with one fixed key. Lower is better
            unless `maximize` is set. Counts and booleans are converted to floating point.
        name: The name of the task in reports.
        has_model_state: Whether there is state that is not trained, such as batch statistics.
        evaluation_batch_size: None evaluates the metric on the whole validation set at once. A number
            evaluates that many samples at a time and takes the mean over samples, which needs less memory and
            is correct for metrics that are means.
        maximize: Whether a higher metric is better, as for an accuracy; requires a `metric`.
        batch_statistics: How batch statistics are recomputed if an average of the parameters is judged:
            `batch_statistics(params, model_state, batch, key, momentum) -> model_state` returns the model
            state after one training batch, where running statistics keep a share `momentum` (a traced scalar)
            of their old value. In Flax linen, build the model with `BatchNorm(momentum=momentum)`. By default
            the loss updates them (`recompute_batch_statistics`).

    Raises:
        ValueError: If the data's leading axes differ, the batch is larger than the data, a parameter is not
            floating or complex, the loss or the metric is not a real scalar, the loss ignores its parameters,
            or one of the functions cannot be traced.

    Examples:
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
    train: Batch = dataclasses.field(repr=False)
    validation: Batch = dataclasses.field(repr=False)
    _: dataclasses.KW_ONLY
    batch_size: int
    metric: Callable[..., Any] | None = None
    name: str = "task"
    has_model_state: bool = False
    evaluation_batch_size: int | None = None
    maximize: bool = False
    batch_statistics: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        check_bool("has_model_state", self.has_model_state)
        check_bool("maximize", self.maximize)
        check_name("name", self.name)
        for name in ("init", "loss", "metric", "batch_statistics"):
            function = getattr(self, name)
            if not (callable(function) or (name in ("metric", "batch_statistics") and function is None)):
                raise ValueError(f"{name} must be a function, got {function!r}.")
        if self.maximize and (self.metric is None or _is_loss(self.metric)):
            raise ValueError(
                "maximize=True must come with a metric other than the loss, which is this task's metric."
            )
        if self.batch_statistics is not None and not self.has_model_state:
            raise ValueError("batch_statistics must come with has_model_state=True.")
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
        """The name of the metric in reports: the function's name, if it has one."""
        name = "loss" if self.metric is None else getattr(self.metric, "__name__", "metric")
        return "metric" if name == "<lambda>" else name

    @property
    def parameter_count(self) -> int:
        """The number of trained values."""
        params, _ = jax.eval_shape(self.start, jax.random.key(0))
        return sum(leaf.size for leaf in jax.tree.leaves(params))

    # The three functions that the engine calls; without model state, model_state is None.

    def start(self, key: jax.Array) -> tuple[Params, ModelState]:
        """Draws the initial parameters and model state."""
        return self.init(key) if self.has_model_state else (self.init(key), None)

    def training_loss(
        self, params: Params, model_state: ModelState, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, ModelState]:
        """Returns the loss on one batch and the new model state."""
        if self.has_model_state:
            return self.loss(params, model_state, batch, key)
        return self.loss(params, batch, key), None

    def validation_metric(self, params: Params, model_state: ModelState, data: Batch) -> jax.Array:
        """Returns the metric on `data`, in parts of `evaluation_batch_size` if that is set."""
        count = len(jax.tree.leaves(data)[0])
        size = min(self.evaluation_batch_size or count, count)
        whole = count // size * size
        parts = jax.tree.map(lambda x: x[:whole].reshape(whole // size, size, *x.shape[1:]), data)

        def metric(part):
            value = jnp.asarray(self._metric(params, model_state, part))
            return value if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(float)

        if whole == size == count:
            return metric(data)
        metrics = jax.lax.map(metric, parts)
        total = size * jnp.sum(metrics)
        if whole < count:
            rest = jax.tree.map(lambda x: x[whole:], data)
            total += (count - whole) * metric(rest)
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
    maximize: bool = False,
) -> Task:
    """Makes a task from a Flax nnx module.

    `nnx.Param`s are trained; everything else (batch statistics, dropout's random state) is model state, which
    the loss may update. The loss sees the module after `train()`, the metric after `eval()`. If an average of
    the parameters is judged, the statistics of every `nnx.BatchNorm` are recomputed for it.

    Args:
        build: `build(rngs) -> nnx.Module`, for instance `lambda rngs: MLP(64, 10, rngs=rngs)`.
        loss: `loss(model, batch) -> scalar`.
        train: As in `Task`.
        validation: As in `Task`.
        batch_size: As in `Task`.
        metric: `metric(model, batch) -> scalar`; by default the loss, evaluated after `eval()`.
        name: As in `Task`.
        evaluation_batch_size: As in `Task`.
        maximize: As in `Task`.

    Raises:
        ValueError: As for `Task`, or if `build` does not return an nnx module.
    """
    try:
        from flax import nnx
    except ImportError as error:
        raise ImportError("nnx_task needs Flax: pip install 'adaptive-optax[flax]'.") from error

    def split(key):
        model = build(nnx.Rngs(key))
        if not isinstance(model, nnx.Module):
            raise ValueError(f"build must return an nnx.Module, got {type(model).__name__}.")
        return nnx.split(model, nnx.Param, ...)

    graphs = []  # the static part of the module, the same for every key: captured once, while tracing
    jax.eval_shape(lambda key: graphs.append(split(key)[0]), jax.random.key(0))
    graph = graphs[0]

    def merged(params, rest):
        # Variables may change only in the trace that made them, so this trace makes new ones.
        return nnx.merge(graph, *jax.tree.map(lambda x: x, (params, rest)))

    def loss_of(params, rest, batch, key):
        del key  # the module advances its own random state
        model = merged(params, rest)
        model.train()
        value = loss(model, batch)
        return value, nnx.state(model, nnx.Not(nnx.Param))

    def batch_statistics(params, rest, batch, key, momentum):
        del key
        model = merged(params, rest)
        model.train()
        norms = [module for _, module in nnx.iter_modules(model) if isinstance(module, nnx.BatchNorm)]
        before = []
        for norm in norms:
            norm.momentum = 0.0  # a number, so that the module may be inside nnx.vmap and nnx.scan
            before.append((norm.mean.get_value(), norm.var.get_value()))
            for statistic in (norm.mean, norm.var):  # 0 times a NaN that a bad batch left must be 0
                statistic.set_value(jnp.nan_to_num(statistic.get_value()))
        loss(model, batch)
        for norm, olds in zip(norms, before, strict=True):
            for statistic, old in zip((norm.mean, norm.var), olds, strict=True):
                new = statistic.get_value()
                keep = momentum.astype(new.dtype)
                statistic.set_value(keep * jnp.nan_to_num(old) + (1 - keep) * new)
        return nnx.state(model, nnx.Not(nnx.Param))

    def metric_of(params, rest, batch):
        model = merged(params, rest)
        model.eval()
        return (metric or loss)(model, batch)

    return Task(
        lambda key: split(key)[1:],
        loss_of,
        train,
        validation,
        batch_size=batch_size,
        metric=_ModelMetric(
            metric_of,
            name=getattr(metric, "__name__", "metric") if metric else "loss",
            is_loss=metric is None or metric is loss,
        ),
        name=name,
        has_model_state=True,
        evaluation_batch_size=evaluation_batch_size,
        maximize=maximize,
        batch_statistics=batch_statistics,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _ModelMetric:
    """A metric of an nnx model, as a function of its parameters; records whether it is the loss."""

    function: Callable[..., Any]
    name: str
    is_loss: bool

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


def _is_loss(metric: Callable[..., Any]) -> bool:
    return isinstance(metric, _ModelMetric) and metric.is_loss


def sample_count(name: str, data: Batch) -> int:
    """Returns the length of the leading axis shared by all arrays of `data`; raises if there is none."""
    leaves = paths_and_leaves(data)
    if not leaves:
        raise ValueError(f"{name} must be a tree of arrays, got {type(data).__name__} without arrays.")
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
            "init must return (params, model_state) because has_model_state=True, "
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
                "values that are not trained belong in the model state (has_model_state=True)."
            )

    def samples(data, count):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype)),
            data,
        )

    batch = samples(task.train, task.batch_size)
    arguments = (params, model_state, batch, key) if task.has_model_state else (params, batch, key)
    hint = ""
    if not task.has_model_state and isinstance(start, tuple) and len(start) == 2:
        hint = "; if the second item that init returns is model state, set has_model_state=True"
    value = _trace("loss", task.loss, *arguments, hint=hint)
    if task.has_model_state:
        if not (isinstance(value, tuple) and len(value) == 2):
            raise ValueError(
                "loss must return (scalar, model_state) because has_model_state=True, "
                f"got {type(value).__name__}."
            )
        value, new_state = value
        _check_unchanged("loss", model_state, new_state)
        if task.batch_statistics is not None:
            momentum = jax.ShapeDtypeStruct((), jnp.float32)
            new_state = _trace("batch_statistics", task.batch_statistics, *arguments, momentum)
            _check_unchanged("batch_statistics", model_state, new_state)
    elif isinstance(value, tuple):
        raise ValueError(
            f"loss must return a scalar, got a tuple of {len(value)}; a loss that returns model state needs "
            "has_model_state=True, and a loss with auxiliary output must drop it."
        )
    _check_real_scalar("loss", value)
    if not _depends_on_first(task.loss, *arguments):
        raise ValueError("loss must depend on its parameters; this loss is the same for all parameters.")

    size = min(task.evaluation_batch_size or task.validation_count, task.validation_count)
    data = samples(task.validation, size)
    what = "metric" if task.metric is not None else "loss (the default metric)"
    value = _trace(what, task._metric, params, model_state, data)
    _check_real_scalar(what, value, (jnp.floating, jnp.integer, jnp.bool_))  # counts become floating


def _trace(name: str, function: Callable[..., Any], *arguments: Any, hint: str = "") -> Any:
    try:  # a new function, because JAX does not retrace one that equals a function traced before
        return jax.eval_shape(lambda *given: function(*given), *arguments)
    except Exception as error:
        raise ValueError(f"{name} cannot be traced: {described(error)}{hint}") from error


def _check_real_scalar(name: str, value: Any, kinds: tuple[type, ...] = (jnp.floating,)) -> None:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape != () or dtype is None or not any(jnp.issubdtype(dtype, kind) for kind in kinds):
        found = f"shape {shape} and dtype {dtype}" if shape is not None else f"{type(value).__name__}"
        raise ValueError(f"{name} must return a real scalar, got {found}.")


def _check_unchanged(name: str, before: ModelState, after: ModelState) -> None:
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
            f"{name} must return model state with the structure, shapes and dtypes of init's; "
            f"it differs{where}."
        )


def _depends_on_first(function: Callable[..., Any], *arguments: Any) -> bool:
    """Whether the scalar that `function` returns first depends on any array in its first argument."""
    # A new function, as in `_trace`.
    jaxpr = jax.make_jaxpr(lambda *given: function(*given))(*arguments).jaxpr
    count = len(jax.tree.leaves(arguments[0]))
    return _reaches(jaxpr, [i < count for i in range(len(jaxpr.invars))])[0]


def _reaches(jaxpr: Any, marked: list[bool]) -> list[bool]:
    """Which outputs of a jaxpr depend on the marked inputs; inner functions of the same arity are entered."""
    reached = {var for var, mark in zip(jaxpr.invars, marked, strict=True) if mark}

    def is_reached(atom: Any) -> bool:
        return not hasattr(atom, "val") and atom in reached  # only literals have `val`

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
