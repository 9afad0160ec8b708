"""Measurements of `telemetry` collected over a run: a table, a picture, TensorBoard."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from adaptive_optax._extras import require
from adaptive_optax._paths import paths_and_leaves
from adaptive_optax.control.telemetry import Telemetry, get_telemetry

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_SCALARS = Telemetry._fields[1:-1]
_MOST_POINTS = 50  # on a line: single steps are noisy


class TelemetryLog:
    """Collects what `telemetry` measures, outside of jit.

    Append the optimizer's state when you log: the values are copied to the host, which waits for the step.
    In a scan, return `get_telemetry(state)` for every step and give the stacked result to `extend`.

    Args:
        params: The parameters, or their shapes, whose paths name the tensors of
            `telemetry(..., per="tensor")`; not needed for "tree".

    Example:
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

    def __init__(self, params: Any = None):
        self.tensors = [path for path, _ in paths_and_leaves(params)]
        self._records: list[Telemetry] = []
        self._written = 0

    def __len__(self) -> int:
        return len(self._records)

    def append(self, opt_state: Any) -> None:
        """Notes the last measurement, unless it is noted already or there is none yet.

        Args:
            opt_state: A state with one `telemetry` in it, such as `nnx.Optimizer(...).opt_state`.

        Raises:
            ValueError: If it has none or several, or the tensors are not those of `params`.
        """
        self._note(jax.device_get(get_telemetry(opt_state)))

    def extend(self, measurements: Telemetry) -> None:
        """Notes several measurements.

        Args:
            measurements: What `get_telemetry` returned for each of several steps, stacked on a leading axis.

        Raises:
            ValueError: If it is not that, or the tensors are not those of `params`.
        """
        if not isinstance(measurements, Telemetry) or np.ndim(measurements.count) != 1:
            raise ValueError(
                "measurements must be a Telemetry with a leading axis of steps, as a scan stacks what "
                f"get_telemetry returns, got {type(measurements).__name__}."
            )
        stacked = jax.device_get(measurements)
        for i in range(len(stacked.count)):
            self._note(Telemetry(*(x[i] for x in stacked)))

    def _note(self, seen: Telemetry) -> None:
        if seen.gradient_norm.ndim and len(seen.gradient_norm) != len(self.tensors):
            raise ValueError(
                f"params of TelemetryLog must have the {len(seen.gradient_norm)} tensors that were measured, "
                f"got {len(self.tensors)}: give it the tree that telemetry was initialised with."
            )
        if seen.count > 0 and (not self._records or seen.count != self._records[-1].count):
            self._records.append(seen)

    @property
    def steps(self) -> np.ndarray:
        """The steps that were measured, counted from 1."""
        return np.array([int(record.count) for record in self._records], int)

    @property
    def histograms(self) -> np.ndarray:
        """The shares of coordinates in each bin of `Telemetry.histogram_edges`: step (by tensor) by bin."""
        return np.array([record.histogram for record in self._records])

    @property
    def table(self) -> pd.DataFrame:
        """The measurements, one row a step, or with `per="tensor"` one for each step and tensor.

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
        """Draws the effective learning rate of every layer over the steps, and dotted the rate as given.

        A layer is what stands before the last "/" of a path. Its effective rate is that of its tensors
        together. A line has at most 50 points, means over the steps between them.

        Args:
            theme: "light" or "dark".

        Returns:
            The figure, which belongs to nobody but the caller.

        Raises:
            ValueError: If nothing was noted yet.
            ImportError: If matplotlib is missing.
        """
        require("TelemetryLog.plot", "study", "matplotlib")
        from adaptive_optax.control.telemetry_picture import draw

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
        """Writes what has not been written yet as TensorBoard scalars and histograms.

        Args:
            writer: The folder of the run, or a writer with `add_scalar` and `add_histogram_raw`, such as
                `tensorboardX.SummaryWriter`, which stays open.
            prefix: Stands before every tag: "telemetry/snr", or "telemetry/snr/encoder/kernel" per tensor.

        Raises:
            ImportError: If `writer` is a folder and tensorboardX is missing.
        """
        if isinstance(writer, str | os.PathLike):
            require("TelemetryLog.to_tensorboard", "tensorboard", "tensorboardX")
            from tensorboardX import SummaryWriter

            # Files are named by the second: another call must not overwrite this one's.
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
    """Adds a histogram of the binary logarithm of the coordinates' effective rates."""
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
