"""Groups of parameters by the paths of their leaves: another optimizer, another rate, no decay."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from adaptive_optax._checks import check_same_tree, check_transformation
from adaptive_optax._paths import check_expressions, check_patterns, first_match, paths_and_leaves

_DEFAULT = "default"


def partition_by_path(
    transformations: Mapping[str, optax.GradientTransformation],
    default: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gives each parameter to the first transformation whose pattern is found in its path.

    Use it for a smaller rate in the body than in the head, for a rate that falls from layer to layer, or for
    another optimizer of embeddings. Paths are what one reads, "encoder/layers/3/attention/kernel", and the
    same for dictionaries, linen, nnx and dataclasses; `describe_partition` shows who gets what.

    A pattern is a regular expression that is searched for anywhere in the path, so "layer_1" is found in
    "layer_10" too: end a name with its slash, "layer_1/", and begin it with "^" or "/" where another name may
    end alike.

    Args:
        transformations: `{pattern: transformation}`; the first pattern that is found wins. A pattern that is
            found nowhere is an error, one whose leaves all go to earlier patterns is not. Leaves that
            `optax.masked` hides count.
        default: The transformation of leaves in whose paths no pattern is found; None makes these an error.

    Returns:
        The transformation: `optax.partition`, with the patterns (and "default") as labels in its state. So
        `get_hyperparams` has "pattern/learning_rate", and a checkpoint is restored with the same patterns.
        Extra arguments go to all transformations.

    Raises:
        ValueError: If `transformations` is empty or no mapping from regular expressions to transformations
            (at construction); if a pattern matches no leaf, or a leaf no pattern, listing the paths (at
            init); if `params` has other leaves than the updates (at update).

    State cost: those of the transformations, each for its own leaves.

    Example:
        A tenth of the learning rate in the body:

        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> params = {f"layer_{i}": {"kernel": jnp.ones((2, 2))} for i in range(12)} | {"head": jnp.ones(2)}
        >>> schedule = ao.warmup_cosine(1e-3, 1000, warmup_steps=100)
        >>> tx = ao.partition_by_path(
        ...     {"^layer_": ao.adamw(lambda count: 0.1 * schedule(count))}, default=ao.adamw(schedule)
        ... )

        Layer-wise decay of the learning rate, by 0.8 a layer from the head down:

        >>> layers = {rf"^layer_{i}/": ao.adamw(1e-3 * 0.8 ** (12 - i)) for i in range(12)}
        >>> tx = ao.partition_by_path(layers, default=ao.adamw(1e-3))
        >>> rates = ao.get_hyperparams(tx.init(params))
        >>> [round(float(rates[f"^layer_{i}//learning_rate"]), 6) for i in (1, 10, 11)]
        [8.6e-05, 0.00064, 0.0008]
    """
    if not isinstance(transformations, Mapping) or not transformations:
        raise ValueError(
            "transformations must be a mapping {pattern: transformation} with an entry at least, "
            f"got {transformations!r}."
        )
    check_expressions("The patterns of transformations", transformations)
    for pattern, tx in transformations.items():
        check_transformation(f"The transformation of {pattern!r}", tx)
    labelled: dict[Hashable, optax.GradientTransformation] = {**transformations}
    if default is not None:
        check_transformation("default", default)
        if _DEFAULT in labelled:
            raise ValueError(f"The pattern {_DEFAULT!r} is taken by default=; write it as '({_DEFAULT})'.")
        labelled[_DEFAULT] = default
    groups = _Groups(tuple(transformations), has_default=default is not None)
    inner = optax.partition(labelled, groups.labels)

    def update_fn(updates, state, params=None, **extra_args):
        if params is not None:
            check_same_tree("partition_by_path", "params", params, "updates", updates, ordered=False)
            # optax masks the two together, which takes the same containers.
            by_path = dict(paths_and_leaves(params))
            ordered = [by_path[path] for path, _ in paths_and_leaves(updates)]
            params = jax.tree.unflatten(jax.tree.structure(updates), ordered)
        return inner.update(updates, state, params, **extra_args)

    # On the function, which survives copies and `_replace`; a subclass would not.
    vars(update_fn)["groups"] = groups
    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


