"""Saving and restoring a state in the ways that people do, and the bits that must come back."""

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization


def same(left, right):
    """Asserts equal structures, dtypes and bits."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, x), y in zip(jax.tree.leaves_with_path(left), jax.tree.leaves(right), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), jax.tree_util.keystr(path)


def spec(tree):
    """The structure, and shape, dtype and weak type of every leaf."""
    leaves = jax.tree.leaves(tree)
    return jax.tree.structure(tree), [(x.shape, x.dtype, getattr(x, "weak_type", False)) for x in leaves]


def through_bytes(state, template, tmp_path):
    return serialization.from_bytes(template, serialization.to_bytes(state))


def through_orbax(state, template, tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(tmp_path / "run", template)
