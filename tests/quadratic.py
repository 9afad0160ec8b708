"""A noisy quadratic, whose best schedule and final loss are known in closed form.

Loss h/2 |x|^2 with gradient h x + sqrt(c) n, n standard normal: with the rate a_t, the expected square of a
coordinate follows E_{t+1} = (1 - a_t h)^2 E_t + a_t^2 c. Minimizing over a_t gives the rate
a_t = h E_t / (h^2 E_t + c),
and by induction that greedy choice is the best schedule, as E_{t+1} grows with E_t.
"""

import jax
import jax.numpy as jnp
import numpy as np

import adaptive_optax as ao
from adaptive_optax import study

SPREAD = 0.1  # of the initial coordinates, which are 1 otherwise


def quadratic_task(curvature=1.0, noise=0.0, dimensions=16, name="quadratic"):
    """The task; the data are not looked at, the noise comes from the key of the loss."""

    def init(key):
        return 1.0 + SPREAD * jax.random.normal(key, (dimensions,))

    def loss(x, batch, key):
        del batch
        n = jax.random.normal(key, x.shape)
        return curvature / 2 * jnp.mean(x**2) * dimensions + jnp.sqrt(noise) * jnp.sum(n * x)

    def metric(x, batch):
        del batch
        return curvature / 2 * jnp.mean(x**2)

    data = np.zeros((8, 1), np.float32)
    return study.Task(init, loss, data, data, batch_size=2, metric=metric, name=name)


def best_schedule(curvature, noise, steps):
    """The rates a_t, and E_T at the end."""
    expected, rates = 1.0 + SPREAD**2, []
    for _ in range(steps):
        rates.append(curvature * expected / (curvature**2 * expected + noise))
        expected = (1 - rates[-1] * curvature) ** 2 * expected + rates[-1] ** 2 * noise
    return np.array(rates), expected


def expected_at_constant_rate(curvature, noise, steps, rate):
    """E_T with one rate throughout."""
    expected = 1.0 + SPREAD**2
    for _ in range(steps):
        expected = (1 - rate * curvature) ** 2 * expected + rate**2 * noise
    return expected


def constant(rate, steps):
    """SGD with one rate."""
    return ao.sgd(rate)


def decayed(curvature, noise):
    """SGD with the best schedule, times the rate: 1 is the best."""

    def arm(rate, steps):
        rates = jnp.asarray(best_schedule(curvature, noise, steps)[0])
        return ao.sgd(lambda count: rate * rates[count])

    return arm
