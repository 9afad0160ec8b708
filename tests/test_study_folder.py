"""What a study's folder accepts: the same programs, whole files, and its own trials only."""

import errno
import io
import json
import os
import pickle
import shutil

import jax
import numpy as np
import pandas as pd
import pytest
from quadratic import constant, quadratic_task

import adaptive_optax as ao
from adaptive_optax import study
from adaptive_optax.study.engine import store as stores
from adaptive_optax.study.engine import trials
from adaptive_optax.study.engine.chunks import Curves, Identity, Key, pack
from adaptive_optax.study.engine.fingerprint import describe_arm, describe_study, stream_of
from adaptive_optax.study.engine.store import ANY_RATE, ArmPrograms, Look, Store, check_folder
from adaptive_optax.study.engine.trainers import ArmSpec
from adaptive_optax.study.engine.trials import Plan

# ---- A folder without a study ----

DESCRIPTION = {"steps": 2, "record shapes": {"training": [2], "validation": [3], "telemetry": [1, 4]}}
ARMS = {
    "a": ArmPrograms(False, lambda rate: {"program": "p", "evaluation": "e"}),
    "b": ArmPrograms(True, lambda rate: {"program": f"p{rate}", "evaluation": "e"}),
}


def record(value=1.0):
    return Curves(*(np.full(shape, value, np.float32) for shape in DESCRIPTION["record shapes"].values()))


FIRST = {Key("a", 0.1, seed): record(seed) for seed in (0, 1)}
SECOND = {Key("b", 0.1, 0): record()}


def begun(path):
    store = Store(path, DESCRIPTION, ARMS)
    store.write(FIRST)
    store.write(SECOND)
    return store


def chunk_files(path):
    return sorted((path / "trials").glob("*.npz"))


def holding(path, key):
    """The file with this trial."""
    for file in chunk_files(path):
        if key in stores.unpack(file.read_bytes()):
            return file
    raise AssertionError(key)


