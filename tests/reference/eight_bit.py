"""Published 8-bit formats of Adam's moments, written out from their descriptions in float64.

bitsandbytes: the dynamic map in blocks of 256, to nearest (Dettmers et al. 2022, section 2). FlashOptim:
groups of 32; first moments by 2 y / (1 + |y|), second moments by their roots, both to the nearest of evenly
spaced codes.
"""

from __future__ import annotations

import numpy as np


def dynamic_map(*, signed: bool) -> np.ndarray:
    """0, 1, and the middles of cells that are uniform within each of seven decades."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        middles = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*middles, *(-middles if signed else [])]
    return np.sort(values)


def _in_blocks(x: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    blocks = x.reshape(-1, size)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    scale = np.where(largest == 0, 1, largest)
    return blocks / scale, scale


def to_nearest_of(levels: np.ndarray, x: np.ndarray, size: int = 256) -> np.ndarray:
    ratio, scale = _in_blocks(x, size)
    return (levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, ratio)] * scale).reshape(x.shape)


def companded(x: np.ndarray, size: int = 32) -> np.ndarray:
    ratio, scale = _in_blocks(x, size)
    z = np.round(127 * 2 * ratio / (1 + np.abs(ratio))) / 127
    return (z / (2 - np.abs(z)) * scale).reshape(x.shape)


def linear_root(x: np.ndarray, size: int = 32) -> np.ndarray:
    ratio, scale = _in_blocks(np.sqrt(x), size)
    return np.square(np.round(255 * ratio) / 255 * scale).reshape(x.shape)


_SIGNED, _UNSIGNED = dynamic_map(signed=True), dynamic_map(signed=False)

EIGHT_BIT = {
    "bitsandbytes": lambda m, v: (to_nearest_of(_SIGNED, m), to_nearest_of(_UNSIGNED, v)),
    "FlashOptim": lambda m, v: (companded(m), linear_root(v)),
}
