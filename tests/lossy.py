"""A storage far coarser than any that is meant for use: 15 levels a leaf, in parallel trees.

Whatever works with it works with any format. It rounds small second moments to zero under first moments that
are not, so that a transformation that forgets the floor breaks its bound at once.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

import adaptive_optax as ao

LEVELS = 15


class LossyMoment(NamedTuple):
    codes: Any
    scale: Any
    format: jax.Array

    def decoded(self):
        return jax.tree.map(_decoded, self.codes, self.scale)

    def encode_like(self, values, *, count, role):
        return Lossy().encode(self, values, count=count, role=role)


def _decoded(codes, scale):
    if scale.ndim:
        return codes
    # One value that has overflowed takes its leaf with it, as it takes a block of Int8: 0 * inf would be NaN.
    return jnp.where(jnp.isinf(scale), scale, codes.astype(jnp.float32) * (scale / LEVELS))


@dataclasses.dataclass(frozen=True)
class Lossy(ao.Storage):
    floors_called: ClassVar[list[str]] = []

    def init(self, params_like, role):
        def codes(x):
            if jnp.iscomplexobj(x) and role == "mu":
                return jnp.zeros_like(x)
            return jnp.zeros_like(x, dtype=jnp.int8)

        def scale(x):
            return jnp.zeros((0,) if jnp.iscomplexobj(x) and role == "mu" else (), jnp.float32)

        return LossyMoment(
            jax.tree.map(codes, params_like), jax.tree.map(scale, params_like), jnp.full((), 7, jnp.int32)
        )

    def decode(self, moment, *, lower=None):
        values = moment.decoded()
        if lower is None:
            return values
        self.floors_called.append("decode")
        return jax.tree.map(jnp.maximum, values, lower())

    def encode(self, moment, values, *, count, role):
        assert count.dtype == jnp.int32 and role in ("mu", "nu")

        def scale(old, x):
            return jnp.max(jnp.abs(x), initial=0.0).astype(jnp.float32) if old.ndim == 0 else old

        def codes(old, scale, x):
            if scale.ndim:
                return x.astype(old.dtype)
            ratio = x.astype(jnp.float32) / jnp.where(scale > 0, scale, 1)
            return jnp.round(ratio * LEVELS).astype(jnp.int8)

        scales = jax.tree.map(scale, moment.scale, values)
        return LossyMoment(jax.tree.map(codes, moment.codes, scales, values), scales, moment.format)