def foreign(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def with_a_changed_number(data):
    with np.load(io.BytesIO(data)) as file:
        arrays = dict(file)
    arrays["validation"] = arrays["validation"] / 2
    return foreign(**arrays)


def packed(results, study=None, program=None):
    def other(store):
        def identity(key):
            own = store._known_identity(key)
            return Identity(study or own.study, program or own.program)

        return pack(results, identity)

    return other


class Trap:
    def __reduce__(self):
        return os.abort, ()


DAMAGES = {
    "empty": (lambda data, store: b"", "is damaged"),
    "truncated": (lambda data, store: data[: len(data) // 2], "is damaged"),
    "no zip": (lambda data, store: b"PK\x03\x04", "is damaged"),
    "pickled": (lambda data, store: pickle.dumps(Trap()), "is damaged"),
    "pickled inside": (lambda data, store: foreign(arm=np.array([Trap()], object)), "is damaged"),
    "an array": (lambda data, store: np.lib.format.magic(1, 0), "is damaged"),
    "foreign": (lambda data, store: foreign(weights=np.ones(3)), "is foreign or of another version"),
    "edited": (lambda data, store: with_a_changed_number(data), "was changed after it was written"),
    "negative seed": (lambda data, store: packed({Key("a", 0.1, -1): record()})(store), "impossible"),
    "NaN rate": (lambda data, store: packed({Key("a", float("nan"), 1): record()})(store), "impossible"),
    "shape": (
        lambda data, store: packed({Key("a", 0.1, 0): record()._replace(training=np.ones(3))})(store),
        "holds 'training' of dtype float64 and shape",
    ),
    "unknown arm": (
        lambda data, store: pack({Key("c", 0.1, 0): record()}),
        "an arm that the study does not have, 'c'",
    ),
    "other study": (lambda data, store: packed(FIRST, study="other")(store), "trials of another study"),
    "other arm": (lambda data, store: packed(FIRST, program="other")(store), "a different arm named 'a'"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_chunk_that_cannot_be_used_is_set_aside_and_the_rest_kept(damage, tmp_path):
    store = begun(tmp_path)
    file = holding(tmp_path, Key("a", 0.1, 0))
    change, reason = DAMAGES[damage]
    file.write_bytes(change(file.read_bytes(), store))
    content = file.read_bytes()
    reader = Store(tmp_path, DESCRIPTION, ARMS)
    with pytest.warns(UserWarning, match=reason) as warned:
        assert reader.read().keys() == SECOND.keys()
    assert len(warned) == 1 and str(file) in str(warned[0].message)
    assert "its trials run again" in str(warned[0].message)
    assert not file.exists() and (tmp_path / "set_aside" / file.name).read_bytes() == content
    reader.write(FIRST)
    assert Store(tmp_path, DESCRIPTION, ARMS).read().keys() == FIRST.keys() | SECOND.keys()


def test_files_of_one_name_are_all_kept_aside(tmp_path):
    begun(tmp_path)
    for count in (1, 2, 3):
        holding(tmp_path, Key("a", 0.1, 0)).write_bytes(b"")
        reader = Store(tmp_path, DESCRIPTION, ARMS)
        with pytest.warns(UserWarning, match="is damaged"):
            reader.read()
        reader.write(FIRST)
        assert len(list((tmp_path / "set_aside").iterdir())) == count


@pytest.mark.parametrize("name", ["trials", "locks", "set_aside"])
def test_a_file_in_the_place_of_a_folder_is_refused_before_training(name, tmp_path):
    for make in (lambda path: path.write_text("notes"), lambda path: path.symlink_to("nothing")):
        path = tmp_path / name
        make(path)
        with pytest.raises(ValueError, match=f"{name}' is a file where .*; move it away, or use another"):
            Store(tmp_path, DESCRIPTION, ARMS)
        path.unlink()


def test_what_cannot_be_set_aside_is_refused_in_one_sentence(tmp_path):
    begun(tmp_path)
    file = holding(tmp_path, Key("a", 0.1, 0))
    file.write_bytes(b"")
    reader = Store(tmp_path, DESCRIPTION, ARMS)
    (tmp_path / "set_aside").write_text("notes")
    with pytest.raises(ValueError, match=r"\.npz' is damaged, and cannot be moved to .*; move it away"):
        reader.read()


def test_a_file_that_another_process_sets_aside_or_mends_is_no_fault(tmp_path, monkeypatch):
    begun(tmp_path)
    file = holding(tmp_path, Key("a", 0.1, 0))
    whole = file.read_bytes()
    file.write_bytes(b"")
    reader = Store(tmp_path, DESCRIPTION, ARMS)
    accept, calls = reader._accept, []

    def mended_meanwhile(path):
        try:
            return accept(path)
        finally:
            if path == file and not calls:
                calls.append(path)
                file.write_bytes(whole)

    monkeypatch.setattr(reader, "_accept", mended_meanwhile)
    assert reader.read().keys() == FIRST.keys() | SECOND.keys()  # without a warning
    again = Store(tmp_path, DESCRIPTION, ARMS)
    monkeypatch.setattr(again, "_new_files", lambda: [tmp_path / "trials" / "gone.npz"])
    assert again.read() == {}


def test_of_trials_that_contradict_each_other_the_first_is_kept(tmp_path):
    store = begun(tmp_path)
    changed = FIRST | {Key("a", 0.1, 1): record(-1.0), Key("a", 0.1, 2): record()}
    later = tmp_path / "trials" / "0.npz"
    later.write_bytes(pack(changed, store._known_identity))
    os.utime(later, ns=(2**62, 2**62))
    reader = Store(tmp_path, DESCRIPTION, ARMS)
    with pytest.warns(UserWarning, match="contradicts trials that finished earlier"):
        found = reader.read()
    assert found.keys() == FIRST.keys() | SECOND.keys()
    np.testing.assert_array_equal(found[Key("a", 0.1, 1)].training, [1, 1])
    later.write_bytes(pack(FIRST, store._known_identity))  # the same again is no contradiction
    assert Store(tmp_path, DESCRIPTION, ARMS).read().keys() == found.keys()


BROKEN = [b"", b"{", b"\x80\xff", b"[]", b"3", b'{"format": 2}', b'{"a": {"b": 1}}', b"[" * 100_000]
BROKEN += [
    b"null",
    b'{"format": null, "study": {}, "arms": {}}',
    b'{"format": true, "study": {}, "arms": {}}',
]
BROKEN += [
    b'{"format": 2, "study": {"environment": %s}, "arms": {}}' % each
    for each in (b"5", b'"cpu"', b"null", b"[]")
]


@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
def test_a_damaged_description_is_written_anew_and_trials_are_known_by_their_digests(content, tmp_path):
    begun(tmp_path)
    (tmp_path / "study.json").write_bytes(content)
    with pytest.warns(UserWarning, match=r"study\.json' .* it is written again"):
        reader = Store(tmp_path, DESCRIPTION, ARMS)
    assert reader.read().keys() == FIRST.keys() | SECOND.keys()
    (tmp_path / "study.json").write_bytes(content)
    with pytest.warns(UserWarning):
        other = Store(tmp_path, DESCRIPTION | {"base seed": 1}, ARMS)
    with pytest.warns(UserWarning, match="trials of another study"):
        assert other.read() == {}


@pytest.mark.parametrize(
    "looks",
    [
        "[3",
        "{}",
        "null",
        "[]",
        "[5, 8]",
        "\x00",
        '[{"seeds": 5}]',
        '[{"seeds": -5, "baseline": "a", "rates": {"a": 0.1}}]',
        '[{"seeds": 5, "baseline": "c", "rates": {"a": 0.1}}]',
        '[{"seeds": 5, "baseline": "a", "rates": {"a": NaN}}]',
        '[{"seeds": 5, "baseline": [], "rates": {"a": 1.0}}]',
        json.dumps([{"seeds": 5, "baseline": "a", "rates": {"a": 0.1}}] * 2),
    ],
)
def test_damaged_looks_are_refused_as_nothing_else_counts_them(looks, tmp_path):
    begun(tmp_path)
    (tmp_path / "looks.json").write_text(looks)
    with pytest.raises(ValueError, match=r"looks\.json' .*verdicts drawn so far.*Restore a copy"):
        Store(tmp_path, DESCRIPTION, ARMS)


def test_a_look_is_what_a_verdict_is_drawn_from(tmp_path):
    store = begun(tmp_path)
    first = Look(5, "a", {"a": 0.1, "b": 0.1})
    others = [
        first._replace(seeds=8),
        first._replace(rates={"a": 0.3, "b": 0.1}),  # another best rate
        first._replace(rates=first.rates | {"c": 0.1}),  # another arm
        first._replace(baseline="b"),
    ]
    assert store.look(first) == [first]
    for count, look in enumerate(others, start=2):
        assert len(store.look(look)) == count
    # The same again shows nothing new, whatever the order of the arms.
    assert store.look(Look(5, "a", {"b": 0.1, "a": 0.1})) == [first]
    assert len(Store(tmp_path, DESCRIPTION, ARMS).look(others[-1])) == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"task": "t", "steps": 3, "arms": ["a", "b"]}, "format 1, this one has 2"),
        ({"format": 99, "study": {}, "arms": {}}, "format 99, this one has 2"),
    ],
)
def test_a_folder_of_another_version_is_refused(content, message, tmp_path):
    (tmp_path / "study.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"another version of the study .{message}.*use another folder"):
        Store(tmp_path, DESCRIPTION, ARMS)


def test_arms_and_rates_are_added_and_changed_ones_refused(tmp_path):
    begun(tmp_path)
    added = ARMS | {"c": ArmPrograms(False, lambda rate: {"program": "c", "evaluation": "e"})}
    store = Store(tmp_path, DESCRIPTION, added)
    store.admit([Key("c", 0.1, 0), Key("b", 0.3, 0)])
    Store(tmp_path, DESCRIPTION, {"b": ARMS["b"]})  # fewer are the same study, too
    for name, programs, message in [
        ("b", ArmPrograms(True, lambda r: {"program": f"p{r}" * (1 + (r > 0.2)), "evaluation": "e"}),
         r"changed: arm 'b' program at learning rate 0\.3\. Use another folder"),
        ("b", ArmPrograms(False, lambda r: {"program": "p", "evaluation": "e"}), r"arm 'b' program\."),
        ("c", ArmPrograms(False, lambda r: {"program": "c", "evaluation": "x"}), r"arm 'c' evaluation\."),
        ("c", ArmPrograms(False, lambda r: {"program": "d", "evaluation": "e"}), r"arm 'c' program\."),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Store(tmp_path, DESCRIPTION, ARMS | {name: programs})
    # A process that was there before knows an arm that another has added.
    early, late = Store(tmp_path, DESCRIPTION, ARMS), Store(tmp_path, DESCRIPTION, added)
    late.write({Key("c", 0.1, 0): record()})
    assert Key("c", 0.1, 0) in early.read()
    assert json.loads((tmp_path / "study.json").read_text())["arms"]["c"].keys() == {ANY_RATE}


def test_folders_that_cannot_be_written_to_are_refused_in_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path, reason in [
        ("", "name a folder, got ''"),
        (3, "name a folder, got 3"),
        (tmp_path / "file", "it is a file"),
        (tmp_path / "file" / "under", "Not a directory"),
        (tmp_path / "link", "File exists"),
        (tmp_path / ("x" * 300), "name too long"),
        (f"{tmp_path}/a\0b", "null"),
    ]:
        with pytest.raises(ValueError, match=f"(?s)^out must .*{reason}"):
            check_folder("out", path)

    def refuse(*arguments, **keywords):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(stores.tempfile, "TemporaryFile", refuse)
    with pytest.raises(
        ValueError, match="^--out must be a folder that can be written to, .*: Permission denied"
    ):
        check_folder("--out", tmp_path)


# ---- The fingerprint ----

TASK = quadratic_task(1.0, 1.0, dimensions=4)
PLAN = Plan(10, (0, 10))


def digests(function, rate=None, evaluate=None, task=TASK, stream=0):
    spec = ArmSpec(function, "once" if rate is None else "per rate", evaluate, stream)
    return describe_arm("a", task, spec, PLAN, rate)


def test_the_fingerprint_is_that_of_the_whole_trial():
    same = digests(constant)
    assert digests(lambda r, n: ao.sgd(r)) == same
    assert digests(lambda r, n: ao.sgd(2 * r))["program"] != same["program"]
    assert digests(constant, stream=1)["program"] != same["program"]
    judged = digests(constant, evaluate=lambda params, state: jax.tree.map(lambda x: 2 * x, params))
    assert judged["program"] == same["program"] and judged["evaluation"] != same["evaluation"]
    table = np.arange(1.0, 40.0, dtype=np.float32)
    closed = [
        digests(lambda r, n, t=t: ao.sgd(lambda count: r * jax.numpy.asarray(t)[count]))
        for t in (table, -table)
    ]
    assert closed[0] != closed[1]
    per_rate = [digests(lambda r, n: ao.sgd(float(r)), rate)["program"] for rate in (0.1, 0.2)]
    assert per_rate[0] != per_rate[1]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda: jax.threefry_partitionable(False), "jax_threefry_partitionable"),
        (lambda: jax.default_prng_impl("rbg"), "jax_default_prng_impl"),
        (lambda: jax.enable_x64(not jax.config.jax_enable_x64), "jax_enable_x64"),
        (lambda: jax.default_matmul_precision("float32"), "jax_default_matmul_precision"),
        (lambda: jax.numpy_dtype_promotion("strict"), "jax_numpy_dtype_promotion"),
    ],
)  # fmt: skip
def test_settings_of_jax_are_part_of_the_study_and_named_alone(change, name, tmp_path):
    Store(tmp_path, describe_study(TASK, PLAN, 0, True))
    with change():
        description = describe_study(TASK, PLAN, 0, True)
    with pytest.raises(ValueError, match=rf"changed: {name} \(was \S+, is \S+\)\. Use"):
        Store(tmp_path, description)


