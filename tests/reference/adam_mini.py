"""Adam-mini (Zhang et al. 2024; the authors' code from version 1.1 on), by blocks.

The rule is about matrices of shape (outputs, inputs), as in PyTorch: queries and keys are cut into one block
of rows a head, values, the output projection and the MLP into one block a row (an output neuron), embedding
and output layer into one block a row (a token); a bias into its coordinates; anything else is one block. A
parameter in Flax's layout is transposed to that matrix, its blocks are listed, and each has its own v:

    m_t = b1 m_{t-1} + (1 - b1) g_t
    v_t = b2 v_{t-1} + (1 - b2) mean(g_t * g_t over the block)
    theta_t = theta_{t-1} - lr wd theta_{t-1} - lr (m_t / (1 - b1^t)) / (sqrt(v_t / (1 - b2^t)) + eps)
"""

from __future__ import annotations

import numpy as np

KINDS = ("query", "key", "value", "projection", "dense", "embedding", "bias", "other")


def blocks(kind: str, shape: tuple[int, ...]) -> list[np.ndarray]:
    """The flat indices of each block of a parameter in Flax's layout."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}")
    index = np.arange(int(np.prod(shape))).reshape(shape)
    if kind == "bias":
        return [np.array([i]) for i in index.ravel()]
    if kind == "other":
        return [index.ravel()]
    if kind in ("query", "key"):  # (features, heads, head_dim)
        return [index[:, head, :].ravel() for head in range(shape[1])]
    if kind == "value":  # (features, heads, head_dim): rows are (head, head_dim)
        rows = index.reshape(shape[0], -1).T
    elif kind == "projection":  # (heads, head_dim, features): the inputs are (head, head_dim)
        rows = index.reshape(-1, shape[-1]).T
    elif kind == "dense":  # (inputs, outputs)
        rows = index.T
    else:  # embedding: (tokens, features)
        rows = index
    return list(rows)


class AdamMiniReference:
    """Steps of Adam-mini on a flat dict of float64 arrays, whose kinds are given."""

    def __init__(self, params, kinds, *, lr, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
        self.params = {path: np.array(x, np.float64) for path, x in params.items()}
        self.blocks = {path: blocks(kinds[path], x.shape) for path, x in self.params.items()}
        self.m = {path: np.zeros(x.size) for path, x in self.params.items()}
        self.v = {path: np.zeros(len(self.blocks[path])) for path in self.params}
        self.lr, self.b1, self.b2, self.eps, self.weight_decay = lr, b1, b2, eps, weight_decay
        self.t = 0

    def step(self, grads):
        """Returns the parameters after a step."""
        self.t += 1
        for path, theta in self.params.items():
            g = np.asarray(grads[path], np.float64).ravel()
            self.m[path] = self.b1 * self.m[path] + (1 - self.b1) * g
            flat = theta.ravel() * (1 - self.lr * self.weight_decay)
            for k, block in enumerate(self.blocks[path]):
                self.v[path][k] = self.b2 * self.v[path][k] + (1 - self.b2) * np.mean(g[block] ** 2)
                m_hat = self.m[path][block] / (1 - self.b1**self.t)
                v_hat = self.v[path][k] / (1 - self.b2**self.t)
                flat[block] -= self.lr * m_hat / (np.sqrt(v_hat) + self.eps)
            self.params[path] = flat.reshape(theta.shape)
        return {path: x.copy() for path, x in self.params.items()}
