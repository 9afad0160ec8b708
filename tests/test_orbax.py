"""Checkpoints: round trips, and what a kill, a full disk, damage or another optimizer does to them."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from saving import same

import adaptive_optax as ao
from adaptive_optax._core.entries import attributes_of
from adaptive_optax.integrations import orbax
from adaptive_optax.integrations.orbax import Checkpoints

PARAMS = {"dense": {"kernel": jnp.arange(512.0).reshape(2, 256) / 100, "bias": jnp.ones(3)}}


def stepped(tx, params=PARAMS, n=2):
    """A state in which nothing is as it was initialized."""
    state = tx.init(params)
    for i in range(n):
        updates, state = tx.update(jax.tree.map(lambda x, i=i: x * 0.1 + i, params), state, params)
        params = optax.apply_updates(params, updates)
    return {"params": params, "opt": state}


def saved(folder, tree, *steps):
    with Checkpoints(folder) as checkpoints:
        for step in steps:
            checkpoints.save(step, tree)


def chain():
    cycle = ao.one_cycle(1e-3, 100)
    inner = ao.telemetry(ao.adamw(cycle.learning_rate, b1=cycle.momentum, mask=ao.decay_mask), every=1)
    return ao.accumulate_gradients(optax.chain(inner, ao.stochastic_rounding()), 2)


@pytest.mark.parametrize(
    "tx",
    [
        ao.adam(1e-3),
        ao.adam(1e-3, granularity="tensor"),
        ao.scale_by_adam(mu_storage="bfloat16", nu_storage=ao.BFloat16()),
        ao.scale_by_adam(mu_storage="int8", nu_storage=ao.Int8()),
        ao.scale_by_rms(granularity=ao.Axis(-1)),
        ao.inject_hyperparams(ao.adamw)(learning_rate=1e-3),
        optax.adam(1e-3),
        chain(),
    ],
    ids=["adam", "tensor", "bfloat16", "int8", "axis", "injected", "optax", "chain"],
)
def test_a_state_comes_back_bit_for_bit(tx, tmp_path):
    tree = stepped(tx)
    saved(tmp_path, tree, 7)
    step, restored = Checkpoints(tmp_path).restore(jax.eval_shape(lambda: tree))
    assert step == 7
    same(restored, tree)
    same(Checkpoints(tmp_path).restore(jax.tree.map(jnp.zeros_like, tree))[1], tree)


def test_every_kind_of_array_comes_back_as_it_was(tmp_path):
    tree = {
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 4),
        "data": jax.random.PRNGKey(0),
        "half": jnp.full((2, 3), 1.5, jnp.bfloat16),
        "eight": jnp.ones(4, jnp.float8_e4m3fn),
        "flag": jnp.array(True),
        "counts": (np.int64(2**40), np.arange(3, dtype=np.uint8)),
        "empty": {"device": jnp.zeros((0, 3)), "host": np.zeros((2, 0), np.int16)},
        "nothing": None,
        "a name with / and ..": optax.MaskedNode(),
    }
    saved(tmp_path, tree, 0)
    step, restored = Checkpoints(tmp_path).restore(tree)
    assert step == 0
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(tree), strict=True):
        assert type(x) is type(y) and x.dtype == y.dtype and x.shape == y.shape
    assert all(not x.committed for x in jax.tree.leaves(restored) if isinstance(x, jax.Array))
    bits = jax.random.bits(restored["key"]), jax.vmap(jax.random.bits)(restored["keys"])
    same(bits, (jax.random.bits(tree["key"]), jax.vmap(jax.random.bits)(tree["keys"])))
    keys = {"key": 0, "keys": 0}
    same(restored | keys, tree | keys)


def test_only_arrays_without_elements(tmp_path):
    tree = {"none": jnp.zeros((0, 2))}
    try:
        saved(tmp_path, tree, 1)
    except OSError as error:  # orbax refuses a tree without arrays
        pytest.fail(str(error))
    same(Checkpoints(tmp_path).restore(tree)[1], tree)


def test_containers_may_differ(tmp_path):
    saved(tmp_path, {"opt": ao.sgd(0.5).init(PARAMS)[-1]}, 1)
    like = {"opt": ao.sgd(0.1).init(PARAMS)[-1]._asdict()}
    assert Checkpoints(tmp_path).restore(like)[1]["opt"]["scalars"][0] == 0.5


def test_arrays_may_change_as_soon_as_save_returns(tmp_path):
    step = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    device, host = jnp.arange(1_000_000) + 0, np.arange(1_000_000)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"device": device, "host": host})
        host[:] = -1
        step(device).block_until_ready()
    _, restored = Checkpoints(tmp_path).restore({"device": jnp.arange(1_000_000), "host": host})
    assert np.array_equal(restored["device"], np.arange(1_000_000))
    assert np.array_equal(restored["host"], np.arange(1_000_000))


def test_the_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path / "new" / "run", keep=2) as checkpoints:
        assert checkpoints.restore({"x": jnp.ones(1)}) is None
        assert checkpoints.steps() == []
        for step in (1, 5, 20, 100):
            checkpoints.save(step, {"x": jnp.full(3, step)})
        step, tree = checkpoints.restore({"x": jnp.zeros(3, int)})  # waits for the one being written
        assert step == 100 and tree["x"].tolist() == [100] * 3
        assert checkpoints.steps() == [20, 100]
        assert checkpoints.restore({"x": jnp.zeros(3, int)}, step=20)[1]["x"].tolist() == [20] * 3
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["100", "20"]


def test_a_step_that_is_not_above_the_newest(tmp_path):
    like = {"x": jnp.zeros(2, int)}
    saved(tmp_path, like, 10)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(20, like)
        checkpoints.save(30, like)
        with pytest.raises(ValueError, match=r"step must be above 30, .*got 30; .*restore\(like, step="):
            checkpoints.save(30, like)
        assert checkpoints.restore(like, step=10)[0] == 10
        checkpoints.save(20, {"x": jnp.ones(2, int)})
    assert checkpoints.steps() == [10, 20]
    assert sorted(os.listdir(tmp_path / "set_aside")) == ["20", "30"]
    assert Checkpoints(tmp_path).restore(like)[1]["x"].tolist() == [1, 1]


def test_going_back_twice_sets_aside_under_another_name(tmp_path):
    like = {"x": jnp.zeros(2)}
    saved(tmp_path, like, 1, 2)
    for _ in range(2):
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.restore(like, step=1)
            checkpoints.save(2, like)
    assert len(os.listdir(tmp_path / "set_aside")) == 2
    with Checkpoints(tmp_path) as checkpoints:  # the newest, by its step: there is nothing to go back over
        checkpoints.restore(like, step=2)
        with pytest.raises(ValueError, match="step must be above 2"):
            checkpoints.save(2, like)


def mesh_of(*shape):
    return jax.make_mesh(
        shape, ("x", "y")[: len(shape)], axis_types=(jax.sharding.AxisType.Auto,) * len(shape)
    )


@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_sharded_arrays_go_to_another_layout(storage, tmp_path):
    tx = ao.adam(1e-3, mu_storage=storage, nu_storage=storage)
    shape = {"w": (16, 256), "b": (8,)}
    specs = {"w": jax.P("x", None), "b": jax.P("x")}, {"w": jax.P("y", "x"), "b": jax.P(None)}
    meshes = mesh_of(8), mesh_of(2, 4)
    rng = np.random.default_rng(0)
    values = {k: rng.normal(size=s).astype(np.float32) for k, s in shape.items()}
    first = {k: jax.device_put(x, jax.NamedSharding(meshes[0], specs[0][k])) for k, x in values.items()}
    state = jax.jit(tx.init, out_shardings=ao.state_sharding(tx, first))(first)
    _, state = jax.jit(tx.update)(first, state, first)
    saved(tmp_path, {"params": first, "opt": state}, 3)

    like = {
        k: jax.ShapeDtypeStruct(s, jnp.float32, sharding=jax.NamedSharding(meshes[1], specs[1][k]))
        for k, s in shape.items()
    }
    shardings = ao.state_sharding(tx, like)
    like_state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(lambda: state),
        shardings,
    )
    _, restored = Checkpoints(tmp_path).restore({"params": like, "opt": like_state})
    same(restored, {"params": first, "opt": state})
    assert restored["params"]["w"].sharding == like["w"].sharding
    placed = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), restored["opt"], shardings)
    assert all(jax.tree.leaves(placed))
    tx.update(restored["params"], restored["opt"], restored["params"])


def test_keys_go_to_a_mesh(tmp_path):
    keys = jax.random.split(jax.random.key(0), 8)
    saved(tmp_path, {"keys": keys}, 1)
    split = jax.NamedSharding(mesh_of(8), jax.P("x"))
    like = {"keys": jax.ShapeDtypeStruct((8,), keys.dtype, sharding=split)}
    _, restored = Checkpoints(tmp_path).restore(like)
    assert restored["keys"].sharding.is_equivalent_to(split, 1)
    same(jax.random.key_data(restored["keys"]), jax.random.key_data(keys))


def refusal(folder, like, **options):
    with pytest.raises(ValueError) as caught:
        Checkpoints(folder).restore(like, **options)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


def test_another_optimizer_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    saved(tmp_path, stepped(ao.adam(1e-3)), 40)
    monkeypatch.setattr(orbax.ocp, "PyTreeCheckpointHandler", lambda: pytest.fail("it was loaded"))
    message = refusal(tmp_path, stepped(ao.rmsprop(1e-3)))
    assert message.startswith(
        f"Checkpoint 40 in {tmp_path} is not one of like: 'opt/0/scalars' is float32[6] there, and "
        "float32[3] in like; 'opt/0/mu/dense/bias' is float32[3] there, and not in like; "
    )
    assert "transfer_state" in message

    message = refusal(tmp_path, stepped(ao.adam(1e-3, nu_storage=ao.BFloat16())))
    assert "'opt/0/nu/dense/kernel' is float32[2, 256] there, and bfloat16[2, 256] in like" in message


def test_another_shape_is_refused(tmp_path):
    saved(tmp_path, {"w": jnp.ones((2, 3)), "b": jnp.ones(1)}, 1)
    message = refusal(tmp_path, {"w": jnp.ones((3, 2)), "b": jnp.ones(1)})
    assert "like: 'w' is float32[2, 3] there, and float32[3, 2] in like. If" in message
    message = refusal(tmp_path, {"w": jnp.ones((2, 3)), "b": jnp.ones(0)})
    assert "'b' is float32[1] there, and float32[0] in like" in message


def copies(folder, step=20):
    """Every file of a checkpoint, each with a function that puts the folder back as it was."""
    kept = folder.with_name(folder.name + ".kept")
    shutil.copytree(folder, kept)
    for path in sorted(p for p in (folder / str(step)).rglob("*") if p.is_file()):
        yield path
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)


def check_damage(folder, tree):
    """Returns whether the newest checkpoint is refused; if not, it must be whole."""
    try:
        step, restored = Checkpoints(folder).restore(tree)
    except ValueError as error:
        message = str(error)
        assert message.startswith(f"Checkpoint 20 in {folder} is damaged (")
        assert message.endswith("the one before it that is intact is used by restore(like, step=10).")
        assert "\n" not in message
        step, restored = Checkpoints(folder).restore(tree, step=10)
        assert step == 10
        same(restored, tree)
        return True
    assert step == 20
    same(restored, tree)
    return False


@pytest.mark.parametrize("size", [0, 0.5])
def test_a_truncated_file(size, tmp_path):
    tree = stepped(ao.adam(1e-3))
    saved(tmp_path / "run", tree, 10, 20)
    refused = set()
    for path in copies(tmp_path / "run"):
        os.truncate(path, int(path.stat().st_size * size))
        if check_damage(tmp_path / "run", tree):
            refused.add(path.relative_to(tmp_path / "run" / "20").as_posix())
    assert {"manifest/metadata", "state/_METADATA", "state/manifest.ocdbt"} <= refused
    assert sum(name.startswith("state/") and "/d/" in name for name in refused) >= 2


def test_a_missing_file(tmp_path):
    tree = stepped(ao.adam(1e-3))
    saved(tmp_path / "run", tree, 10, 20)
    refused = 0
    for path in copies(tmp_path / "run"):
        path.unlink()
        refused += check_damage(tmp_path / "run", tree)
    assert refused >= 3


def test_a_flipped_byte_anywhere(tmp_path):
    tree = stepped(ao.adam(1e-3))
    saved(tmp_path / "run", tree, 10, 20)
    rng, refused = np.random.default_rng(0), 0
    for path in copies(tmp_path / "run"):
        content = bytearray(path.read_bytes())
        for place in rng.integers(len(content), size=3):
            content[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        refused += check_damage(tmp_path / "run", tree)
    assert refused >= 5


def test_other_values_under_a_valid_format(tmp_path):
    """What orbax itself cannot notice: the arrays of another checkpoint."""
    for name, value in (("run", 1.0), ("other", 2.0)):
        saved(tmp_path / name, {"x": jnp.full(3, value)}, 10, 20)
    shutil.rmtree(tmp_path / "run/20/state")
    shutil.copytree(tmp_path / "other/20/state", tmp_path / "run/20/state")
    assert "damaged (the bytes of 'x' are not those" in refusal(tmp_path / "run", {"x": jnp.ones(3)})
    manifest = tmp_path / "run/20/manifest/metadata"
    manifest.write_text(manifest.read_text().replace("float32", "float16"))
    assert "damaged (the bytes of its manifest are not" in refusal(tmp_path / "run", {"x": jnp.ones(3)})


def test_nothing_intact_and_not_a_checkpoint(tmp_path):
    saved(tmp_path, {"x": jnp.ones(3)}, 10)
    (tmp_path / "20").mkdir()
    (tmp_path / "30").write_text("a file is not a checkpoint")
    message = refusal(tmp_path, {"x": jnp.ones(3)})
    assert "Checkpoint 20" in message and "step=10" in message
    os.truncate(tmp_path / "10" / "manifest" / "metadata", 5)
    assert refusal(tmp_path, {"x": jnp.ones(3)}).endswith("no checkpoint before it is intact.")
    message = refusal(tmp_path, {"x": jnp.ones(3)}, step=11)
    assert message.endswith("got 11; there are those of 10, 20.")


def test_other_versions_warn(tmp_path):
    saved(tmp_path, {"x": jnp.ones(3)}, 10)
    path = tmp_path / "10" / "manifest" / "metadata"
    manifest = json.loads(path.read_text())["manifest"]
    assert manifest["versions"].keys() == {"adaptive_optax", "jax", "optax", "flax"}
    assert manifest["leaves"]["x"][:2] == [[3], "float32"]
    manifest["versions"]["jax"] = "0.0.1"
    path.write_text(json.dumps({"manifest": manifest, "crc32": orbax._digest(manifest)}))
    with pytest.warns(
        UserWarning, match=rf"written with jax 0\.0\.1, and this is {re.escape(jax.__version__)}"
    ):
        Checkpoints(tmp_path).restore({"x": jnp.ones(3)})
    manifest["format"] = 2
    path.write_text(json.dumps({"manifest": manifest, "crc32": orbax._digest(manifest)}))
    assert "must have a manifest of format 1, got 2" in refusal(tmp_path, {"x": jnp.ones(3)})


KILLED = """
import os, signal, sys, time, traceback
import numpy as np
from adaptive_optax.integrations.orbax import Checkpoints

