"""Granularity: which coordinates share one second moment.

A granularity partitions the coordinates of a tree into groups I_k. `pool` reduces squared magnitudes to one
statistic per group, the mean or the sum of the group's squares, and `spread` broadcasts a group's value back
to its coordinates. The moving average, its storage and the direction come between the two, and none of them
depends on the grouping.

With `reduce="mean"` the direction's root mean square is about 1 for any groups, so a learning rate carries
over from one granularity to another. `"sum"` uses the plain norm of the group, which makes the direction
smaller by the square root of the group's size.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from adaptive_optax._core.checks import check_choice, check_integer
from adaptive_optax._core.paths import check_expressions, check_patterns, first_match, paths_and_leaves
from adaptive_optax._core.precision import abs_square, cast, real_dtype, scalar_dtype
from adaptive_optax._core.sharding import shapes_of
from adaptive_optax._core.trees import Params, PyTree

Reduce = Literal["mean", "sum"]
"""How the squares of a group become its statistic."""


class Granularity(abc.ABC):
    """Interface for partitions of a tree's coordinates into groups; instances are static and hashable.

    `pool` may return any tree of arrays. The simplest is a tree like the parameters in which each leaf is a
    scalar, or has the parameter's rank with axes of size 1 or of full size. Then the inherited `spread`
    works, and telemetry reads each leaf's own statistic. Otherwise override `spread` as well; telemetry,
    which sees only the state, then leaves values derived from the second moment undefined. If a statistic
    has a shape that broadcasts to its leaf, each of its values must belong to the coordinates it broadcasts
    to.
    """

    @property
    def is_mean_or_sum(self) -> bool:
        """Whether each statistic is the mean or the sum of its group's squares; False by default.

        If so, the direction has a bound that `reject_nonfinite` knows, which makes it faster.
        """
        return False

    @abc.abstractmethod
    def pool(self, squares: PyTree) -> PyTree:
        """Reduces a tree of squared magnitudes (real, at least float32) to one statistic per group."""

    def spread(self, pooled: PyTree, like: PyTree) -> PyTree:
        """Returns a tree like `like` of each group's value (a moment or its root), ready to broadcast."""
        return jax.tree.map(lambda x, value: cast(value, real_dtype(x)), like, pooled)

    def template(self, params: Params) -> PyTree:
        """Returns arrays or abstract arrays with the shapes and dtypes of the statistics of `params`.

        For a statistic with the parameter's own shape it is the parameter, so that the state has the same
        sharding.
        """
        pooled = shapes_of(lambda tree: self.pool(abs_square(tree)), params)
        if jax.tree.structure(pooled) != jax.tree.structure(params):
            return pooled
        return jax.tree.map(lambda x, t: x if t.shape == x.shape else t, params, pooled)


@dataclasses.dataclass(frozen=True)
class Coordinate(Granularity):
    """Keeps one second moment per coordinate, as RMSprop and Adam do.

    State cost: one value per coordinate. The direction is equivariant only under signed permutations.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> ao.scale_by_rms(granularity=ao.Coordinate()).init(jnp.ones((8, 3))).nu.shape
        (8, 3)
    """

    @property
    def is_mean_or_sum(self) -> bool:
        """True."""
        return True

    def pool(self, squares: PyTree) -> PyTree:
        """Returns the squares as they are."""
        return squares


@dataclasses.dataclass(frozen=True, init=False)
class Axis(Granularity):
    """Shares a second moment along the given axes of each leaf.

    The axes are kept with size 1, so with `Axis(-2)` a Flax Dense kernel of shape (in, out) has a moment of
    shape (1, out): one value per output neuron. A leaf without one of the axes, here the bias, has one value
    per coordinate. For convolution kernels the input axes are `Axis(-2, -3, -4)`. Note that `Axis(0)` also
    applies to biases.

    Args:
        *axes: The axes to share along; negative ones count from the end. At least one.
        reduce: `"mean"` (default) or `"sum"` of the squares along the axes.

    Raises:
        ValueError: If there is no axis, an axis is not an integer or `reduce` is unknown.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> tx = ao.scale_by_rms(granularity=ao.Axis(-2))
        >>> nu = tx.init({"kernel": jnp.ones((8, 3)), "bias": jnp.ones(3)}).nu
        >>> nu["kernel"].shape, nu["bias"].shape
        ((1, 3), (3,))

    Source: Kalra et al. 2025 (SlimAdam) and Zhang et al. 2024 (Adam-mini) share moments in this way.
    """

    axes: tuple[int, ...]
    reduce: Reduce = "mean"

    def __init__(self, *axes: int, reduce: Reduce = "mean"):
        if not axes:
            raise ValueError("Axis needs at least one axis, as in Axis(0) or Axis(0, 1).")
        for axis in axes:
            check_integer("axes", axis, "(-inf, inf)")
        check_choice("reduce", reduce, ("mean", "sum"))
        object.__setattr__(self, "axes", tuple(int(axis) for axis in axes))
        object.__setattr__(self, "reduce", reduce)

    @property
    def is_mean_or_sum(self) -> bool:
        """True."""
        return True

    def pool(self, squares: PyTree) -> PyTree:
        """Reduces the leaves that have all the axes, keeping the axes with size 1."""

        def leaf(x):
            if not all(-x.ndim <= axis < x.ndim for axis in self.axes):
                return x
            axes = tuple({axis % x.ndim for axis in self.axes})
            total = jnp.sum(x, axis=axes, keepdims=True)
            return _reduced(total, math.prod(x.shape[axis] for axis in axes), self.reduce)

        return jax.tree.map(leaf, squares)