@dataclasses.dataclass(frozen=True)
class _Groups:
    """Which leaf belongs to which pattern."""

    patterns: tuple[str, ...]
    has_default: bool

    def of(self, tree: Any) -> list[str]:
        """The label of each leaf."""
        check_patterns(self.patterns, tree)
        labels = {path: first_match(self.patterns, path) for path, _ in paths_and_leaves(tree)}
        left = [path for path, label in labels.items() if label is None]
        if left and not self.has_default:
            raise ValueError(
                f"No pattern of {', '.join(map(repr, self.patterns))} matches {', '.join(left)}; "
                "give partition_by_path a default= for what is left."
            )
        return [_DEFAULT if label is None else label for label in labels.values()]

    def labels(self, tree: Any) -> Any:
        """The labels as a tree."""
        return jax.tree.unflatten(jax.tree.structure(tree), self.of(tree))


def describe_partition(tx: optax.GradientTransformation, params: Any) -> str:
    """Returns a table of which parameters go to which transformation.

    Print it before a long run. A pattern with 0 leaves is one whose leaves earlier patterns take.

    Args:
        tx: What `partition_by_path` returned.
        params: The parameters, or abstract arrays like them.

    Returns:
        For each pattern, in order, its number of leaves and parameters and below it its leaves; then the sum.

    Raises:
        ValueError: If `tx` is something else, such as a chain around it, or does not fit the parameters.

    Example:
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
    groups = getattr(tx.update, "groups", None) if isinstance(tx, optax.GradientTransformation) else None
    if not isinstance(groups, _Groups):
        raise ValueError(f"tx must be what partition_by_path returned, got {tx!r}.")
    leaves = [
        (label, path, np.shape(leaf))
        for label, (path, leaf) in zip(groups.of(params), paths_and_leaves(params), strict=True)
    ]
    rows = [("group", "leaves", "parameters", "shape")]

    def add(name, members):
        size = sum(int(np.prod(shape)) for _, _, shape in members)
        rows.append((name, f"{len(members):,}", f"{size:,}", ""))

    for label in [*groups.patterns, *([_DEFAULT] if groups.has_default else [])]:
        members = [member for member in leaves if member[0] == label]
        add(label if label in groups.patterns else f"({label})", members)
        rows += [(f"  {path}", "", f"{int(np.prod(shape)):,}", str(shape)) for _, path, shape in members]
    add("total", leaves)
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = (
        f"{name:{widths[0]}}  {count:>{widths[1]}}  {size:>{widths[2]}}  {shape}".rstrip()
        for name, count, size, shape in rows
    )
    return "\n".join(lines)


def mask_by_path(pattern: str) -> Callable[[Any], Any]:
    """Makes a mask that is True for the leaves in whose path a pattern is found.

    For `optax.masked`, and for the `mask=` of `adamw` and `add_decoupled_weight_decay`.

    Args:
        pattern: A regular expression, searched for anywhere in paths such as "encoder/layers/3/kernel". What
            is not to be found is written "^(?!.*bias)".

    Returns:
        `mask(params) -> tree of bools`. It raises ValueError if the pattern is found in no path, those of
        leaves that `optax.masked` hides included.

    Raises:
        ValueError: If `pattern` is no regular expression.

    Example:
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


def decay_mask(params: Any) -> Any:
    """Masks what is usually not decayed: biases and the scales of norms.

    A leaf decays if it has two axes or more and its name, the last part of its path, is neither "bias" nor
    "scale" (biases of attention have two axes, those of stacked layers too).

    Args:
        params: The parameters, of dictionaries, linen, nnx or dataclasses such as equinox's.

    Returns:
        A tree of bools.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> tx = ao.adamw(1e-3, mask=ao.decay_mask)
        >>> ao.decay_mask({"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "norm": {"scale": jnp.ones(2)}})
        {'bias': False, 'kernel': True, 'norm': {'scale': False}}
    """
    decays = [
        np.ndim(leaf) > 1 and path.rpartition("/")[2] not in ("bias", "scale")
        for path, leaf in paths_and_leaves(params)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), decays)