def test_flags_of_the_compiler_are_part_of_the_study(monkeypatch):
    before = describe_study(TASK, PLAN, 0, True)
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " --xla_dump_to=/nowhere")
    assert describe_study(TASK, PLAN, 0, True) == before
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " --xla_cpu_enable_fast_math=true")
    assert describe_study(TASK, PLAN, 0, True) != before


def test_a_call_back_into_python_cannot_be_kept():
    def arm(rate, steps):
        def halved(x):
            return jax.pure_callback(lambda x: x / 2, jax.ShapeDtypeStruct((), x.dtype), x)

        return ao.sgd(halved(rate))

    with pytest.raises(ValueError, match="out cannot save a study whose arm 'a' calls back into Python"):
        digests(arm)

    def printing(rate, steps):
        jax.debug.print("{}", rate)
        return ao.sgd(rate)

    digests(printing)


def test_streams_are_those_of_names():
    names = [f"arm {i}" for i in range(100)]
    streams = [stream_of(name) for name in names]
    assert len(set(streams)) == 100 and all(0 < stream < 2**32 for stream in streams)


# ---- Studies ----


QUICK = {
    "mode": "scan",
    "chunk": 2,
    "progress": False,
    "learning_rates": [0.03, 0.1],
    "steps": 10,
    "seeds": 5,
}


