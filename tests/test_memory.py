"""The memory that `benchmarks.memory` predicts, beside what arrays take on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks import compilers, memory

SMALL = memory.Size(width=512, layers=1, hidden=1024, key_heads=4, vocabulary=256)


@pytest.mark.parametrize("shape", [(8, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("name", memory.OPTIMIZERS)
def test_the_prediction_is_what_a_device_holds(name, shape):
    make, dtype = memory.OPTIMIZERS[name]
    tx = make()
    mesh = Mesh(np.array(jax.devices()).reshape(shape), compilers.AXES, axis_types=(AxisType.Auto,) * 2)
    params = {
        path: jax.ShapeDtypeStruct(size, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))
        for path, (size, axes) in memory.transformer(SMALL).items()
    }
    predicted = memory.held(tx, params)
    held = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), params)
    state = jax.jit(tx.init, out_shardings=memory.ao.state_sharding(tx, params))(held)
    for device in jax.devices():
        found = {
            key: sum(
                shard.data.nbytes
                for x in jax.tree.leaves(tree)
                for shard in x.addressable_shards
                if shard.device == device
            )
            for key, tree in (("parameters", held), ("state", state))
        }
        assert found == predicted


def test_sizes_are_those_of_their_names():
    for name, size in memory.SIZES.items():
        count = sum(int(np.prod(shape)) for shape, _ in memory.transformer(size).values())
        assert count == pytest.approx(float(name.split()[0]) * 1e9, rel=0.2)


def test_memory_falls_with_the_number_of_devices():
    rows = list(memory.counted(True, lambda _: None))
    held = {(row["optimizer"], row["devices"]): sum(row["bytes"].values()) for row in rows}
    optimizers = {optimizer for optimizer, _ in held}
    for optimizer in optimizers:
        assert 400 < held[optimizer, 8] / held[optimizer, 4096] <= 512  # norms are on every device
