"""The built-in tasks: data are what they say, the transformer looks back only, all can be learned."""

import functools
import importlib
import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from flax import nnx

import adaptive_optax as ao
from adaptive_optax import study
from adaptive_optax.study import tasks
from adaptive_optax.study.details import Details, Samples

FACTORIES = {"localization": tasks.localization, "digits": tasks.digits, "text": tasks.text}
each_factory = pytest.mark.parametrize("name", FACTORIES)


@functools.cache
def made(name):
    return FACTORIES[name]()


def in_words(windows):
    return ["".join(tasks.ALPHABET[code] for code in window) for window in windows]


# ---- Data ----


def test_localization_has_images_and_boxes():
    task = made("localization")
    for data, count in ((task.train, 4096), (task.validation, 1024)):
        assert data["image"].shape == (count, 16, 49) and data["image"].dtype == np.uint8
        assert data["box"].shape == (count, 4) and data["box"].dtype == np.float32
        left, top, right, bottom = data["box"].T
        assert (0 <= left).all() and (left < right).all() and (right <= tasks.CANVAS).all()
        assert (0 <= top).all() and (top < bottom).all() and (bottom <= tasks.CANVAS).all()


def test_boxes_are_around_the_ink(monkeypatch):
    monkeypatch.setattr(tasks, "NOISE", 0)
    monkeypatch.setattr(tasks, "DIGIT_SIDE", (15.99, 16.0))  # a pixel of the digit is two of the canvas
    data = tasks.placed_digits.__wrapped__(64, 64)[0]
    grid, patch = tasks.CANVAS // tasks.PATCH, tasks.PATCH
    image = data["image"].reshape(-1, grid, grid, patch, patch).swapaxes(2, 3).reshape(-1, 28, 28)
    ink = image > tasks.BACKGROUND + 0.1 * tasks.INK
    columns, rows = ink.any(axis=1), ink.any(axis=2)
    first = np.stack([columns.argmax(axis=1), rows.argmax(axis=1)], axis=1)
    last = 28 - np.stack([columns[:, ::-1].argmax(axis=1), rows[:, ::-1].argmax(axis=1)], axis=1)
    # bilinear interpolation spreads ink by one canvas pixel, and pixels are whole
    assert np.abs(np.concatenate([first, last], axis=1) - data["box"]).max() < 2


def test_no_digit_is_in_both_sets(monkeypatch):
    drawn = []
    monkeypatch.setattr(tasks, "_place", lambda digits, count, rng: drawn.append(digits))
    tasks.placed_digits.__wrapped__(1, 1)
    train, validation = ({digit.tobytes() for digit in digits} for digits in drawn)
    assert len(train) == 1347 and len(validation) == 450 and not train & validation


def test_digits_are_images_of_which_training_has_a_fifth_with_a_wrong_label(monkeypatch):
    task = made("digits")
    assert task.maximize and task.metric_name == "accuracy" and task.steps_per_epoch == 64
    for data, count in ((task.train, 1024), (task.validation, 773)):
        assert data["image"].shape == (count, 8, 8) and data["image"].dtype == np.float32
        assert data["digit"].shape == (count,) and set(data["digit"]) == set(range(10))
    monkeypatch.setattr(tasks, "MISLABELLED", 0.0)
    right = tasks.smudged_digits.__wrapped__(1024)
    assert (right[0]["digit"] != task.train["digit"]).sum() == round(0.2 * 1024)
    np.testing.assert_array_equal(right[1]["digit"], task.validation["digit"])
    ink, numbers = tasks._handwritten()
    monkeypatch.setattr(tasks, "SMUDGE", 0.0)
    train, validation = tasks.smudged_digits.__wrapped__(1024)
    both = [np.concatenate([train[name], validation[name]]) for name in ("image", "digit")]
    known = {(image.tobytes(), number) for image, number in zip(ink.astype(np.float32), numbers, strict=True)}
    assert {(image.tobytes(), number) for image, number in zip(*both, strict=True)} == known  # each once
    noise = task.train["image"] - train["image"]
    assert noise.std() == pytest.approx(0.15, rel=0.02) and abs(noise.mean()) < 0.01


def test_text_is_windows_of_prose():
    task = made("text")
    assert task.train.shape[1:] == task.validation.shape[1:] == (49,)
    assert task.train.dtype == np.uint8 and task.train.max() == len(tasks.ALPHABET) - 1
    assert 3500 < task.train_count < 6000 and task.validation_count == 256
    words = " ".join(in_words(task.train)).split()
    assert 0.04 < words.count("the") / len(words) < 0.1  # English, and no code
    follows = (task.train[1:, 0] == task.train[:-1, -1]).mean()
    assert follows > 0.98  # windows share one character, so that all are predicted; topics begin anew