def refusing(factor):
    """An arm that refuses a traced rate, and changes with `factor` above 0.05 only."""

    def arm(rate, steps):
        rate = float(rate)
        return ao.sgd(rate * (1.0 if rate < 0.05 else factor))

    return arm


def compared(out, factor=1.0, more=None, **changes):
    arms = {"base": constant, "x": refusing(factor)} | (more or {})
    return study.compare(TASK, arms, out=out, **(QUICK | {"growth": 0} | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished study and its folder, to be copied."""
    out = tmp_path_factory.mktemp("finished") / "out"
    return compared(out), out


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of the finished study's folder."""
    return shutil.copytree(finished[1], tmp_path / "out")


@pytest.fixture
def trained(monkeypatch):
    """Lists the trials that are trained."""
    seen, run = [], trials.Program.run

    def counted(self, each, *arguments):
        seen.extend(each.seed.tolist())
        return run(self, each, *arguments)

    monkeypatch.setattr(trials.Program, "run", counted)
    return seen


def assert_same(a, b):
    pd.testing.assert_frame_equal(a.table, b.table, check_exact=True)
    np.testing.assert_array_equal(a.training_curves, b.training_curves)


def test_an_arm_changed_at_any_of_its_rates_is_refused(folder, trained):
    with pytest.raises(ValueError, match=r"changed: arm 'x' program at learning rate 0\.1\. Use"):
        compared(folder, factor=0.05)
    # At a rate that the grid has grown by, too, even where this call would not come so far.
    compared(folder, learning_rates=[0.01, 0.02], growth=1)
    grown = {float(rate) for rate in json.loads((folder / "study.json").read_text())["arms"]["x"]}
    assert grown > {0.01, 0.02, 0.03, 0.1} and trained

    def changed_there(rate, steps):
        return ao.sgd(float(rate) * (1.0 if float(rate) in (0.01, 0.02, 0.03, 0.1) else 2.0))

    with pytest.raises(ValueError, match="changed: arm 'x' program at learning rate 0.0"):
        study.compare(TASK, {"base": constant, "x": changed_there}, out=folder, **QUICK)


def test_trials_of_another_study_are_never_used(finished, folder, tmp_path, trained):
    other = tmp_path / "other"
    compared(other, base_seed=1)
    del trained[:]
    for file in chunk_files(other):
        shutil.copy(file, folder / "trials" / f"copied_{file.name}")
        break
    replaced = chunk_files(other)[-1]
    shutil.copy(replaced, folder / "trials" / replaced.name)
    with pytest.warns(UserWarning, match="holds trials of another study") as warned:
        again = compared(folder)
    assert_same(again, finished[0])
    assert len(warned) == 2 and trained == list(range(1000, 1005))  # the replaced file's


def test_what_is_new_alone_is_trained_and_every_look_paid_for(finished, folder, tmp_path, trained):
    assert_same(compared(folder, margin=0.1), finished[0])
    assert not trained
    # Another arm: its two rates on three seeds, and five fresh seeds.
    more = {"y": lambda rate, steps: ao.sgd(rate / 2)}
    wider = compared(folder, more=more)
    assert len(trained) == 2 * 3 + 5 and wider.info["looks"] == [5, 5]
    assert_same(wider, compared(None, more=more))
    verdicts = study.judge(wider.table, baseline="base", look=2)
    assert wider.verdicts["y"].p_value == verdicts["y"].p_value
    # Without it, it is the first look again, and the table has nothing of it.
    del trained[:]
    narrow = compared(folder)
    assert_same(narrow, finished[0])
    assert narrow.info["looks"] == [5] and not trained
    # Another rate for both, and more tuning seeds for all three.
    rates = compared(folder, learning_rates=[0.01, 0.03, 0.1], tuning_seeds=4)
    assert len(trained) == 2 * (4 + 2)
    assert_same(rates, compared(None, learning_rates=[0.01, 0.03, 0.1], tuning_seeds=4))
    assert rates.info["looks"] == [5]  # the best rates and the fresh trials are those seen before
    # A rate that is the best one is another look.
    better = compared(folder, learning_rates=[0.03, 0.1, 0.2])
    assert better.info["best_rates"]["x"] == 0.2 and better.info["looks"] == [5, 5, 5]


def test_arms_with_batches_of_their_own_do_not_move_each_other():
    def trained_with(names):
        arms = {name: constant for name in names}
        table = study.compare(TASK, arms, paired_batches=False, growth=0, baseline="b", **QUICK).table
        return table[table["arm"] == "b"].drop(columns="steps_to_baseline").reset_index(drop=True)

    pd.testing.assert_frame_equal(trained_with("ab"), trained_with("cdb"), check_exact=True)


def test_a_program_is_not_found_compiled_under_other_settings():
    def final():
        return compared(None).table["final_metric"].to_numpy()

    before = final()
    with jax.threefry_partitionable(not jax.config.jax_threefry_partitionable):
        other = final()
    assert (other != before).any()
    np.testing.assert_array_equal(final(), before)


def test_what_a_function_reads_is_read_anew_where_trials_are_kept(tmp_path):
    factor = [1.0]

    def arm(rate, steps):
        return ao.sgd(rate * factor[0])

    def run(out):
        return study.compare(TASK, {"base": constant, "x": arm}, out=out, growth=0, **QUICK)

    run(tmp_path / "first")
    factor[0] = 0.5
    with pytest.raises(ValueError, match="changed: arm 'x' program"):
        run(tmp_path / "first")
    assert run(tmp_path / "second").verdict().effect != 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError("no memory"), SystemExit])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("where", ["run", "seconds"])
