"""Granularity: which coordinates share one second moment.

A granularity partitions the coordinates of a tree into groups I_k. `pool` turns squared magnitudes into one
statistic a group, the mean or the sum of the group's squares, and `spread` lays a group's value over its
coordinates again. Between the two stand the moving average, its storage and the direction, none of which
knows how the coordinates are grouped.

With `reduce="mean"` the direction's root mean square is about 1 whatever the groups are, so a learning rate
carries over from one granularity to another. With `"sum"` the group's plain norm is used, which makes the
direction smaller by the square root of the group's size.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from adaptive_optax._checks import check_choice, check_integer
from adaptive_optax._paths import check_expressions, check_patterns, first_match, paths_and_leaves
from adaptive_optax._precision import abs_square, cast, real_dtype, scalar_dtype

Reduce = Literal["mean", "sum"]


class Granularity(abc.ABC):
    """Interface of the partition of a tree's coordinates into groups; instances are static and hashable.

    Attributes:
        per_leaf: Whether every leaf has its statistic at its own place in the tree, and `spread` does with a
            leaf what it does with the tree: then a step is taken leaf by leaf, and traced once for leaves
            that look alike. False, the default, is never wrong.
    """

    per_leaf: ClassVar[bool] = False

    def __init_subclass__(cls, **arguments: Any):
        super().__init_subclass__(**arguments)
        if "per_leaf" not in vars(cls) and not vars(cls).keys().isdisjoint({"pool", "spread"}):
            cls.per_leaf = False  # what a parent says of its own functions does not hold for these

    @abc.abstractmethod
    def pool(self, squares: Any) -> Any:
        """Reduces a tree of squared magnitudes (real, float32 at least) to one statistic a group."""

    def spread(self, pooled: Any, like: Any) -> Any:
        """Returns a tree like `like` whose leaves broadcast a group's value, a moment or its root."""
        return jax.tree.map(lambda x, value: cast(value, real_dtype(x)), like, pooled)

    def template(self, params: Any) -> Any:
        """Returns arrays or abstract arrays with the shapes and dtypes of the statistics of `params`.

        A parameter stands for a statistic of its own shape, so that the state follows its sharding.
        """
        pooled = jax.eval_shape(lambda tree: self.pool(abs_square(tree)), params)
        if jax.tree.structure(pooled) != jax.tree.structure(params):
            return pooled
        return jax.tree.map(lambda x, t: x if t.shape == x.shape else t, params, pooled)


@dataclasses.dataclass(frozen=True)
class Coordinate(Granularity):
    """Keeps one second moment for every coordinate, as RMSprop and Adam do.

    State cost: one value a coordinate. The direction is equivariant under signed permutations only.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> ao.scale_by_rms(granularity=ao.Coordinate()).init(jnp.ones((8, 3))).nu.shape
        (8, 3)
    """

    per_leaf = True

    def pool(self, squares: Any) -> Any:
        """Returns the squares as they are."""
        return squares