def test_validation_text_is_not_in_training():
    train, validation = tasks.prose_windows(48)
    text = "".join(window[:48] for window in in_words(train))
    assert len(validation) > 400
    assert not [window for window in in_words(validation) if window[8:40] in text]


@each_factory
def test_data_are_the_same_every_time_and_built_once(name):
    source, arguments = {
        "localization": (tasks.placed_digits, (40, 8)),
        "digits": (tasks.smudged_digits, (40,)),
        "text": (tasks.prose_windows, (16,)),
    }[name]
    assert source(*arguments) is source(*arguments)
    jax.tree.map(np.testing.assert_array_equal, source(*arguments), source.__wrapped__(*arguments))


@each_factory
def test_docstring_states_the_number_of_parameters(name):
    assert f"({made(name).parameter_count:,} parameters)" in FACTORIES[name].__doc__


@pytest.mark.parametrize("evaluation_batch_size", [None, 16, 10])
def test_a_metric_may_count(evaluation_batch_size):
    x = jnp.arange(32.0)[:, None]

    def task(metric):
        return study.Task(
            lambda key: jnp.ones(1), lambda w, batch, key: jnp.mean(batch @ w), x, x, batch_size=4,
            metric=metric, evaluation_batch_size=evaluation_batch_size,
        )  # fmt: skip

    for metric in (
        lambda w, batch: jnp.sum(batch > 20),
        lambda w, batch: jnp.any(batch > 20),
        lambda w, b: 3,
    ):
        exact = task(lambda w, batch, metric=metric: jnp.float32(metric(w, batch)))
        found, wanted = (each.validation_metric(jnp.ones(1), None, x) for each in (task(metric), exact))
        assert found.dtype == jnp.float32 and found == wanted
    with pytest.raises(ValueError, match="metric must return a real scalar, got shape .* complex64"):
        task(lambda w, batch: jnp.complex64(1))


# ---- Models ----


def test_transformer_looks_back_and_never_ahead():
    model = tasks.CharacterTransformer(16, 2, 2, rngs=nnx.Rngs(0))
    codes = jax.random.randint(jax.random.key(1), (1, 12), 0, 32)
    logits = model(codes)
    for changed in (0, 5, 11):
        difference = np.abs(model(codes.at[0, changed].add(1) % 32) - logits)[0].max(axis=-1)
        assert (difference[:changed] == 0).all()
        assert (difference[changed:] > 0).all()


def test_rotated_products_depend_on_the_distance_alone():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    rotated = [tasks.rotate(jnp.broadcast_to(x, (1, 1, 10, 8)))[0, 0] for x in (query, key)]
    products = np.asarray(rotated[0] @ rotated[1].T)
    np.testing.assert_allclose(products[3:, 3:], products[:-3, :-3], atol=1e-5)
    assert np.ptp(products[:, 0]) > 0.1
    np.testing.assert_allclose(products[0, 0], jnp.sum(query * key), atol=1e-5)


@each_factory
def test_a_few_steps_improve_the_metric(name):
    # Guessing costs 5 bits, knowing how frequent characters are 4.2; the same box for all costs 3.7 pixels;
    # of ten digits one guess is right.
    task, before, after = {
        "localization": (made("localization"), (6, 16), (1, 3.5)),
        "digits": (made("digits"), (0.02, 0.25), (0.75, 0.97)),
        "text": (tasks.text(validation_count=32, layers=1), (4.9, 5.1), (3, 4.1)),
    }[name]
    params, model_state = task.start(jax.random.key(0))
    tx = ao.adam(1e-2)
    metric = jax.jit(task.validation_metric)

    @jax.jit
    def step(params, model_state, opt_state, batch):
        grad = jax.grad(task.training_loss, has_aux=True)
        gradient, model_state = grad(params, model_state, batch, jax.random.key(0))
        updates, opt_state = tx.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), model_state, opt_state

    assert before[0] < metric(params, model_state, task.validation) < before[1]
    opt_state, size = tx.init(params), task.batch_size
    for i in range(60):
        batch = jax.tree.map(lambda x, i=i: x[i * size : (i + 1) * size], task.train)
        params, model_state, opt_state = step(params, model_state, opt_state, batch)
    assert after[0] < metric(params, model_state, task.validation) < after[1]


# ---- Errors ----


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("localization", {"hidden": 0}, r"hidden must be .*\[1, inf\), got 0"),
        ("localization", {"train_count": 2.5}, "train_count must be an integer"),
        ("localization", {"train_count": 8}, r"batch_size must be .*\[1, 8\]"),
        ("digits", {"channels": 0}, r"channels must be .*\[1, inf\), got 0"),
        ("digits", {"train_count": 1298}, r"train_count must be .*\[1, 1297\].*500 images"),
        ("digits", {"train_count": 8}, r"batch_size must be .*\[1, 8\]"),
        ("text", {"context": 0}, "context must be "),
        ("text", {"width": 6, "heads": 2}, "width must be an even multiple of heads=2, got 6"),
    ],
)
def test_wrong_sizes_are_refused(name, sizes, message):
    with pytest.raises(ValueError, match=message):
        FACTORIES[name](**sizes)


