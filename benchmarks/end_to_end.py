"""A training step of a small transformer, with optax's optimizer, with this library's, and with none.

Measures the optimizer's share of a step, so that ratios of update steps are not mistaken for ratios of
training time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen

import adaptive_optax as ao
from benchmarks.tables import Table, digits, ratio
from benchmarks.timing import against, alternate

MEASURES = ("optimizers", "transforms.clipping")


class Transformer(linen.Module):
    """A decoder of pre-norm blocks, from tokens [sample, position] to logits."""

    vocabulary: int = 4096
    width: int = 256
    layers: int = 6
    heads: int = 8
    dtype: Any = jnp.float32  # of activations; parameters are float32

    @linen.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns logits [sample, position, token]."""
        embed = linen.Embed(self.vocabulary, self.width, dtype=self.dtype)
        x = embed(tokens) + self.param(
            "positions", linen.initializers.normal(0.02), (tokens.shape[1], self.width)
        )
        mask = linen.make_causal_mask(tokens)
        for _ in range(self.layers):
            normed = linen.LayerNorm(dtype=self.dtype)(x)
            x += linen.MultiHeadAttention(self.heads, dtype=self.dtype)(normed, mask=mask)
            normed = linen.LayerNorm(dtype=self.dtype)(x)
            hidden = linen.gelu(linen.Dense(4 * self.width, dtype=self.dtype)(normed))
            x += linen.Dense(self.width, dtype=self.dtype)(hidden)
        logits = embed.attend(linen.LayerNorm(dtype=self.dtype)(x))
        return logits.astype(jnp.float32)


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "optax": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
    "ours": lambda: optax.chain(ao.clip_by_global_norm(1.0), ao.adamw(1e-3)),
    "no optimizer": lambda: None,
}


def training_step(model: Transformer, tx: Any) -> Callable[..., Any]:
    """A step of parameters, state and tokens; without an optimizer it returns the gradients."""

    def step(params, state, tokens):
        def loss(params):
            logits: Any = model.apply({"params": params}, tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        if tx is None:
            return params, state, (value, gradients)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


class Training:
    """A compiled step; without an optimizer it returns the gradients."""

    def __init__(self, model: Transformer, tx: Any, tokens: jax.Array):
        """Compiles the step."""
        params = model.init(jax.random.key(0), tokens[:, :-1])["params"]
        self.parameters = sum(x.size for x in jax.tree.leaves(params))
        self.leaves = len(jax.tree.leaves(params))
        self._carry: Any = (params, None if tx is None else tx.init(params))
        self._tokens = tokens
        step = training_step(model, tx)
        self._step = jax.jit(step, donate_argnums=(0, 1)).lower(*self._carry, tokens).compile()

    def __call__(self) -> Any:
        """Runs a step."""
        *self._carry, out = self._step(*self._carry, self._tokens)
        return self._carry, out


def measure(quick: bool, advance: Callable[[str], None]) -> dict[str, Any]:
    """Measures all three."""
    model, samples, length = Transformer(), 8, 128
    if jax.default_backend() != "cpu":  # as large as GPT-2 small
        large = Transformer(vocabulary=50304, width=768, layers=12, heads=12, dtype=jnp.bfloat16)
        model, samples, length = large, 8, 1024
    if quick:
        model, samples, length = Transformer(vocabulary=64, width=16, layers=1, heads=2), 2, 8
    tokens = np.random.default_rng(0).integers(0, model.vocabulary, (samples, length + 1))
    trainings = {}
    for name, make in OPTIMIZERS.items():
        advance(f"compiling: {name}")
        trainings[name] = Training(model, make(), jnp.asarray(tokens, jnp.int32))
    advance("training")
    times = alternate(trainings, 15 if quick else 60, seconds=25)
    without = times["no optimizer"]
    return {
        "model": f"{model.layers} layers, width {model.width}, {samples} x {length} tokens"
        + (", in bfloat16" if model.dtype == jnp.bfloat16 else ""),
        "parameters": trainings["ours"].parameters,
        "leaves": trainings["ours"].leaves,
        "timed": against(times, "optax"),
        "seeds": {"parameters": 0, "tokens": 0},
        "share": {name: float(np.median((t - without) / t)) for name, t in times.items()},
    }


def tables(result: dict[str, Any]) -> dict[str, Table]:
    """Returns the table."""
    title = f"A transformer of {result['parameters']:,} parameters: {result['model']}; clip + adamw"
    table = Table(title, ["step with", "ms", "over optax's", "the optimizer's share"])
    for name, timed in result["timed"].items():
        share = "" if name == "no optimizer" else f"{100 * result['share'][name]:.1f} %"
        table.add({"ours": "adaptive_optax"}.get(name, name), digits(timed["ms"]), ratio(timed), share)
    return {"main": table}
