"""Update functions with a description, for wrappers and for functions that describe a transformation.

The bound of a direction and the groups of a partition are known where a transformation is built, and needed
where it is wrapped. The update function carries them: a subclass of `optax.GradientTransformation` would lose
them in `_replace`, in `optax.with_extra_args_support` and when flattened as a tree.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import optax

Description = TypeVar("Description")


@dataclasses.dataclass(frozen=True, eq=False)
class DescribedUpdate:
    """An update function with a description."""

    update: optax.TransformUpdateExtraArgsFn
    description: Any

    def __call__(self, updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        """Calls the update function."""
        return self.update(updates, state, params, **extra_args)


def described(
    tx: optax.GradientTransformationExtraArgs, description: Any
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation with a description, which `description_of` finds by its type."""
    return tx._replace(update=DescribedUpdate(tx.update, description))


def description_of(kind: type[Description], tx: Any) -> Description | None:
    """Returns a transformation's description if it is of type `kind`, else None."""
    update = getattr(tx, "update", None)
    found = update.description if isinstance(update, DescribedUpdate) else None
    return found if isinstance(found, kind) else None
