"""One of several processes that train together and save together: `python checkpoint_process.py`.

Arguments: the folder, the address of the first process, its number, their number, how many devices each has.
"""

import json
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import adaptive_optax as ao
from adaptive_optax.integrations.orbax import Checkpoints

folder, coordinator = sys.argv[1:3]
process, processes, devices = map(int, sys.argv[3:])
jax.config.update("jax_num_cpu_devices", devices)
if processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, processes, process)

mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
split, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
tx = ao.adamw(1e-2, mu_storage=ao.Int8(min_size=64))
params = {
    "w": jax.ShapeDtypeStruct((8, 256), jnp.float32, sharding=split),
    "b": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=everywhere),
}
placed = jax.tree.map(lambda x: x.sharding, params)
shardings = ao.state_sharding(tx, params)
state = jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    jax.eval_shape(tx.init, params),
    shardings,
)
like = {"params": params, "opt": state, "position": np.zeros(2, np.int64)}


@jax.jit
def begin():
    values = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)
    return jax.lax.with_sharding_constraint(values, placed)


def step(params, state, i):
    gradients = jax.tree.map(lambda x: jnp.sin(x * (i + 1)), params)
    updates, state = tx.update(gradients, state, params)
    return jax.tree.map(jnp.add, params, updates), state


with Checkpoints(folder, keep=2) as checkpoints:
    restored = checkpoints.restore(like)
    if restored:
        first, run = restored
        assert run["position"].tolist() == [first, 7]
    else:
        values = begin()
        first, run = 0, {"params": values, "opt": jax.jit(tx.init, out_shardings=shardings)(values)}
    stepped = jax.jit(step, out_shardings=(placed, shardings))
    for i in range(first, first + 6):
        run["params"], run["opt"] = stepped(run["params"], run["opt"], i)
        run["position"] = np.array([i + 1, 7])
        if (i + 1) % 2 == 0:
            checkpoints.save(i + 1, run)
shards = {
    f"{jax.tree_util.keystr(path)}{shard.index}": zlib.crc32(np.asarray(shard.data).tobytes())
    for path, x in jax.tree_util.tree_leaves_with_path((run["params"], run["opt"]))
    for shard in x.addressable_shards
}
print(json.dumps({"first": first, "shards": shards, "steps": checkpoints.steps()}))
