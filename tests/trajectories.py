"""Gradients for a mixed tree, transformations run on them, and the comparison of what comes out.

First a hundred fixed gradients, then short drawn sequences for properties.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from reference.moments import Pooling

import adaptive_optax as ao

STEPS = 100

# A scalar, a vector, a matrix, a complex 3-D leaf and an empty one, with scales over seven decades.
SHAPES = {
    "body/attention": (2, 3, 2),
    "head/bias": (3,),
    "head/empty": (0, 2),
    "head/kernel": (4, 3),
    "scale": (),
}
SCALES = {
    "body/attention": 1e-4,
    "head/bias": 1.0,
    "head/empty": 1.0,
    "head/kernel": 1e-2,
    "scale": 1e3,
}
FEW = (
    "body/attention",
    "head/kernel",
)  # enough where coordinates do not see each other; half the compilation
LABELS = {path: "weights" if path in ("body/attention", "head/kernel") else "rest" for path in SHAPES}

# name: (the library's granularity, the reference's)
GRANULARITIES = {
    "coordinate": (ao.Coordinate(), Pooling()),
    "axis 0": (ao.Axis(0), Pooling("axis", (0,))),
    "axis -1, sum": (ao.Axis(-1, reduce="sum"), Pooling("axis", (-1,), reduce="sum")),
    "axes 0 and -2": (ao.Axis(0, -2), Pooling("axis", (0, -2))),  # of a matrix one axis, of a vector none
    "tensor": (ao.Tensor(), Pooling("tensor")),
    "labels": (ao.Labels(lambda path, leaf: LABELS[path]), Pooling("labels", labels=LABELS)),
    "labels, sum": (
        ao.Labels.by_path({"kernel|attention": "weights"}, default="rest", reduce="sum"),
        Pooling("labels", labels=LABELS, reduce="sum"),
    ),
    "global": (ao.Global(), Pooling("global")),
    "global, sum": (ao.Global("sum"), Pooling("global", reduce="sum")),
}


@dataclasses.dataclass(frozen=True)
class Table:
    """A schedule that looks its values up: the same number in the library, in optax and in the reference."""

    values: tuple[float, ...]

    def __call__(self, count):
        return jnp.asarray(self.values)[count]


def decays(seed: int, longest: int, unit: int) -> Table:
    """Decays 1 - k/unit with k up to `longest`: they and their complements are exact in float32."""
    return Table(tuple(1 - np.random.default_rng(seed).integers(1, longest, STEPS) / unit))


def gradients(
    dtype: str,
    paths: Iterable[str] = tuple(SHAPES),
    *,
    steps: int = STEPS,
    seed: int = 0,
    centered: bool = False,
) -> dict:
    """Gradients, stacked over the steps, in NumPy.

    They wax and wane over two decades, so that second moments rise and fall. The last column of "head/kernel"
    instead has a mean far above its noise, which takes a centred second moment to its floor; "scale" has one
    that keeps its first moment from cancelling. With `centered=True` all means are 0. In "body/attention" the
    first gradient is 0, in "head/kernel" one row comes late and one coordinate never. The float64 values are
    the float32 ones, so that one run of a reference serves both.
    """
    rng = np.random.default_rng(seed)
    wave = 10 ** np.sin(np.arange(steps) / 15)
    tree = {}
    for path, shape in SHAPES.items():
        noise = rng.normal(size=(steps, *shape))
        if path == "body/attention":
            noise = noise + 1j * rng.normal(size=(steps, *shape))
        mean = 4.0 if path == "scale" and not centered else 0.0
        leaf = (mean + noise) * wave.reshape(-1, *[1] * len(shape))
        if path == "head/kernel" and not centered:
            leaf[..., -1] = 30 + noise[..., -1]
        tree[path] = (SCALES[path] * leaf).astype(np.complex64 if np.iscomplexobj(leaf) else np.float32)
    tree["body/attention"][0] = 0
    tree["head/kernel"][:5, 1] = 0
    tree["head/kernel"][:, 0, 0] = 0
    return {path: tree[path].astype(_dtype(tree[path], dtype)) for path in paths}


def parameters(dtype: str, paths: Iterable[str] = tuple(SHAPES)) -> dict:
    """Parameters for the gradients, in NumPy."""
    return {path: leaf[0] for path, leaf in gradients(dtype, paths, steps=1, seed=1).items()}


def _dtype(leaf: np.ndarray, dtype: str) -> Any:
    if np.iscomplexobj(leaf):
        return np.complex128 if dtype == "float64" else np.complex64
    return jnp.dtype(dtype)


class Run(NamedTuple):
    """What a run gave, in NumPy and stacked over the steps; `params` are those before each step."""

    updates: Any
    states: Any
    params: Any


def run(tx: Any, grads: Any, params: Any) -> Run:
    """Takes one step for each gradient, adding the updates to the parameters.

    One compilation, of the step: of a `lax.scan` over the steps it would take XLA four times as long.
    """
    step = jax.jit(tx.update)
    state = tx.init(params)
    records = []
    for t in range(len(jax.tree.leaves(grads)[0])):
        updates, state = step(jax.tree.map(lambda g, t=t: g[t], grads), state, params)
        records.append(Run(updates, state, params))
        params = jax.tree.map(lambda p, u: np.add(p, u).astype(p.dtype), params, updates)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *records)


def run_reference(method: Any, grads: dict) -> dict:
    """Takes the reference's steps and stacks what they return."""
    steps = len(next(iter(grads.values())))
    results = [method.step({path: leaf[t] for path, leaf in grads.items()}) for t in range(steps)]
    return {path: np.stack([result[path] for result in results]) for path in grads}


