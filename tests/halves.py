"""A granularity of a user's own: one second moment for the first half of each leaf and one for the second.

It is unlike those of the library: a statistic with fewer dimensions than its leaf, which broadcasting alone
would not lay over the leaf again.
"""

import dataclasses

import jax
import jax.numpy as jnp

import adaptive_optax as ao


@dataclasses.dataclass(frozen=True)
class Halves(ao.Granularity):
    def pool(self, squares):
        def leaf(x):
            first = _in_first_half(x)
            sums = [jnp.sum(jnp.where(first, x, 0)), jnp.sum(jnp.where(first, 0, x))]
            rows, others = len(x) if x.ndim else 1, x.size // max(len(x) if x.ndim else 1, 1)
            counts = [(rows + 1) // 2 * others, rows // 2 * others]
            return jnp.stack([total / max(n, 1) for total, n in zip(sums, counts, strict=True)])

        return jax.tree.map(leaf, squares)

    def spread(self, pooled, like):
        def leaf(x, halves):
            halves = halves.astype(jnp.finfo(x.dtype).dtype)
            return jnp.where(_in_first_half(x), halves[0], halves[1])

        return jax.tree.map(leaf, like, pooled)


def _in_first_half(x):
    """Whether a coordinate is in the first half of the first axis; the middle one of an odd number is."""
    if x.ndim == 0:
        return jnp.ones((), bool)
    rows = jnp.arange(x.shape[0]) < (x.shape[0] + 1) // 2
    return rows.reshape(-1, *[1] * (x.ndim - 1))
