"""Evaluations that `adgd` needs on smooth, deterministic functions, next to optax's line searches.

Counts gradients, and values that come without one, until the norm of the gradient is 1e-6 of its first, in
float64. The line searches have optax's defaults: a backtracking step is at most 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_breast_cancer

import adaptive_optax as ao
from adaptive_optax._core.drawing import plain
from benchmarks.tables import Table

REDUCTION, MOST = 1e-6, 20_000
DIMENSION, CONDITIONS = 20, (10, 100, 1000, 10_000)
RIDGE = 1e-3
FIRST_STEPS = (1e-8, 1e-4, 1e-2)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A function and where to start."""

    loss: Callable[[jax.Array], jax.Array]
    start: jax.Array


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer, and what its line search evaluates: "value", "gradient", or "" without one."""

    make: Callable[[], Any]
    searches_with: str = ""


def quadratic(condition: float) -> Problem:
    """Curvatures from 1 to `condition`, evenly spaced on a logarithmic scale."""
    curvature = jnp.asarray(np.geomspace(1, condition, DIMENSION))
    start = np.random.default_rng(0).normal(size=DIMENSION)
    return Problem(lambda x: 0.5 * jnp.sum(curvature * x**2), jnp.asarray(start))


def rosenbrock() -> Problem:
    """Rosenbrock's function in two dimensions from (-1.2, 1)."""
    return Problem(lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2, jnp.array([-1.2, 1.0]))


def logistic() -> Problem:
    """Logistic regression with a ridge on scikit-learn's breast-cancer data, standardized, from 0."""
    data, labels = load_breast_cancer(return_X_y=True)
    x = np.asarray(data)
    x = np.column_stack([(x - x.mean(0)) / x.std(0), np.ones(len(x))])
    features, signs = jnp.asarray(x), jnp.asarray(2.0 * np.asarray(labels) - 1)

    def loss(w):
        return jnp.mean(jax.nn.softplus(-signs * (features @ w))) + RIDGE / 2 * jnp.sum(w**2)

    return Problem(loss, jnp.zeros(x.shape[1]))


PROBLEMS: dict[str, Callable[[], Problem]] = {
    **{f"quadratic, condition {c:,}": lambda c=c: quadratic(c) for c in CONDITIONS},
    "Rosenbrock": rosenbrock,
    "logistic regression": logistic,
}
METHODS: dict[str, Method] = {
    **{
        f'adgd "{rule}", first step {plain(first)}': Method(
            lambda rule=rule, first=first: ao.adgd(initial_learning_rate=first, rule=rule)
        )
        for rule in ("2020", "2023")
        for first in FIRST_STEPS
    },
    "optax.lbfgs": Method(optax.lbfgs, "gradient"),
    "gradient descent with backtracking": Method(
        lambda: optax.chain(
            optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=30)
        ),
        "value",
    ),
}


def evaluations(problem: Problem, method: Method, most: int = MOST) -> dict[str, Any]:
    """Counts evaluations until convergence, or until there are `most` gradients."""
    tx = optax.with_extra_args_support(method.make())
    value_and_grad = jax.value_and_grad(problem.loss)

    def goes_on(carry):
        _, _, _, gradient, target, gradients, _ = carry
        return (jnp.linalg.norm(gradient) > target) & (gradients < most)

    def step(carry):
        x, state, value, gradient, target, gradients, values = carry
        updates, state = tx.update(gradient, state, x, value=value, grad=gradient, value_fn=problem.loss)
        x = optax.apply_updates(x, updates)
        searched = jnp.asarray(optax.tree.get(state, "num_linesearch_steps", 0), jnp.int32)
        # A search with gradients ends with that of the next point, so that it need not be computed again.
        gradients += searched if method.searches_with == "gradient" else 1
        values += searched if method.searches_with == "value" else 0
        return x, state, *value_and_grad(x), target, gradients, values

    @jax.jit
    def run(x):
        value, gradient = value_and_grad(x)
        target = REDUCTION * jnp.linalg.norm(gradient)
        one, none = jnp.ones((), jnp.int32), jnp.zeros((), jnp.int32)
        carry = x, tx.init(x), value, gradient, target, one, none
        return jax.lax.while_loop(goes_on, step, carry)

    _, _, _, gradient, target, gradients, values = run(problem.start)
    return {
        "gradients": int(gradients),
        "values": int(values),
        "is_finite": bool(jnp.isfinite(gradient).all()),
        "has_converged": bool(jnp.linalg.norm(gradient) <= target),
    }


def measure(quick: bool, advance: Callable[[str], None]) -> list[dict[str, Any]]:
    """Runs every method on every function; a quick run three methods on one."""
    rows = []
    with jax.enable_x64(True):
        for name, make in PROBLEMS.items():
            advance(f"deterministic: {name}")
            problem, methods = make(), list(METHODS.items())
            for label, method in (methods[1], *methods[-2:]) if quick else methods:
                rows.append({"function": name, "method": label} | evaluations(problem, method))
            if quick:
                break
    return rows


def tables(rows: list[dict[str, Any]]) -> dict[str, Table]:
    """Returns the table, with one row per method and one column per function."""
    names = list(dict.fromkeys(row["function"] for row in rows))
    found = {(row["method"], row["function"]): row for row in rows}
    title = "Gradients (+ values without a gradient) until the gradient is a millionth of its first"
    table = Table(title, ["method", *names])
    for method in dict.fromkeys(row["method"] for row in rows):
        table.add(method, *(_count(found[method, name]) for name in names))
    return {"deterministic": table}


def _count(row: dict[str, Any]) -> str:
    if not row["is_finite"]:
        return "diverged"
    if not row["has_converged"]:
        return f"> {MOST:,}"
    return f"{row['gradients']:,}" + (f" + {row['values']:,}" if row["values"] else "")