def test_what_goes_wrong_before_the_first_chunk_surfaces_as_itself(error, keep, where, tmp_path, monkeypatch):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(trials.Program, where, fail)
    mode = "scan" if where == "run" else None
    expected = error if isinstance(error, type) else type(error)
    with pytest.raises(expected) as caught:
        compared(tmp_path / "out" if keep else None, mode=mode)
    partial = caught.value.comparison
    assert len(partial.table) == 0 and partial.info["looks"] == []
    assert not getattr(caught.value, "__notes__", [])  # nothing is kept anywhere
    with pytest.raises(ValueError, match="after 0 trials"):
        partial.verdict()


def test_a_full_disk_loses_nothing_that_was_computed(tmp_path, monkeypatch):
    write, count = stores.write_atomically, []

    def full(path, data):
        if "trials" in str(path):
            count.append(path)
            if len(count) > 2:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, data)

    monkeypatch.setattr(stores, "write_atomically", full)
    out = tmp_path / "out"
    with pytest.raises(OSError, match="No space left") as caught:
        compared(out)
    assert len(caught.value.comparison.table) == 12
    assert (
        "The 12 finished trials" in caught.value.__notes__[0]
        and f"9 of them in {str(out)!r}" in caught.value.__notes__[0]
    )
    monkeypatch.setattr(stores, "write_atomically", lambda path, data: full("trials", data))
    with pytest.raises(ValueError, match="out must be a folder in which files can be saved, .*No space left"):
        compared(tmp_path / "other")