def tree(step):
    return {f"x{i}": np.full(100_000, step) for i in range(20)}

def child(delay, before):
    checkpoints = Checkpoints(sys.argv[1], keep=2)
    step, found = checkpoints.restore(tree(0)) or (0, {})
    assert all((x == step).all() for x in found.values()) and before - 1 <= step <= before, (step, before)
    checkpoints.save(before + 1, tree(before + 1))
    checkpoints.wait()
    checkpoints.save(before + 2, tree(before + 2))
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)

before = unfinished = 0
for delay in (0.0, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.3):
    pid = os.fork()
    if not pid:
        try:
            child(delay, before)
        finally:
            traceback.print_exc()
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    unfinished += any("tmp" in name for name in os.listdir(sys.argv[1]))
    before += 2
print(unfinished)
"""


def test_a_kill_in_the_middle_of_a_save(tmp_path):
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, tmp_path], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= 2
    like = {f"x{i}": np.zeros(100_000, int) for i in range(20)}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        before, _ = checkpoints.restore(like)
        assert before in (17, 18)
        checkpoints.save(before + 1, like)
    assert checkpoints.steps() == [before, before + 1]
    assert sorted(os.listdir(tmp_path)) == sorted(map(str, checkpoints.steps()))


@pytest.mark.parametrize("raised_by", ["save", "wait", "close", "restore"])
def test_a_full_disk_in_the_background(raised_by, tmp_path, monkeypatch):
    tree = {"x": jnp.ones(3)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tree)
    real = type(checkpoints._manager).wait_until_finished

    def full_disk(manager):
        real(manager)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    arguments = {"save": (2, tree), "restore": (tree,)}.get(raised_by, ())
    message = f"Checkpoint 1 could not be written to {tmp_path}: No space left on device; .*free some space"
    with monkeypatch.context() as patch:
        patch.setattr(type(checkpoints._manager), "wait_until_finished", full_disk)
        with pytest.raises(OSError, match=message) as caught:
            getattr(checkpoints, raised_by)(*arguments)
    assert caught.value.errno == errno.ENOSPC
    checkpoints.save(2, tree)
    checkpoints.close()
    assert checkpoints.restore(tree)[0] == 2


def tensorstore_error():
    raise ValueError("RESOURCE_EXHAUSTED: Failed to write 18 bytes: No space [os_error_code='28']")


def test_tensorstores_own_errors_are_understood():
    try:
        try:
            tensorstore_error()
        except ValueError as error:
            raise RuntimeError("the thread failed") from error
    except RuntimeError as error:
        assert orbax._errno_of(error) == errno.ENOSPC
    assert orbax._errno_of(ValueError("UNAVAILABLE: [OS error 30: read-only]")) == errno.EROFS
    assert orbax._errno_of(ValueError("x")) is None


@pytest.fixture
def disk(tmp_path):
    """A file system of 8 MB."""
    if not hasattr(os, "geteuid") or os.geteuid() or shutil.which("mount") is None:
        pytest.skip("only root can mount")
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_small_disk(disk, capfd, caplog):
    noise = np.random.default_rng(0)
    small, large = {"x": noise.normal(size=1000)}, {"x": noise.normal(size=4_000_000)}
    with Checkpoints(disk) as checkpoints:
        checkpoints.save(1, small)
        checkpoints.save(2, large)  # returns
        with pytest.raises(
            OSError, match="Checkpoint 2 .*No space left on device; checkpoint 1 there is intact"
        ) as e:
            checkpoints.wait()
        assert e.value.errno == errno.ENOSPC and "\n" not in str(e.value)
        assert os.listdir(disk) == ["1"]  # the space is free again
        assert not [r for r in caplog.records if r.levelname == "ERROR"]
        same(checkpoints.restore(small)[1], small)
        checkpoints.save(3, small)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    same(Checkpoints(disk).restore(small)[1], small)
    with pytest.raises(OSError, match=f"to {disk}: Read-only file system; checkpoint 3 there is intact.$"):
        Checkpoints(disk).save(4, small)


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="folder must be a folder, got '.*', which is a file"):
        Checkpoints(tmp_path / "file")
    with pytest.raises(OSError, match="could not be written to .*: Not a directory; there is none there yet"):
        Checkpoints(tmp_path / "file" / "run").save(1, {"x": jnp.ones(1)})
    for folder in ("", " ", None, 3, "a\0b"):
        with pytest.raises(ValueError, match="folder must name a folder, got "):
            Checkpoints(folder)
    with pytest.raises(ValueError, match="folder must be on a file system, got 'gs://bucket/run'"):
        Checkpoints("gs://bucket/run")
    for keep in (0, 1.5, None):
        with pytest.raises(ValueError, match=r"keep must be an integer in \[1, inf\), got "):
            Checkpoints(tmp_path, keep=keep)


def test_what_cannot_be_saved_or_restored(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(ValueError, match="tree must hold arrays only, got int at 'a/n'; wrap"):
        checkpoints.save(1, {"a": {"n": 3}})
    with pytest.raises(ValueError, match="tree must hold arrays that orbax can write, got <U1 at 's'"):
        checkpoints.save(1, {"s": np.array("x")})
    for step in (-1, 1.0, "1"):
        with pytest.raises(ValueError, match=r"step must be an integer in \[0, inf\), got "):
            checkpoints.save(step, {"x": jnp.ones(1)})
    with pytest.raises(ValueError, match="like must hold arrays or jax.ShapeDtypeStruct, got float at 'x'"):
        checkpoints.restore({"x": 1.0})
    with pytest.raises(ValueError, match="like holds float64 at 'x', which needs jax_enable_x64"):
        checkpoints.restore({"x": jax.ShapeDtypeStruct((), np.float64)})
    with pytest.raises(ValueError, match="got 3; there are none"):
        checkpoints.restore({"x": jnp.ones(1)}, step=3)
    assert not list(tmp_path.iterdir())


def test_an_error_in_the_block_is_not_hidden(tmp_path, monkeypatch):
    with pytest.raises(KeyError), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(1)})
        raise KeyError
    assert checkpoints.steps() == [1]


def test_without_orbax():
    code = (
        "import sys; sys.modules['orbax.checkpoint'] = None\n"
        "try: import adaptive_optax.integrations.orbax\n"
        "except ImportError as error: print(error)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        found.stdout.strip() == "adaptive_optax.integrations.orbax needs orbax: pip install orbax-checkpoint."
    )


def test_saving_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    tree, may_end, rename, renames = {"x": jnp.ones(3)}, threading.Event(), os.rename, []

    def renamed(*args, **kwargs):  # what completes a checkpoint
        assert may_end.wait(60)
        renames.append(args)
        return rename(*args, **kwargs)

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree)
        checkpoints.wait()
        monkeypatch.setattr(os, "rename", renamed)
        checkpoints.save(2, tree)
        assert checkpoints.steps() == [1]
        may_end.set()
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2] and renames


def x_of(value):
    return {"x": np.full(3, float(value))}


def gone_back(folder, step):
    with Checkpoints(folder) as checkpoints:
        for each in (10, 20, 30):
            checkpoints.save(each, x_of(each))
    checkpoints = Checkpoints(folder)
    assert checkpoints.restore(x_of(0), step=step)[0] == step
    return checkpoints


@pytest.mark.parametrize("step", [5, 15, 20])
def test_after_going_back_steps_go_on_from_there(tmp_path, step):
    checkpoints = gone_back(tmp_path, 20)
    with pytest.raises(
        ValueError, match="step must be above 20, that of the checkpoint that was gone back to"
    ):
        checkpoints.save(step, x_of(99))
    assert checkpoints.steps() == [10, 20, 30]
    checkpoints.save(21, x_of(21))
    checkpoints.close()
    assert checkpoints.steps() == [10, 20, 21] and (tmp_path / "set_aside/30").exists()


def test_what_was_set_aside_comes_back_if_the_write_fails(tmp_path, monkeypatch):
    checkpoints = gone_back(tmp_path, 10)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(orbax.ocp.CheckpointManager, "save", full)
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save(15, x_of(15))
    assert checkpoints.steps() == [10, 20, 30]
    checkpoints.save(15, x_of(15))
    checkpoints.close()
    assert checkpoints.steps() == [10, 15]


@pytest.mark.parametrize(
    "x",
    [
        jnp.ones(4, jnp.uint4),
        np.ones(2, np.longdouble),
        np.zeros(2, [("a", np.float32)]),
        np.array(["a"]),
        np.array([None]),
    ],
    ids=lambda x: str(x.dtype),
)
def test_arrays_that_cannot_be_written_are_refused_at_once(tmp_path, x):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="tree must hold arrays that orbax can write, got .* at 'a/b'"):
            checkpoints.save(1, {"a": {"b": x}})
        checkpoints.save(1, {"a": jnp.ones(1)})
    assert checkpoints.steps() == [1]


def test_traced_arrays_are_refused(tmp_path):
    with pytest.raises(ValueError, match="got a traced one at 'x': save outside of jit"):
        jax.jit(lambda x: Checkpoints(tmp_path).save(1, {"x": x}))(jnp.ones(2))


@pytest.mark.parametrize("dtype", [">f4", "<f4", ">i8", ">c8"])
def test_byte_orders_of_other_machines(tmp_path, dtype):
    x = np.arange(3).astype(dtype)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": x})
        for like in (x, x.astype(x.dtype.newbyteorder("="))):
            _, found = checkpoints.restore({"x": like})
            np.testing.assert_array_equal(found["x"], x)
            assert found["x"].dtype == like.dtype


def test_a_path_that_orbax_misreads_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"folder must not have a '\[' in its path"):
        Checkpoints(tmp_path / "lr=[0.1]")


def test_a_link_to_nothing_is_no_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="which is a link to nothing"):
        Checkpoints(tmp_path / "link")


def test_a_checkpoint_that_is_deleted_while_it_is_read(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, keep=1) as writer:
        writer.save(1, x_of(1))
    reader, load = Checkpoints(tmp_path), Checkpoints._load

    def overtaken(self, step, *wanted):
        if step == 1:
            with Checkpoints(tmp_path, keep=1) as writer:
                writer.save(2, x_of(2))
        return load(self, step, *wanted)

    monkeypatch.setattr(Checkpoints, "_load", overtaken)
    step, found = reader.restore(x_of(0))
    assert step == 2 and found["x"][0] == 2


def test_a_foreign_folder_has_no_manifest(tmp_path):
    (tmp_path / "7").mkdir()
    with pytest.raises(ValueError, match="it has no manifest, so that it was not written by this class"):
        Checkpoints(tmp_path).restore(x_of(0))


@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_states_written_with_one_array_for_each_scalar_can_be_read(tmp_path, batch):
    inner = optax.chain(
        ao.scale_by_adam(), ao.scale_by_rms(), ao.scale_by_learning_rate(ao.step_decay(1.0, 0.5, every=1))
    )
    tx = ao.accumulate_gradients(inner, 1)
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (*batch, *x.shape)), state)

    def before(x):
        if isinstance(x, dict):
            return {key: before(child) for key, child in x.items()}
        if hasattr(x, "_fields"):
            return {name: before(getattr(x, name)) for name in attributes_of(type(x))}
        return {str(i): before(child) for i, child in enumerate(x)} if isinstance(x, tuple) else x

    saved(tmp_path, {"opt": before(state)}, 5)
    written = json.loads((tmp_path / "5" / "manifest" / "metadata").read_text())["manifest"]["leaves"]
    assert "opt/inner_state/0/bound_sq" in written and not any("scalars" in path for path in written)
    for like in (state, jax.eval_shape(lambda: state)):
        step, restored = Checkpoints(tmp_path).restore({"opt": like})
        assert step == 5
        chex.assert_trees_all_equal(restored["opt"], state, strict=True)
    as_dictionaries = serialization.to_state_dict(state)  # as nnx and Flax have it
    restored = Checkpoints(tmp_path).restore({"opt": as_dictionaries})[1]["opt"]
    chex.assert_trees_all_equal(serialization.from_state_dict(state, restored), state, strict=True)
