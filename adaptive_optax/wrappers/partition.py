"""Parameter groups by the paths of leaves, with their own optimizer, learning rate or weight decay."""

from __future__ import annotations

import abc
import dataclasses
import functools
import re
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from adaptive_optax._core.checks import check_integer, check_same_tree, check_transformation
from adaptive_optax._core.described import described, description_of
from adaptive_optax._core.paths import check_expressions, check_patterns, first_match, paths_and_leaves
from adaptive_optax._core.transformation import transformation
from adaptive_optax._core.trees import Mask, Params, PyTree

_DEFAULT = "default"


def partition_by_path(
    transformations: Mapping[str, optax.GradientTransformation],
    default: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Assigns each parameter to the first transformation whose pattern is found in its path.

    Use it for a smaller learning rate in the body than in the head, for a rate that decays layer by layer, or
    for a different optimizer for embeddings. To keep parameters fixed, use `freeze` instead:
    `optax.set_to_zero` for a group does not hide its gradients from transformations that see all groups, such
    as clipping before the partition. Paths are readable, "encoder/layers/3/attention/kernel", and the same
    for dictionaries, linen, nnx and dataclasses; `describe_partition` shows the assignment.

    A NaN or a huge gradient affects its own group as it affects the group's transformation, and does not
    affect the other groups.

    A pattern is a regular expression that may match anywhere in the path, so "layer_1" also matches
    "layer_10". End a name with its slash, "layer_1/", and begin it with "^" or "/" if another name may have
    the same ending.

    Args:
        transformations: `{pattern: transformation}`; the first match wins. It is an error if a pattern
            matches no leaf, but not if all its leaves go to earlier patterns. Leaves hidden by `optax.masked`
            count as leaves.
        default: The transformation of leaves that no pattern matches; with None such leaves are an error.

    Returns:
        An `optax.partition`, with the patterns (and "default") as labels in its state.
        `get_hyperparams` therefore has keys such as "pattern/learning_rate", and a checkpoint must be
        restored with the same patterns.

    Raises:
        ValueError: If `transformations` is empty or is not a mapping from regular expressions to
            transformations (at construction); if a pattern matches no leaf, or a leaf no pattern (at init;
            the message lists the paths); if the leaves of `params` differ from those of the updates (at
            update).

    State cost: the states of the transformations, each for its own leaves.

    Examples:
        A tenth of the learning rate in the body:

        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> params = {f"layer_{i}": {"kernel": jnp.ones((2, 2))} for i in range(12)} | {"head": jnp.ones(2)}
        >>> schedule = ao.warmup_cosine(1e-3, 1000, warmup_steps=100)
        >>> tx = ao.partition_by_path(
        ...     {"^layer_": ao.adamw(lambda count: 0.1 * schedule(count))}, default=ao.adamw(schedule)
        ... )

        Layer-wise learning rate decay, by 0.8 per layer from the head down:

        >>> layers = {rf"^layer_{i}/": ao.adamw(1e-3 * 0.8 ** (12 - i)) for i in range(12)}
        >>> tx = ao.partition_by_path(layers, default=ao.adamw(1e-3))
        >>> rates = ao.get_hyperparams(tx.init(params))
        >>> [round(float(rates[f"^layer_{i}//learning_rate"]), 6) for i in (1, 10, 11)]
        [8.6e-05, 0.00064, 0.0008]
    """
    if not isinstance(transformations, Mapping) or not transformations:
        raise ValueError(
            "transformations must be a mapping {pattern: transformation} with at least one entry, "
            f"got {transformations!r}."
        )
    check_expressions("The patterns of transformations", transformations)
    for pattern, tx in transformations.items():
        check_transformation(f"The transformation of {pattern!r}", tx)
    labelled: dict[Hashable, optax.GradientTransformation] = {**transformations}
    if default is not None:
        check_transformation("default", default)
        if _DEFAULT in labelled:
            raise ValueError(
                f"The pattern {_DEFAULT!r} is reserved for default=; write it as '({_DEFAULT})'."
            )
        labelled[_DEFAULT] = default
    groups = _ByPattern(tuple(transformations), has_default=default is not None)
    inner = optax.partition(labelled, groups.labels)

    def update_fn(updates, state, params=None, **extra_args):
        if params is not None:
            check_same_tree("partition_by_path", "params", params, "updates", updates, ordered=False)
            # optax masks the two together, so they must have the same containers.
            by_path = dict(paths_and_leaves(params))
            ordered = [by_path[path] for path, _ in paths_and_leaves(updates)]
            params = jax.tree.unflatten(jax.tree.structure(updates), ordered)
        return inner.update(updates, state, params, **extra_args)

    return described(transformation(None, inner.init, update_fn), groups)


class Groups(abc.ABC):
    """Which leaf belongs to which group, for `describe_partition`."""

    @property
    @abc.abstractmethod
    def names(self) -> dict[Hashable, str]:
        """The labels of the groups, in order, with their display names."""

    @abc.abstractmethod
    def of(self, tree: PyTree) -> list[Hashable]:
        """The label of each leaf."""


@dataclasses.dataclass(frozen=True)
class _ByPattern(Groups):
    """Groups by the first pattern found in a path."""

    patterns: tuple[str, ...]
    has_default: bool

    @property
    def names(self) -> dict[Hashable, str]:
        names: dict[Hashable, str] = {pattern: pattern for pattern in self.patterns}
        return names | ({_DEFAULT: f"({_DEFAULT})"} if self.has_default else {})

    def labels(self, tree: Any) -> Any:
        """The labels as a tree."""
        return jax.tree.unflatten(jax.tree.structure(tree), self.of(tree))

    def of(self, tree: Any) -> list[Hashable]:
        check_patterns(self.patterns, tree)
        labels = {path: first_match(self.patterns, path) for path, _ in paths_and_leaves(tree)}
        left = [path for path, label in labels.items() if label is None]
        if left and not self.has_default:
            raise ValueError(
                f"No pattern of {', '.join(map(repr, self.patterns))} matches {', '.join(left)}; "
                "pass a default= to partition_by_path for these leaves."
            )
        return [_DEFAULT if label is None else label for label in labels.values()]


def describe_partition(tx: optax.GradientTransformation, params: Params) -> str:
    """Returns a table that shows which transformation each parameter is assigned to.

    Print it before a long run. A pattern with 0 leaves is one whose leaves all go to earlier patterns.

    Args:
        tx: The result of `partition_by_path`, or of `freeze`, whose frozen leaves form a group.
        params: The parameters, or abstract arrays like them.

    Returns:
        For each pattern, in order, the number of its leaves and parameters, followed by the leaves; at the
        end the totals.

    Raises:
        ValueError: If `tx` is anything else, such as a chain around it, or does not fit the parameters.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> params = {"body": {"bias": jnp.ones(8), "kernel": jnp.ones((16, 8))}, "head": jnp.ones((8, 2))}
        >>> tx = ao.partition_by_path({"^head": ao.adam(1e-2)}, default=ao.adam(1e-3))
        >>> print(ao.describe_partition(tx, params))
        group          leaves  parameters  shape
        ^head               1          16
          head                         16  (8, 2)
        (default)           2         136
          body/bias                     8  (8,)
          body/kernel                 128  (16, 8)
        total               3         152
    """
    if (groups := description_of(Groups, tx)) is None:
        raise ValueError(f"tx must be a result of partition_by_path or freeze, got {tx!r}.")
    leaves = [
        (label, path, np.shape(leaf))
        for label, (path, leaf) in zip(groups.of(params), paths_and_leaves(params), strict=True)
    ]
    rows = [("group", "leaves", "parameters", "shape")]

    def add(name, members):
        size = sum(int(np.prod(shape)) for _, _, shape in members)
        rows.append((name, f"{len(members):,}", f"{size:,}", ""))

    for label, name in groups.names.items():
        members = [member for member in leaves if member[0] == label]
        add(name, members)
        rows += [(f"  {path}", "", f"{int(np.prod(shape)):,}", str(shape)) for _, path, shape in members]
    add("total", leaves)
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = (
        f"{name:{widths[0]}}  {count:>{widths[1]}}  {size:>{widths[2]}}  {shape}".rstrip()
        for name, count, size, shape in rows
    )
    return "\n".join(lines)


def mask_by_path(pattern: str) -> Callable[[Params], PyTree]:
    """Makes a mask that is True for leaves whose path matches a pattern.

    For `optax.masked`, and for the `mask=` of `adamw` and `add_decoupled_weight_decay`.

    Args:
        pattern: A regular expression, searched for anywhere in paths such as "encoder/layers/3/kernel". To
            exclude a name, write "^(?!.*bias)".

    Returns:
        `mask(params) -> tree of bools`. It raises ValueError if the pattern matches no path, including those
        of leaves hidden by `optax.masked`.

    Raises:
        ValueError: If `pattern` is not a regular expression.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> ao.mask_by_path("kernel$")({"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)})
        {'bias': False, 'kernel': True}
    """
    check_expressions("pattern", [pattern], "a regular expression")

    def mask(params):
        check_patterns([pattern], params)
        found = [re.search(pattern, path) is not None for path, _ in paths_and_leaves(params)]
        return jax.tree.unflatten(jax.tree.structure(params), found)

    return mask


# Names of biases and norm parameters in linen, nnx, Equinox, Haiku and PyTorch.
_UNDECAYED = re.compile(r"^(b|offset|scale|gamma|beta)$|^bias|bias$")
_NORM = re.compile(
    r"^norm|(layer|batch|rms|group|instance)norm|(?<!weight)(?<!spectral)_norm|^ln(_|\d|$)|_ln$"
)
_ABSENT: Any = object()


def decay_mask(params: Params = _ABSENT, *, stacked: int | Mapping[str, int] = 0) -> Mask:
    """Masks parameters that are usually not decayed: biases, norm parameters and vectors.

    A leaf decays if it has at least two axes and is neither a bias nor in a norm. Those never decay,
    whatever their number of axes: attention biases have two axes, and so do the biases of layers stacked for
    a scan. A leaf is

    - a bias or a norm parameter if its name, the last part of its path, is "b", "offset", "scale", "gamma" or
      "beta", or begins or ends with "bias";
    - in a norm if the class of its module (an Equinox or nnx module in the tree) is a LayerNorm, BatchNorm,
      RMSNorm, GroupNorm or InstanceNorm, or if its name is "weight" and its module has a name such as
      "norm1", "ln_2", "layer_norm" or "attention_norm".

    A stack of other vectors looks like a matrix; `stacked` says how many leading axes are stacking axes.

    Args:
        params: The parameters, from dictionaries, linen, nnx, Haiku or dataclasses such as Equinox's. If
            omitted, the result is a function of the parameters, which lets you use `stacked` with `mask=`.
        stacked: The number of leading axes along which layers are stacked, at least 0, or `{pattern: axes}`
            with regular expressions that are searched for in the paths. The first match wins, and leaves
            without a match have no such axes.

    Returns:
        A tree of bools, or a function that makes it.

    Raises:
        ValueError: If `stacked` is neither a number of axes nor a mapping from regular expressions to such
            numbers, or if a pattern matches no leaf.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> tx = ao.adamw(1e-3, mask=ao.decay_mask)
        >>> ao.decay_mask({"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "norm": {"scale": jnp.ones(2)}})
        {'bias': False, 'kernel': True, 'norm': {'scale': False}}

        For twelve scanned layers:

        >>> tx = ao.adamw(1e-3, mask=ao.decay_mask(stacked={"^layers/": 1}))
        >>> layers = {"kernel": jnp.ones((12, 2, 2)), "gate": jnp.ones((12, 2))}
        >>> ao.decay_mask({"layers": layers, "head": jnp.ones((2, 2))}, stacked={"^layers/": 1})
        {'head': True, 'layers': {'gate': False, 'kernel': True}}
    """
    patterns = stacked if isinstance(stacked, Mapping) else {"": stacked}
    check_expressions("The patterns of stacked", patterns)
    for axes in patterns.values():
        check_integer("stacked", axes, "[0, inf)", "or a mapping from patterns to such integers")
    if params is _ABSENT:
        return functools.partial(decay_mask, stacked=stacked)
    if isinstance(stacked, Mapping):
        check_patterns(patterns, params)

    def decays(path, leaf, in_norm):
        pattern = first_match(patterns, path)
        axes = np.ndim(leaf) - (0 if pattern is None else patterns[pattern])
        return axes > 1 and not in_norm and not _is_bias_or_scale(path)

    leaves = zip(paths_and_leaves(params), _in_norms(params), strict=True)
    found = [decays(path, leaf, in_norm) for (path, leaf), in_norm in leaves]
    return jax.tree.unflatten(jax.tree.structure(params), found)


def _is_bias_or_scale(path: str) -> bool:
    *modules, name = path.split("/")
    named = [module for module in modules if not module.isdigit()]  # norms in a list have the list's name
    in_norm = name == "weight" and bool(named) and _NORM.search(named[-1].lower()) is not None
    return in_norm or _UNDECAYED.search(name) is not None


def _in_norms(tree: Any) -> list[bool]:
    """For each leaf, whether it is in a module whose class is a norm."""

    def is_norm(node):
        # SpectralNorm and WeightNorm do not count: they wrap another layer.
        return re.search("(Layer|Batch|RMS|Group|Instance)Norm", type(node).__name__) is not None

    nodes = jax.tree.leaves(tree, is_leaf=is_norm)
    return [is_norm(node) for node in nodes for _ in (jax.tree.leaves(node) if is_norm(node) else [node])]
