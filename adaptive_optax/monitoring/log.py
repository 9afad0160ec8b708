"""Collecting the measurements of `telemetry` over a run, for a table, a plot or TensorBoard."""

from __future__ import annotations

import collections
import os
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from adaptive_optax._core.extras import require
from adaptive_optax._core.paths import paths_and_leaves
from adaptive_optax._core.trees import OptState, Params
from adaptive_optax._core.undefined import or_nan
from adaptive_optax.monitoring.telemetry import (
    Telemetry,
    TelemetryState,
    last_measurement,
    measurement_on_host,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_SCALARS = Telemetry._fields[1:-1]
_MOST_POINTS = 50  # per line, because single steps are noisy
_MOST_PENDING = 128


@jax.jit
def _copied(tree):
    return jax.tree.map(jnp.copy, tree)


class TelemetryLog:
    """Collects the measurements of `telemetry`, outside of jit.

    Append the optimizer's state as often as you like, even at every step: `append` starts a copy of the
    measurement on the device and does not wait for the step. Copies reach the host asynchronously; at most
    about a hundred are pending, and reading the log waits for them. In a scan, return `get_telemetry(state)`
    for every step and pass the stacked result to `extend`.

    Args:
        params: The parameters, or their shapes. Their paths name the tensors of
            `telemetry(..., per="tensor")`; not needed for "tree".

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp, optax
        >>> tx, params = ao.telemetry(ao.adam(0.1)), jnp.array([3.0, -2.0])
        >>> state, log = tx.init(params), ao.TelemetryLog()
        >>> for _ in range(5):
        ...     updates, state = tx.update(2 * params, state, params)
        ...     params = optax.apply_updates(params, updates)
        ...     log.append(state)
        >>> log.table["effective_learning_rate"].is_monotonic_increasing, log.table.index.tolist()
        (True, [1, 2, 3, 4, 5])
    """

    def __init__(self, params: Params | None = None):
        self.tensors: list[str] = [path for path, _ in paths_and_leaves(params)]
        self._fetched: list[Telemetry] = []
        self._pending: collections.deque[TelemetryState] = collections.deque()
        self._written = 0

    def __len__(self) -> int:
        return len(self._records)

    def append(self, opt_state: OptState) -> None:
        """Records the last measurement, unless it is already recorded or there is none yet.

        Args:
            opt_state: A state that contains one `telemetry`, such as `nnx.Optimizer(...).opt_state`.

        Raises:
            ValueError: If it contains none or several or is traced, or the tensors do not match `params`.
        """
        state = last_measurement(opt_state)
        if isinstance(state.values, Tracer):
            raise ValueError(
                "TelemetryLog.append works outside of jit, got a traced state: return get_telemetry(state) "
                "from the jitted function, and pass the stacked result of a scan to extend."
            )
        self._check(np.shape(state.values)[:-1])
        # A copy, because the step may donate the state.
        copied = _copied(state._replace(count=None))
        for x in jax.tree.leaves(copied):
            x.copy_to_host_async()
        self._pending.append(copied)
        if len(self._pending) > _MOST_PENDING:
            # The older half has usually arrived, so the host waits only if it is far ahead of the device.
            self._fetch(_MOST_PENDING // 2)

    def extend(self, measurements: Telemetry) -> None:
        """Records several measurements.

        Args:
            measurements: The results of `get_telemetry` for several steps, stacked along a leading axis.

        Raises:
            ValueError: If it is anything else, or the tensors do not match `params`.
        """
        if not isinstance(measurements, Telemetry) or np.ndim(measurements.count) != 1:
            raise ValueError(
                "measurements must be a Telemetry with a leading axis of steps, such as results of "
                f"get_telemetry stacked by a scan, got {type(measurements).__name__}."
            )
        self._check(np.shape(measurements.gradient_norm)[1:])
        self._fetch()
        count, *fields = jax.device_get(measurements)
        stacked = Telemetry._make([count, *map(or_nan, fields)])
        for i in range(len(count)):
            self._add(Telemetry(*(x[i] for x in stacked)))

    def _check(self, shape: tuple[int, ...]) -> None:
        if shape and shape != (len(self.tensors),):
            raise ValueError(
                f"params of TelemetryLog must have the {shape[0]} tensors that were measured, "
                f"got {len(self.tensors)}: pass the tree with which telemetry was initialised."
            )

    def _fetch(self, left: int = 0) -> None:
        """Records the pending measurements, except for the last `left`."""
        while len(self._pending) > left:
            # Remove it first: if its step failed, the error is raised once and the others can still be read.
            self._add(measurement_on_host(jax.tree.map(np.asarray, self._pending.popleft())))

    def _add(self, seen: Telemetry) -> None:
        if seen.count > 0 and (not self._fetched or seen.count != self._fetched[-1].count):
            self._fetched.append(seen)

    @property
    def _records(self) -> list[Telemetry]:
        """All measurements."""
        self._fetch()
        return self._fetched

    @property
    def steps(self) -> np.ndarray:
        """The measured steps, counted from 1."""
        return np.array([int(record.count) for record in self._records], int)

    @property
    def histograms(self) -> np.ndarray:
        """The fraction of coordinates in each bin of `Telemetry.histogram_edges`: step (by tensor) by bin."""
        return np.array([record.histogram for record in self._records])

    @property
    def table(self) -> pd.DataFrame:
        """The measurements, with one row per step, or with `per="tensor"` one per step and tensor.

        Raises:
            ImportError: If pandas is missing.
        """
        require("TelemetryLog.table", "study", "pandas")
        import pandas as pd

        values = {name: np.array([getattr(record, name) for record in self._records]) for name in _SCALARS}
        if not self._is_per_tensor:
            return pd.DataFrame(values, index=pd.Index(self.steps, name="step"))
        index = pd.MultiIndex.from_product([self.steps, self.tensors], names=["step", "tensor"])
        values["learning_rate"] = np.repeat(values["learning_rate"], len(self.tensors))
        return pd.DataFrame({name: x.ravel() for name, x in values.items()}, index=index)

    @property
    def _is_per_tensor(self) -> bool:
        return bool(self._records) and self._records[0].gradient_norm.ndim == 1

    def plot(self, *, theme: str = "light") -> Figure:
        """Plots the effective learning rate of each layer over the steps, with the nominal rate dotted.

        A layer is the part of a path before its last "/". Its effective rate is that of all its tensors
        together. A line has at most 50 points; each is the mean over an interval of steps.

        Args:
            theme: "light" or "dark".

        Returns:
            The figure, which is not registered with pyplot.

        Raises:
            ValueError: If nothing has been recorded yet.
            ImportError: If matplotlib is missing.
        """
        require("TelemetryLog.plot", "study", "matplotlib")
        from adaptive_optax.monitoring.picture import draw

        if not self._records:
            raise ValueError("TelemetryLog.plot needs a measurement: append the optimizer's state first.")
        width = -(-len(self._records) // _MOST_POINTS)
        starts = range(0, len(self._records), width)

        def thinned(values):
            return np.array([np.mean(values[i : i + width], axis=0) for i in starts])

        rates = np.array([record.learning_rate for record in self._records])
        layers = {name: thinned(values) for name, values in self._layers().items()}
        return draw(thinned(self.steps), layers, thinned(rates), theme)

    def _layers(self) -> dict[str, np.ndarray]:
        """The effective learning rate of each layer at each step."""
        rates = np.array([record.effective_learning_rate for record in self._records])
        if not self._is_per_tensor:
            return {"all parameters": rates}
        # -<Delta, g> is additive over tensors, and so is |g|^2.
        squares = np.array([np.square(np.float64(record.gradient_norm)) for record in self._records])
        members: dict[str, list[int]] = {}
        for i, path in enumerate(self.tensors):
            members.setdefault(path.rpartition("/")[0] or path, []).append(i)
        layers = {}
        for name, chosen in members.items():
            total = squares[:, chosen].sum(axis=1)
            products = (rates[:, chosen] * squares[:, chosen]).sum(axis=1)
            layers[name] = np.divide(products, total, out=np.zeros_like(total), where=total != 0)
        return layers

    def to_tensorboard(self, writer: Any, prefix: str = "telemetry") -> None:
        """Writes the measurements since the last call as TensorBoard scalars and histograms.

        Args:
            writer: The folder of the run, or a writer with `add_scalar` and `add_histogram_raw`, such as
                `tensorboardX.SummaryWriter`, which stays open.
            prefix: The prefix of all tags: "telemetry/snr", or "telemetry/snr/encoder/kernel" per tensor.

        Raises:
            ImportError: If `writer` is a folder and tensorboardX is missing.
        """
        if isinstance(writer, str | os.PathLike):
            require("TelemetryLog.to_tensorboard", "tensorboard", "tensorboardX")
            from tensorboardX import SummaryWriter

            # File names have a resolution of one second, and another call must not overwrite this file.
            with SummaryWriter(os.fspath(writer), filename_suffix=f".{self._written}") as opened:
                self.to_tensorboard(opened, prefix)
            return
        suffixes = [f"/{path}" for path in self.tensors] if self._is_per_tensor else [""]
        for record in self._records[self._written :]:
            step = int(record.count)
            for i, suffix in enumerate(suffixes):
                for name in _SCALARS[1:]:
                    value = float(np.atleast_1d(getattr(record, name))[i])
                    if np.isfinite(value):
                        writer.add_scalar(f"{prefix}/{name}{suffix}", value, step)
                counts = np.atleast_2d(record.histogram)[i]
                if np.isfinite(counts).all():
                    _add_histogram(writer, f"{prefix}/histogram{suffix}", counts, step)
            if np.isfinite(record.learning_rate):
                writer.add_scalar(f"{prefix}/learning_rate", float(record.learning_rate), step)
            self._written += 1


def _add_histogram(writer: Any, tag: str, shares: np.ndarray, step: int) -> None:
    """Adds a histogram of the binary logarithms of the effective rates of coordinates."""
    edges = np.log2(Telemetry.histogram_edges)
    middles = (edges[:-1] + edges[1:]) / 2
    seen = np.flatnonzero(shares)
    low, high = (edges[seen[0]], edges[seen[-1] + 1]) if len(seen) else (0.0, 0.0)
    writer.add_histogram_raw(
        tag,
        min=low,
        max=high,
        num=float(shares.sum()),
        sum=float(shares @ middles),
        sum_squares=float(shares @ middles**2),
        bucket_limits=edges[1:].tolist(),
        bucket_counts=shares.tolist(),
        global_step=step,
    )