def test_a_temporary_file_is_not_left_behind(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: .*file'"):
        stores.write_atomically(tmp_path / "file", b"data")
    assert not list(tmp_path.iterdir())


def test_a_damaged_placement_is_chosen_again(finished, folder):
    for content in (
        "{", "{}", "null", "[]", '{"layout": 3}', "\x00",
        '{"layout": ["scan", 0, 0], "seconds a step": {}}',
        '{"layout": ["scan", 100001, 1], "seconds a step": {}}',
        '{"layout": ["scan", 1, 1], "seconds a step": {"scan": "3"}}',
        '{"layout": ["scan", 1, 1], "seconds a step": {"scan": Infinity}}',
    ):  # fmt: skip
        (folder / "layout.json").write_text(content)
        with pytest.warns(UserWarning, match=r"layout\.json' .* the placement is chosen again"):
            assert_same(compared(folder), finished[0])


def rewritten(data, **changes):
    with np.load(io.BytesIO(data)) as file:
        arrays = dict(file) | changes
    return foreign(**{name: array for name, array in arrays.items() if array is not None})


def with_header(data, change):
    with np.load(io.BytesIO(data)) as file:
        header = json.loads(file["header"].tobytes())
    change(header)
    return rewritten(data, header=np.frombuffer(json.dumps(header).encode(), np.uint8))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:100],
        lambda data: data[: len(data) // 2],
        lambda data: bytes([*data[:2000], *(255 - byte for byte in data[2000:2100]), *data[2100:]]),
        lambda data: pickle.dumps(Trap()),
        lambda data: foreign(a=np.ones(3)),
        lambda data: rewritten(data, header=None),
        lambda data: rewritten(data, header=np.zeros(3, np.uint8)),
        lambda data: rewritten(data, header=np.array("text")),
        lambda data: rewritten(data, validation_curves=np.ones((1, 3))),
        lambda data: rewritten(data, training_steps=np.ones(3)),
        lambda data: rewritten(data, **{"table.seed": np.arange(3)}),
        lambda data: rewritten(data, **{"table.learning_rate": None}),
        lambda data: rewritten(data, more=np.ones(3)),
        lambda data: with_header(data, lambda header: header.pop("info")),
        lambda data: with_header(data, lambda header: header.update(info=[])),
        lambda data: with_header(data, lambda header: header.update(format=1)),
        lambda data: with_header(data, lambda header: header.update(strings=3)),
        lambda data: with_header(data, lambda header: header["info"].pop("best_rates")),
        lambda data: with_header(data, lambda header: header["info"].update(baseline="other")),
        lambda data: with_header(data, lambda header: header["info"].update(looks=["five"])),
        lambda data: with_header(data, lambda header: header["info"].update(looks=[0])),
        lambda data: with_header(data, lambda header: header["info"].update(margin=-1.0)),
        lambda data: with_header(data, lambda header: header["info"].update(maximize=1)),
        lambda data: with_header(data, lambda header: header["info"].update(grid={"other": [0.1]})),
        lambda data: with_header(data, lambda header: header["info"]["grid"].update(x=["0.1"])),
        lambda data: with_header(data, lambda header: header["info"]["judged"].update(x=["one word"])),
        lambda data: with_header(data, lambda header: header["info"]["dataset"].pop("train")),
        lambda data: with_header(data, lambda header: header["strings"]["arm"].pop()),
        lambda data: with_header(data, lambda header: header["strings"].update(arm=[3] * 22)),
        lambda data: with_header(data, lambda header: header.update(columns=["arm"])),
    ],
)
def test_a_damaged_comparison_is_refused_in_one_sentence(damage, finished, tmp_path):
    finished[0].save(tmp_path / "whole.npz")
    data = damage((tmp_path / "whole.npz").read_bytes())
    (tmp_path / "damaged.npz").write_bytes(data)
    with pytest.raises(
        ValueError, match=r"path must be a file written by Comparison\.save, .*damaged\.npz', which is "
    ):
        study.load(tmp_path / "damaged.npz")


def test_a_comparison_of_an_earlier_version_is_read(finished, tmp_path):
    def earlier(header):
        header["info"]["of another version"] = 1
        for name in absent:
            del header["info"][name]

    absent = {"usual_arms": {}, "own_arms": {}, "judged": {}, "maximize": False, "out": None, "mode": None}
    finished[0].save(tmp_path / "whole.npz")
    (tmp_path / "earlier.npz").write_bytes(with_header((tmp_path / "whole.npz").read_bytes(), earlier))
    read = study.load(tmp_path / "earlier.npz")
    assert read.info == finished[0].info | absent
    assert read.verdicts == finished[0].verdicts
    read.to_html(tmp_path / "report.html")