@dataclasses.dataclass(frozen=True)
class Tensor(Granularity):
    """Shares one second moment within each leaf: one scalar per leaf.

    The direction of each leaf is parallel to that leaf's gradient (or first moment).

    Args:
        reduce: `"mean"` (default) or `"sum"` of the leaf's squares.

    Raises:
        ValueError: If `reduce` is unknown.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> ao.scale_by_adam(granularity=ao.Tensor()).init(jnp.ones(1_000_000)).nu.size
        1
    """

    reduce: Reduce = "mean"

    def __post_init__(self) -> None:
        check_choice("reduce", self.reduce, ("mean", "sum"))

    @property
    def is_mean_or_sum(self) -> bool:
        """True."""
        return True

    def pool(self, squares: PyTree) -> PyTree:
        """Reduces every leaf to a scalar; an empty leaf gives 0."""
        return jax.tree.map(lambda x: _reduced(jnp.sum(x), x.size, self.reduce), squares)


@dataclasses.dataclass(frozen=True)
class Labels(Granularity):
    """Shares one second moment among all leaves that have the same label.

    A label's statistic is the sum of squares over its leaves, divided by their number of coordinates; it is
    not a mean of the leaves' means. The moment is a vector with one value per label, in first-seen order.

    Args:
        label_fn: `label_fn(path, leaf) -> hashable`, with paths such as `"encoder/layers/0/kernel"`. It
            receives each leaf as a floating `jax.ShapeDtypeStruct`, and is called while tracing.
        reduce: `"mean"` (default) or `"sum"` of the label's squares.

    Raises:
        ValueError: If `label_fn` is not callable, `reduce` is unknown or, at init, a label is unhashable.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> params = {"a": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "b": {"bias": jnp.ones(2)}}
        >>> by_name = ao.Labels(lambda path, leaf: path.split("/")[-1])
        >>> ao.scale_by_rms(granularity=by_name).init(params).nu.shape
        (2,)
    """

    label_fn: Callable[[str, Any], Hashable]
    reduce: Reduce = "mean"

    def __post_init__(self) -> None:
        if not callable(self.label_fn):
            raise ValueError(f"label_fn must be a function (path, leaf) -> label, got {self.label_fn!r}.")
        check_choice("reduce", self.reduce, ("mean", "sum"))

    @classmethod
    def by_path(
        cls, patterns: Mapping[str, Hashable], default: Hashable = None, reduce: Reduce = "mean"
    ) -> Labels:
        """Labels leaves by the first pattern that `re.search` finds in their path.

        Args:
            patterns: `{pattern: label}`; the first match wins. It is an error at init if a pattern matches no
                leaf. Leaves hidden by `optax.masked` count as leaves.
            default: The label of leaves that no pattern matches; they share one moment as well.
            reduce: As in `Labels`.

        Returns:
            The granularity.

        Raises:
            ValueError: If `patterns` is not a mapping from regular expressions to hashable labels.

        Examples:
            >>> import adaptive_optax as ao, jax.numpy as jnp
            >>> params = {"embed": jnp.ones((4, 2)), "head": {"kernel": jnp.ones((2, 4))}}
            >>> tx = ao.scale_by_rms(granularity=ao.Labels.by_path({"embed": "tokens"}, default="rest"))
            >>> tx.init(params).nu.shape
            (2,)
        """
        if not isinstance(patterns, Mapping):
            raise ValueError(f"patterns must be a mapping {{pattern: label}}, got {patterns!r}.")
        check_expressions("patterns", patterns)
        label_fn = _LabelByPath(tuple(patterns.items()), default)
        try:
            hash(label_fn)
        except TypeError as error:
            raise ValueError(f"patterns must give hashable labels, got {patterns!r}.") from error
        return cls(label_fn, reduce)

    @property
    def is_mean_or_sum(self) -> bool:
        """True."""
        return True

    def pool(self, squares: PyTree) -> PyTree:
        """Sums squares and counts over the leaves of each label; returns a vector."""
        leaves = jax.tree.leaves(squares)
        indices = self._indices(squares)
        dtype = scalar_dtype(squares)
        totals = [jnp.zeros((), dtype)] * (1 + max(indices, default=-1))
        counts = [0] * len(totals)
        for index, x in zip(indices, leaves, strict=True):
            totals[index] += cast(jnp.sum(x), dtype)
            counts[index] += x.size
        groups = [_reduced(total, n, self.reduce) for total, n in zip(totals, counts, strict=True)]
        return jnp.stack(groups) if groups else jnp.zeros((0,), dtype)

    def spread(self, pooled: PyTree, like: PyTree) -> PyTree:
        """Picks each leaf's value from the vector of labels."""
        leaves, treedef = jax.tree.flatten(like)
        picked = (cast(pooled[i], real_dtype(x)) for i, x in zip(self._indices(like), leaves, strict=True))
        return jax.tree.unflatten(treedef, picked)

    def _indices(self, tree: Any) -> list[int]:
        if isinstance(self.label_fn, _LabelByPath):
            check_patterns(dict(self.label_fn.items), tree)
        order: dict[Hashable, int] = {}
        indices = []
        for path, leaf in paths_and_leaves(tree):
            # The label function must see the same for squares and gradients, whatever their dtypes.
            label = self.label_fn(path, jax.ShapeDtypeStruct(leaf.shape, real_dtype(leaf)))
            try:
                indices.append(order.setdefault(label, len(order)))
            except TypeError as error:
                raise ValueError(
                    f"label_fn must return a hashable label, got {label!r} for the leaf {path!r}."
                ) from error
        return indices


