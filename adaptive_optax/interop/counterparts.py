"""Moments as the state of another type holds them: optax's Adam's as this library's, say.

Adam's moments, those of RMSprop and the sum of momentum are the same numbers in both libraries, with and
without AMSGrad's maximum or centring. Sums of weights and the bound follow from the count and the decays.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from adaptive_optax._core.entries import attributes_of
from adaptive_optax._core.states import unwrapped
from adaptive_optax.interop.adam_states import OPTAX_ADAM, decimal
from adaptive_optax.interop.state_nodes import Node
from adaptive_optax.moments.granularity import regrouped
from adaptive_optax.transforms.adam import ScaleByAdamState
from adaptive_optax.transforms.adam_bound import scalars_after
from adaptive_optax.transforms.momentum import TraceState
from adaptive_optax.transforms.rms import ScaleByRmsState

Leaves = dict[str, Any]

# optax does not export it. Traced: to compute anything at import would keep users from choosing devices.
_COUNTED_RMS = type(jax.eval_shape(optax.scale_by_rms(bias_correction=True).init, ()))
_ADAM = (ScaleByAdamState, *OPTAX_ADAM)
_RMS = (ScaleByRmsState, optax.ScaleByRmsState, optax.ScaleByRStdDevState, _COUNTED_RMS)
_TRACE = (TraceState, optax.TraceState)


def counterpart(node: Node, like: Any, shapes: dict[str, tuple[int, ...]]) -> Node | None:
    """Returns the moments of a state as fields of another type, or None if they mean something else.

    Args:
        node: The old state.
        like: The new state.
        shapes: The shapes of the parameters, by path.
    """
    for family, converted in ((_ADAM, _adam), (_RMS, _rms), (_TRACE, _trace)):
        if isinstance(node.state, family) and issubclass(type(like), family):
            fields, scalars = converted(node, like, shapes)
            attributes = attributes_of(type(like))
            filled = like._replace(**{name: x for name, x in scalars.items() if name in attributes})
            alone = {name: {"": x} for name, x in filled._asdict().items() if name in ("count", "scalars")}
            return Node(node.path, filled, fields | alone)
    return None


def _adam(node: Node, like: Any, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, Leaves], Leaves]:
    mu, nu, nu_max = (node.fields.get(name, {}) for name in ("mu", "nu", "nu_max"))
    nu_max = nu_max or nu  # the largest so far is at least this
    if not isinstance(like, ScaleByAdamState):
        nu, nu_max = (_per_coordinate(each, mu, shapes) for each in (nu, nu_max))
        mu = {path: x for path, x in mu.items() if path in nu}  # steps without nu would be unbounded
    count = int(unwrapped(node.state.count))
    scalars: Leaves = {"count": jnp.asarray(count, jnp.int32)}
    if isinstance(like, ScaleByAdamState):
        decays = decimal(like.b1), decimal(like.b2)
        dtype = unwrapped(like.bound_sq).dtype
        scalars |= {name: jnp.asarray(x, dtype) for name, x in scalars_after(count, *decays).items()}
    return {"mu": mu, "nu": nu, "nu_max": nu_max}, scalars


def _rms(node: Node, like: Any, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, Leaves], Leaves]:
    mu, nu = (node.fields.get(name, {}) for name in ("mu", "nu"))
    if not isinstance(like, ScaleByRmsState):
        nu = _per_coordinate(nu, mu, shapes)
    was_about_mean = isinstance(node.state, ScaleByRmsState) and bool(mu)
    is_about_mean = isinstance(like, ScaleByRmsState) and like.mu is not None
    if was_about_mean != is_about_mean:
        sign = 1 if was_about_mean else -1
        nu = {path: jnp.maximum(x + sign * jnp.abs(mu[path]) ** 2, 0) for path, x in nu.items() if path in mu}
    # Without a count the run is taken to be long under way: its weights sum to 1.
    count = node.state.count if "count" in node.fields else None
    scalars = {} if count is None else {"count": jnp.asarray(unwrapped(count), jnp.int32)}
    if isinstance(like, ScaleByRmsState):
        weight = 1.0 if count is None else 1 - decimal(like.decay) ** int(unwrapped(count))
        scalars["nu_weight"] = jnp.asarray(weight, unwrapped(like.nu_weight).dtype)
    return {"mu": mu, "nu": nu}, scalars


def _trace(node: Node, like: Any, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, Leaves], Leaves]:
    del like, shapes
    return {"trace": node.fields["trace"]}, {}


def _per_coordinate(nu: Leaves, mu: Leaves, shapes: dict[str, tuple[int, ...]]) -> Leaves:
    """Second moments in the shapes of the parameters, of which groups may have shared them."""
    if nu.keys() == {""} and shapes.keys() != {""}:
        nu = dict.fromkeys(mu or shapes, nu[""])
    spread = {path: regrouped(x, shapes[path], shapes[path]) for path, x in nu.items() if path in shapes}
    return {path: x for path, x in spread.items() if x is not None}