def test_missing_packages_are_named_with_their_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"scikit-learn.*pip install 'adaptive-optax\[examples\]'"):
        tasks.localization(train_count=65)
    with pytest.raises(ImportError, match=r"scikit-learn.*pip install 'adaptive-optax\[examples\]'"):
        tasks.digits(train_count=65)
    monkeypatch.setitem(sys.modules, "flax", None)
    monkeypatch.delitem(sys.modules, "adaptive_optax.study.tasks")
    with pytest.raises(ImportError, match=r"Flax: pip install 'adaptive-optax\[flax\]'"):
        importlib.import_module("adaptive_optax.study.tasks")


# ---- The main job's answer ----


@functools.cache
def main_job():
    path = Path(__file__).parent.parent / "examples" / "should_i_decay.py"
    spec = importlib.util.spec_from_file_location("should_i_decay", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


UNSURE = None  # noise in which one per cent is lost


def comparison_of(effects):
    """A comparison in which each arm differs from the first by so much per cent."""
    noise = np.random.default_rng(0).normal(size=(2, len(effects), 10))
    rows = [
        {
            "arm": arm,
            "phase": phase,
            "learning_rate": 0.1,
            "seed": seed,
            "final_metric": 1
            + (noise[i, j, seed] * (0.1 if effect is not UNSURE else 3) + (effect or 0)) / 100,
            "initial_metric": 2.0,
            "diverged": False,
        }
        for i, phase in enumerate(("tuning", "verdict"))
        for j, (arm, effect) in enumerate(effects.items())
        for seed in range(10)
    ]
    details = Details(
        task="t", baseline=next(iter(effects)), arms=list(effects), steps=1, tuning_seeds=10, seeds=10,
        margin=None, looks=[10], best_rates=dict.fromkeys(effects, 0.1), on_edge={}, grid={}, grown={},
        seconds_per_step={}, devices=[], versions={}, command=[], metric_name="loss", dataset=Samples(1, 1),
        batch_size=1, parameters=1, seconds=0.0,
    )  # fmt: skip
    empty = np.zeros(0)
    return study.Comparison(pd.DataFrame(rows), *[empty] * 6, details)


@pytest.mark.parametrize(
    ("step", "exponential", "cycle", "averaged", "lead", "rest"),
    [
        (
            -5,
            -9,
            5,
            -8,
            "it depends on the decay",
            "compared with averaging the parameters exponential is better (-1.",
        ),
        (-5, 0, UNSURE, 5, "yes, with 0.8 every 9 steps", "one-cycle is undecided"),
        (
            -5,
            0,
            -7,
            -9,
            "yes, with 0.8 every 9 steps or one-cycle",
            "compared with averaging the parameters one-cycle is worse (+2.2 %",
        ),
        (0, 0, 0, 0, "it does not matter", "compared with averaging"),
        (
            UNSURE,
            5,
            5,
            -5,
            "these seeds cannot tell",
            "without decay averaging the parameters is better (-5.",
        ),
        (5, 9, 7, 0, "no", "0.8 every 9 steps is worse (+5."),
    ],
)
def test_answer_says_what_the_verdicts_say(step, exponential, cycle, averaged, lead, rest):
    names = [
        f"Adam, {name}" for name in ("constant", "0.8 every 9 steps", "exponential", "one-cycle", "averaged")
    ]
    effects = (0, step, exponential, cycle, averaged)
    sentence = main_job().answer(comparison_of(dict(zip(names, effects, strict=True))))
    assert sentence.startswith(f"Should I decay Adam's learning rate? On t, {lead}: ")
    assert rest in sentence and sentence.count(". ") == 0


def test_step_decay_of_the_main_job_falls_as_it_says():
    for name, steps, every, words in (
        ("localization", 2560, 320, "5 epochs"),
        ("digits", 800, 100, "100 steps"),
        ("text", 1000, 125, "125 steps"),
    ):
        arm = main_job().make_arms(made(name), name, steps)[f"Adam, 0.8 every {words}"]
        params = jnp.zeros(1)
        tx = arm(0.1, steps)
        state = tx.init(params)
        update = jax.jit(tx.update)
        rates = []
        for _ in range(every + 1):
            _, state = update(params, state, params)
            rates.append(float(ao.get_hyperparams(state)["learning_rate"]))
        np.testing.assert_allclose(rates, [0.1] * every + [0.08], rtol=1e-6)