@dataclasses.dataclass(frozen=True, init=False)
class Axis(Granularity):
    """Shares a second moment along the given axes of each leaf.

    The axes are kept with size 1, so a Flax Dense kernel of shape (in, out) has with `Axis(-2)` a moment of
    shape (1, out): one value an output neuron. A leaf that lacks one of the axes, here the bias, stays per
    coordinate. A convolution's kernel has its inputs at `Axis(-2, -3, -4)`. Mind that `Axis(0)` is an axis
    of a bias too.

    Args:
        *axes: The axes to share along; negative ones count from the end. At least one.
        reduce: `"mean"` (default) or `"sum"` of the squares along the axes.

    Raises:
        ValueError: If there is no axis, an axis is no integer or `reduce` is unknown.

    Example:
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

    per_leaf = True

    def pool(self, squares: Any) -> Any:
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
    """Shares one second moment within each leaf: one scalar a leaf.

    The direction of each leaf is parallel to that leaf's gradient (or first moment).

    Args:
        reduce: `"mean"` (default) or `"sum"` of the leaf's squares.

    Raises:
        ValueError: If `reduce` is unknown.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> ao.scale_by_adam(granularity=ao.Tensor()).init(jnp.ones(1_000_000)).nu.size
        1
    """

    reduce: Reduce = "mean"

    def __post_init__(self):
        check_choice("reduce", self.reduce, ("mean", "sum"))

    per_leaf = True

    def pool(self, squares: Any) -> Any:
        """Reduces every leaf to a scalar; an empty leaf gives 0."""
        return jax.tree.map(lambda x: _reduced(jnp.sum(x), x.size, self.reduce), squares)


@dataclasses.dataclass(frozen=True)
class Labels(Granularity):
    """Shares one second moment among all leaves that carry the same label.

    A label's statistic is the sum of squares over its leaves, divided by their number of coordinates; never
    a mean of the leaves' means. The moment is one vector with a value a label, in first-seen order.

    Args:
        label_fn: `label_fn(path, leaf) -> hashable`, with paths such as `"encoder/layers/0/kernel"`; of the
            leaf it sees the shape only, as a float `jax.ShapeDtypeStruct`. It is called while tracing.
        reduce: `"mean"` (default) or `"sum"` of the label's squares.

    Raises:
        ValueError: If `label_fn` is not callable, `reduce` is unknown or, at init, a label is unhashable.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> params = {"a": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "b": {"bias": jnp.ones(2)}}
        >>> by_name = ao.Labels(lambda path, leaf: path.split("/")[-1])
        >>> ao.scale_by_rms(granularity=by_name).init(params).nu.shape
        (2,)
    """

    label_fn: Callable[[str, Any], Hashable]
    reduce: Reduce = "mean"

    def __post_init__(self):
        if not callable(self.label_fn):
            raise ValueError(f"label_fn must be a function (path, leaf) -> label, got {self.label_fn!r}.")
        check_choice("reduce", self.reduce, ("mean", "sum"))

    @classmethod
    def by_path(
        cls, patterns: Mapping[str, Hashable], default: Hashable = None, reduce: Reduce = "mean"
    ) -> Labels:
        """Labels leaves by the first pattern that `re.search` finds in their path.

        Args:
            patterns: `{pattern: label}`; the first that matches wins. A pattern that matches no leaf at all
                is an error when the state is initialised. Leaves that `optax.masked` hides count.
            default: The label of leaves that no pattern matches; these share one moment too.
            reduce: As in `Labels`.

        Returns:
            The granularity.

        Raises:
            ValueError: If `patterns` is no mapping from regular expressions to hashable labels.

        Example:
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

    def pool(self, squares: Any) -> Any:
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

    def spread(self, pooled: Any, like: Any) -> Any:
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
            # The same for squares and gradients, in whatever dtypes they come.
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
    rotation of the parameters. Read as an ODE solver, RMSprop in this form bounds the length of a step.

    Args:
        reduce: `"mean"` (default) or `"sum"`. `Global("sum")` with decay 0 is normalised gradient descent.

    Raises:
        ValueError: If `reduce` is unknown.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> ao.scale_by_rms(granularity=ao.Global()).init({"a": jnp.ones(3), "b": jnp.ones(4)}).nu.shape
        ()
    """

    reduce: Reduce = "mean"

    def __post_init__(self):
        check_choice("reduce", self.reduce, ("mean", "sum"))

    def pool(self, squares: Any) -> Any:
        """Reduces the whole tree to a scalar; an empty tree gives 0."""
        dtype = scalar_dtype(squares)
        leaves = jax.tree.leaves(squares)
        total = sum((cast(jnp.sum(x), dtype) for x in leaves), start=jnp.zeros((), dtype))
        return _reduced(total, sum(x.size for x in leaves), self.reduce)

    def spread(self, pooled: Any, like: Any) -> Any:
        """Gives every leaf the one value."""
        return jax.tree.map(lambda x: cast(pooled, real_dtype(x)), like)


def _reduced(total: jax.Array, count: int, reduce: Reduce) -> jax.Array:
    return total / float(max(count, 1)) if reduce == "mean" else total


_BY_NAME = {"coordinate": Coordinate(), "tensor": Tensor(), "global": Global()}


def as_granularity(value: Granularity | str, name: str = "granularity") -> Granularity:
    """Returns the granularity that an argument means."""
    if isinstance(value, Granularity):
        return value
    if isinstance(value, str) and value in _BY_NAME:
        return _BY_NAME[value]
    raise ValueError(
        f"{name} must be Coordinate(), Axis(...), Tensor(), Labels(...), Global(), ByPath(...) or one of "
        f"{', '.join(map(repr, _BY_NAME))}, got {value!r}."
    )