@dataclasses.dataclass(frozen=True)
class _LabelByPath:
    """The label function of `Labels.by_path`."""

    items: tuple[tuple[str, Hashable], ...]
    default: Hashable

    def __call__(self, path: str, leaf: Any) -> Hashable:
        pattern = first_match(dict(self.items), path)
        return self.default if pattern is None else dict(self.items)[pattern]


@dataclasses.dataclass(frozen=True)
class Global(Granularity):
    """Shares one second moment among all coordinates of the tree: one scalar.

    The direction is parallel to the gradient (or first moment), and the step is equivariant under any
    rotation of the parameters. Seen as an ODE solver, RMSprop in this form bounds the length of a step.

    Args:
        reduce: `"mean"` (default) or `"sum"`. `Global("sum")` with decay 0 is normalised gradient descent.

    Raises:
        ValueError: If `reduce` is unknown.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> ao.scale_by_rms(granularity=ao.Global()).init({"a": jnp.ones(3), "b": jnp.ones(4)}).nu.shape
        ()
    """

    reduce: Reduce = "mean"

    def __post_init__(self) -> None:
        check_choice("reduce", self.reduce, ("mean", "sum"))

    @property
    def is_mean_or_sum(self) -> bool:
        """True."""
        return True

    def pool(self, squares: PyTree) -> PyTree:
        """Reduces the whole tree to a scalar; an empty tree gives 0."""
        dtype = scalar_dtype(squares)
        leaves = jax.tree.leaves(squares)
        total = sum((cast(jnp.sum(x), dtype) for x in leaves), start=jnp.zeros((), dtype))
        return _reduced(total, sum(x.size for x in leaves), self.reduce)

    def spread(self, pooled: PyTree, like: PyTree) -> PyTree:
        """Gives every leaf the same value."""
        return jax.tree.map(lambda x: cast(pooled, real_dtype(x)), like)


def _reduced(total: jax.Array, count: int, reduce: Reduce) -> jax.Array:
    return total / float(max(count, 1)) if reduce == "mean" else total


_BY_NAME = {"coordinate": Coordinate(), "tensor": Tensor(), "global": Global()}


def as_granularity(value: Granularity | str, name: str = "granularity") -> Granularity:
    """Returns the granularity that a user gave as an argument of a transformation.

    Args:
        value: A `Granularity`, "coordinate", "tensor" or "global".
        name: The name of the argument, for errors.

    Returns:
        The granularity.

    Raises:
        ValueError: If the value is none of these.

    Examples:
        >>> import adaptive_optax as ao
        >>> ao.as_granularity("tensor")
        Tensor(reduce='mean')
    """
    if isinstance(value, Granularity):
        return value
    if isinstance(value, str) and value in _BY_NAME:
        return _BY_NAME[value]
    raise ValueError(
        f"{name} must be Coordinate(), Axis(...), Tensor(), Labels(...), Global(), ByPath(...) or one of "
        f"{', '.join(map(repr, _BY_NAME))}, got {value!r}."
    )


def is_own_statistic(statistic: tuple[int, ...], leaf: tuple[int, ...]) -> bool:
    """Whether a statistic's shape broadcasts to a leaf, so that it belongs to this leaf alone."""
    if not statistic:
        return True
    return len(statistic) == len(leaf) and all(n in (1, m) for n, m in zip(statistic, leaf, strict=True))


def regrouped(x: jax.Array, leaf: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array | None:
    """Returns a leaf's own statistic at another granularity, in `shape`: the mean over what its groups share.

    None if `shape`, or that of x, is not one of the leaf's own statistics.
    """
    if not (is_own_statistic(jnp.shape(x), leaf) and is_own_statistic(shape, leaf)):
        return None
    return mean_over_groups(jnp.broadcast_to(x, leaf), shape)


def mean_over_groups(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns the mean of each group of x, where the means have shape `shape` (see `is_own_statistic`)."""
    if shape == x.shape:
        return x
    axes = tuple(axis for axis in range(x.ndim) if not shape or shape[axis] != x.shape[axis])
    total = jnp.sum(x, axis=axes, keepdims=bool(shape))
    return total / max(1, math.prod(x.shape[axis] for axis in axes))