def assert_close(
    ours: dict, expected: dict, rtol: float, *, terms: dict | None = None, skip: int = 0
) -> None:
    """Compares stacked trees, coordinate by coordinate.

    `terms` is for signed sums (see `tolerances`): the error allowed is then also relative to its largest
    entry in the leaf at that step. The sum itself will do where not all of a leaf cancels.
    """
    assert ours.keys() == expected.keys()
    for path in expected:
        actual, wanted = (np.asarray(tree[path])[skip:] for tree in (ours, expected))
        assert actual.shape == wanted.shape and np.isfinite(wanted).all()
        allowed = rtol * np.abs(wanted)
        if terms is not None:
            sizes = np.abs(terms[path][skip:])
            allowed = allowed + rtol * sizes.max(axis=tuple(range(1, sizes.ndim)), keepdims=True, initial=0)
        error = np.abs(actual.astype(np.result_type(wanted, np.float64)) - wanted)
        wrong = ~(error <= allowed)  # True for NaN
        if wrong.any():
            where = tuple(int(i) for i in np.argwhere(wrong)[0])
            relative = np.max(error[wrong] / np.maximum(np.abs(wanted[wrong]), 1e-300))
            raise AssertionError(
                f"{path}: {wrong.sum()} of {wrong.size} values differ by up to {relative:.2g}, the first at "
                f"(step, ...) = {where}: {actual[where]} instead of {wanted[where]}"
            )


def at_step(tree: Any, step: int) -> Any:
    """Picks one step from a stacked tree."""
    return jax.tree.map(lambda x: x[step], tree)


# Drawn sequences: six gradients of eight coordinates, a matrix of 2 x 3 and a vector of 2. They have one
# shape, so that one compiled function serves all examples.
LENGTH, WIDTH = 6, 8


def tree_of(flat: Any) -> dict:
    """The tree whose coordinates, last axis of `flat`, are given in order."""
    return {"a": flat[..., :6].reshape(*flat.shape[:-1], 2, 3), "b": flat[..., 6:]}


def flat_of(tree: dict) -> np.ndarray:
    """The inverse of `tree_of` for any number of trees stacked along the first axis."""
    return np.concatenate(
        [np.asarray(tree["a"]).reshape(-1, 6), np.asarray(tree["b"]).reshape(-1, 2)], axis=1
    )


@st.composite
def sequences(draw) -> np.ndarray:
    """Gradients, flat, whose coordinates have scales from 1e-3 to 1e3; some entries are 0."""
    entry = st.floats(-1, 1, width=32).map(lambda x: x if abs(x) > 1e-6 else 0.0)
    unit = draw(hnp.arrays(np.float32, (LENGTH, WIDTH), elements=entry))
    exponents = draw(hnp.arrays(np.int8, WIDTH, elements=st.integers(-3, 3)))
    return np.float32(unit * 10.0**exponents)


def signs() -> st.SearchStrategy:
    """A sign for every coordinate."""
    return hnp.arrays(np.float32, WIDTH, elements=st.sampled_from([-1, 1]))


def assert_zeros_do_not_move(tx: Any) -> None:
    """Zero gradients give exactly zero, and the gradients after them do not suffer."""
    zeros = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(()), "c": jnp.zeros(2, jnp.complex64)}
    state = tx.init(zeros)
    for _ in range(2):
        updates, state = tx.update(zeros, state)
        jax.tree.map(np.testing.assert_array_equal, updates, zeros)
    updates, _ = tx.update(jax.tree.map(lambda x: x + 2, zeros), state)
    for u in jax.tree.leaves(updates):
        assert np.isfinite(u).all() and (np.abs(u) > 0.5).all()


def assert_a_nan_is_not_hidden(tx: Any) -> None:
    """A NaN in a gradient is in the direction, and stays there with the moments."""
    params = {"a": jnp.zeros(3), "b": jnp.zeros(2)}
    updates, state = tx.update({"a": jnp.array([1.0, jnp.nan, 0.0]), "b": jnp.zeros(2)}, tx.init(params))
    assert np.isnan(updates["a"][1])
    updates, _ = tx.update({"a": jnp.ones(3), "b": jnp.zeros(2)}, state)
    assert np.isnan(updates["a"][1])


def spoiled(tree, value, leaf="b"):
    """The tree with a value in the second last place of a leaf."""
    changed = np.array(tree[leaf])
    changed.flat[-2] = value
    return tree | {leaf: changed}
