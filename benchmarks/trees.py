"""The parameter trees on which steps are measured."""

from __future__ import annotations

import math

import jax
import numpy as np

Shapes = dict[str, tuple[int, ...]]


def one_leaf(parameters: int) -> Shapes:
    """One matrix."""
    rows = 2 ** (int(math.log2(parameters)) // 2)
    return {"leaf": (rows, parameters // rows)}


def gpt2_small() -> Shapes:
    """The 148 leaves of GPT-2 small, 124 M parameters (Radford et al. 2019), in Flax's layout."""
    width, layers = 768, 12
    shapes: Shapes = {"wte": (50257, width), "wpe": (1024, width)}
    for i in range(layers):
        block: Shapes = {
            "ln_1/scale": (width,),
            "ln_1/bias": (width,),
            "attn/c_attn/kernel": (width, 3 * width),
            "attn/c_attn/bias": (3 * width,),
            "attn/c_proj/kernel": (width, width),
            "attn/c_proj/bias": (width,),
            "ln_2/scale": (width,),
            "ln_2/bias": (width,),
            "mlp/c_fc/kernel": (width, 4 * width),
            "mlp/c_fc/bias": (4 * width,),
            "mlp/c_proj/kernel": (4 * width, width),
            "mlp/c_proj/bias": (width,),
        }
        shapes |= {f"h/{i}/{name}": shape for name, shape in block.items()}
    return shapes | {"ln_f/scale": (width,), "ln_f/bias": (width,)}


def small_leaves(count: int) -> Shapes:
    """Alternating biases of 64 and matrices of 64 x 64."""
    return {str(i): (64, 64) if i % 2 else (64,) for i in range(count)}


def like_square(leaves: int, side: int) -> Shapes:
    """That many square matrices."""
    return {str(i): (side, side) for i in range(leaves)}


def size(shapes: Shapes) -> int:
    """The number of parameters of a tree."""
    return sum(map(math.prod, shapes.values()))


def normal(shapes: Shapes, seed: int) -> dict[str, np.ndarray]:
    """Draws a tree of standard normal float32 values."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def constant(shapes: Shapes, value: float) -> dict[str, np.ndarray]:
    """Returns a tree of one float32 value."""
    return {name: np.full(shape, value, np.float32) for name, shape in shapes.items()}


def on_device(tree: dict[str, np.ndarray], dtype: str) -> dict[str, jax.Array]:
    """Puts a tree on the device, in a dtype."""
    return jax.block_until_ready(jax.tree.map(lambda x: jax.device_put(x.astype(dtype)), tree))
