"""The communication of a compiled update step whose parameters and state are split over eight devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import adaptive_optax as ao
from benchmarks import programs
from benchmarks.structure import step_of

# Matrices split along either axis, and a vector; every shard holds whole blocks of values.
LEAVES = {"w": ((64, 512), ("fsdp", None)), "v": ((16, 2048), (None, "fsdp")), "b": ((2048,), ("fsdp",))}
INT8 = {"mu_storage": "int8", "nu_storage": "int8"}
BFLOAT16 = {"mu_storage": "bfloat16", "nu_storage": "bfloat16"}
COORDINATE_WISE = {
    "adam": lambda: ao.adam(1e-3),
    "adamw": lambda: ao.adamw(1e-3),
    "rmsprop": lambda: ao.rmsprop(1e-3, momentum=0.9),
    "sgd": lambda: ao.sgd(1e-3, momentum=0.9, nesterov=True),
    "bfloat16 moments": lambda: ao.adamw(1e-3, **BFLOAT16),
    "int8 moments": lambda: ao.adamw(1e-3, **INT8),
    "averaging": lambda: optax.chain(ao.adamw(1e-3), ao.average_parameters()),
    "stochastic rounding": lambda: optax.chain(ao.adamw(1e-3, **INT8), ao.stochastic_rounding()),
    "master weights": lambda: ao.master_weights(ao.adamw(1e-3)),
    "Kahan summation": lambda: ao.kahan_summation(ao.adamw(1e-3)),
    "freezing": lambda: ao.freeze(ao.adamw(1e-3), lambda path: path == "w"),
}
LOW_PRECISION = ("stochastic rounding", "master weights", "Kahan summation")
ONE_SCALAR = {
    "clip": lambda: optax.chain(ao.clip_by_global_norm(1.0), ao.adamw(1e-3)),
    "clip, int8 moments": lambda: optax.chain(ao.clip_by_global_norm(1.0), ao.adamw(1e-3, **INT8)),
    "global rmsprop": lambda: ao.global_rmsprop(1e-3),
    "global adam": lambda: ao.adam(1e-3, granularity="global"),
}
ONE_PER_TENSOR = {
    "adamw": lambda: ao.adamw(1e-3, granularity="tensor"),
    "rmsprop": lambda: ao.rmsprop(1e-3, granularity="tensor"),
}


def compiled(tx, kind, dtype=jnp.float32):
    """The compiled text of an update step."""
    mesh = Mesh(np.array(jax.devices()), ("fsdp",), axis_types=(kind,))
    params = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
        for name, (shape, spec) in LEAVES.items()
    }
    shardings = ao.state_sharding(tx, params)
    shapes = jax.eval_shape(tx.init, params)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    out = (jax.tree.map(lambda x: x.sharding, params), shardings)
    step = jax.jit(step_of(tx), donate_argnums=(0, 1), out_shardings=out)
    return step.lower(params, state, params).compile().as_text()


def summed(text):
    """The types of what every all-reduce sums."""
    return [re.findall(r"\w+\[\d*\]", found) for found in re.findall(r" = (.*?) all-reduce\(", text)]


KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)


@KINDS
@pytest.mark.parametrize("name", COORDINATE_WISE)
def test_a_coordinate_wise_update_communicates_nothing(name, kind):
    dtype = (
        jnp.bfloat16 if name in ("stochastic rounding", "master weights", "Kahan summation") else jnp.float32
    )
    assert programs.collectives(compiled(COORDINATE_WISE[name](), kind, dtype)) == {}


@KINDS
@pytest.mark.parametrize("name", ONE_SCALAR)
def test_a_global_norm_is_one_all_reduce_of_one_scalar(name, kind):
    text = compiled(ONE_SCALAR[name](), kind)
    assert programs.collectives(text) == {"all-reduce": 1}
    assert summed(text) == [
        ["f32[]"] * len(LEAVES)
    ]  # the CPU's compiler joins those of leaves, and adds later


@KINDS
@pytest.mark.parametrize("name", ONE_PER_TENSOR)
def test_norms_of_tensors_are_one_all_reduce_for_the_whole_tree(name, kind):
    text = compiled(ONE_PER_TENSOR[name](), kind)
    assert programs.collectives(text) == {"all-reduce": 1}
    assert summed(text) == [["f32[]"] * len(LEAVES)]


@KINDS
def test_rejection_is_decided_together(kind):
    # Every device must know whether any other found a value that is not finite.
    text = compiled(ao.reject_nonfinite(ao.adamw(1e-3)), kind)
    assert 1 <= programs.collectives(text).pop("all-reduce") <= 2
    assert all(set(types) == {"f32[]"} for types in summed(text))  # the largest magnitudes


@KINDS
def test_the_noise_scale_needs_two_norms(kind):
    text = compiled(ao.accumulate_gradients(ao.adamw(1e-3), 4), kind)  # of a micro-batch, and of their mean
    assert programs.collectives(text) == {"all-reduce": 2}
    assert all(set(types) == {"f32[]"} for types in summed(text))
