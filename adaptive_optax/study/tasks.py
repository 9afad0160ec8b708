"""Three small tasks for comparisons: find a digit in noise, read it, and continue Python's own manual.

A regression by dense layers, a classification by convolutions with batch normalisation, whose metric is the
accuracy, and a language model, a transformer. Nothing is downloaded: the digits come with scikit-learn, the
text with Python. The split of the data is fixed, so a seed determines only the initial weights and the order
of the batches. On the command line they are `adaptive_optax.study.tasks:localization`,
`adaptive_optax.study.tasks:digits` and `adaptive_optax.study.tasks:text`.
"""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_optax._core.checks import check_integer
from adaptive_optax.study.task import Task, nnx_task

try:
    from flax import nnx
except ImportError as _error:
    raise ImportError(
        "adaptive_optax.study.tasks needs Flax: pip install 'adaptive-optax[flax]'."
    ) from _error

# ---- Where is the digit? ----

CANVAS, PATCH = 28, 7  # pixels
DIGIT_SIDE = (8.0, 20.0)  # an 8 x 8 image is scaled to a side in this range, pixels
BACKGROUND, INK, NOISE = 64, 160, 24  # grey levels of 255; the noise is a standard deviation


class LocalizationNet(nnx.Module):
    """Embeds all patches with shared weights, then applies two dense layers; the output is in pixels.

    Args:
        width: Size of a patch's embedding.
        hidden: Units in the hidden layer.
        rngs: Random state for the initial weights.
    """

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.embed: nnx.Linear = nnx.Linear(PATCH**2, width, rngs=rngs)
        self.hidden: nnx.Linear = nnx.Linear((CANVAS // PATCH) ** 2 * width, hidden, rngs=rngs)
        self.box: nnx.Linear = nnx.Linear(hidden, 4, rngs=rngs)

    def __call__(self, patches: jax.Array) -> jax.Array:
        """Returns the boxes (left, top, right, bottom) for images [image, patch, pixel]."""
        x = (patches.astype(jnp.float32) - BACKGROUND) / INK
        x = nnx.relu(self.embed(x)).reshape(len(x), -1)
        return CANVAS / 2 * (1 + self.box(nnx.relu(self.hidden(x))))


def localization(
    *,
    train_count: int = 4096,
    validation_count: int = 1024,
    batch_size: int = 64,
    width: int = 16,
    hidden: int = 64,
) -> Task:
    """Makes the task of finding a handwritten digit on a noisy canvas: images in, boxes out.

    Scikit-learn's digits are placed at random positions and sizes, 8 to 20 pixels, on noisy canvases of
    28 x 28. A small nnx network (17,508 parameters) predicts the box around the ink. Loss and metric are the
    mean absolute error of the box's four sides in pixels; a constant answer scores 3.7. No digit appears in
    both training and validation images.

    Args:
        train_count: Training images.
        validation_count: Validation images.
        batch_size: Images per batch.
        width: Size of a patch's embedding.
        hidden: Units in the hidden layer.

    Raises:
        ImportError: If scikit-learn is missing; it is in the extra `examples`.
        ValueError: If a size is not positive, or a batch larger than the training data.
    """
    for name, value in (("width", width), ("hidden", hidden)):
        check_integer(name, value, "[1, inf)")

    def mean_absolute_error(model, batch):
        return jnp.mean(jnp.abs(model(batch["image"]) - batch["box"]))

    train, validation = placed_digits(train_count, validation_count)
    return nnx_task(
        lambda rngs: LocalizationNet(width, hidden, rngs=rngs),
        mean_absolute_error,
        train,
        validation,
        batch_size=batch_size,
        metric=mean_absolute_error,
        name="digit localization",
    )


@functools.cache
def placed_digits(train_count: int, validation_count: int) -> tuple[dict[str, np.ndarray], ...]:
    """Returns training and validation data as `{"image": uint8[n, patch, pixel], "box": float32[n, 4]}`."""
    check_integer("train_count", train_count, "[1, inf)")
    check_integer("validation_count", validation_count, "[1, inf)")
    ink, _ = _handwritten()
    rng = np.random.default_rng(0)
    digits = rng.permutation(ink)
    train, validation = np.split(digits, [len(digits) * 3 // 4])
    return _place(train, train_count, rng), _place(validation, validation_count, rng)


def _place(digits: np.ndarray, count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draws noisy canvases with one digit each, cut into patches, and the boxes around the ink."""
    chosen = digits[rng.integers(len(digits), size=count)]
    side = rng.uniform(*DIGIT_SIDE, size=(count, 1))
    corner = rng.uniform(size=(count, 2)) * (CANVAS - side)  # left, top

    def interpolation(start: np.ndarray) -> np.ndarray:
        """The bilinear weights of the digit's 8 columns (or rows) in the canvas's."""
        position = (np.arange(CANVAS) + 0.5 - start[:, None]) / side * 8 - 0.5
        return np.clip(1 - np.abs(position[:, :, None] - np.arange(8)), 0, None)

    image = interpolation(corner[:, 1]) @ chosen @ interpolation(corner[:, 0]).transpose(0, 2, 1)
    image = BACKGROUND + INK * image + NOISE * rng.standard_normal(image.shape)
    grid = CANVAS // PATCH
    patches = image.reshape(count, grid, PATCH, grid, PATCH).transpose(0, 1, 3, 2, 4)
    patches = np.clip(patches.reshape(count, grid**2, PATCH**2), 0, 255).astype(np.uint8)

    inked = np.stack([chosen.max(axis=1), chosen.max(axis=2)], axis=1) > 0.1  # columns, rows
    first, last = inked.argmax(axis=2), 8 - inked[:, :, ::-1].argmax(axis=2)
    boxes = np.tile(corner, 2) + np.concatenate([first, last], axis=1) * side / 8
    return {"image": patches, "box": boxes.astype(np.float32)}


def _handwritten() -> tuple[np.ndarray, np.ndarray]:
    """Returns scikit-learn's 1797 digits: ink in [0, 1], of 8 x 8 pixels, and the numbers from 0 to 9."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits of localization and digits come with scikit-learn: "
            "pip install 'adaptive-optax[examples]'."
        ) from error
    pixels, numbers = load_digits(return_X_y=True)
    return np.reshape(pixels, (-1, 8, 8)) / 16, np.asarray(numbers)


# ---- Which digit is it? ----

MOST_TRAINING = 1297  # of 1797 digits; at least 500 are for validation
SMUDGE = 0.15  # the noise of a pixel, a standard deviation, where ink is 1
MISLABELLED = 0.2  # of the training labels


class DigitNet(nnx.Module):
    """Two convolutions with batch normalisation, dropout, and a dense layer.

    Args:
        channels: Channels of the first convolution; the second has stride 2 and twice as many.
        rngs: Random state for the initial weights.
    """

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv_1: nnx.Conv = nnx.Conv(1, channels, (3, 3), use_bias=False, rngs=rngs)
        self.norm_1: nnx.BatchNorm = nnx.BatchNorm(channels, momentum=0.9, rngs=rngs)
        self.conv_2: nnx.Conv = nnx.Conv(channels, 2 * channels, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.norm_2: nnx.BatchNorm = nnx.BatchNorm(2 * channels, momentum=0.9, rngs=rngs)
        self.dropout: nnx.Dropout = nnx.Dropout(0.5, rngs=rngs)
        self.logits: nnx.Linear = nnx.Linear(4 * 4 * 2 * channels, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns the logits of the ten digits for images [image, row, column]."""
        x = nnx.relu(self.norm_1(self.conv_1(images[..., None])))
        x = nnx.relu(self.norm_2(self.conv_2(x)))
        return self.logits(self.dropout(x.reshape(len(x), -1)))


def digits(*, train_count: int = 1024, batch_size: int = 16, channels: int = 8) -> Task:
    """Makes the task of reading handwritten digits: noisy images in, one of ten classes out.

    Scikit-learn's digits of 8 x 8 pixels, smudged by noise. A small nnx network (3,842 parameters) with
    convolutions, batch normalisation and dropout is trained with cross-entropy on images of which a fifth
    have a wrong label. The metric is the accuracy on all other images, whose labels are right: higher is
    better, and guessing scores 0.1. Adam at a constant rate reaches 0.90 after 400 steps.

    Args:
        train_count: Training images, at most 1297 of 1797; the others are for validation.
        batch_size: Images per batch.
        channels: Channels of the first convolution.

    Raises:
        ImportError: If scikit-learn is missing; it is in the extra `examples`.
        ValueError: If a size is out of range, or a batch larger than the training data.
    """
    check_integer("channels", channels, "[1, inf)")

    def cross_entropy(model, batch):
        logits = model(batch["image"])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["digit"]))

    def accuracy(model, batch):
        return jnp.mean(jnp.argmax(model(batch["image"]), axis=-1) == batch["digit"])

    train, validation = smudged_digits(train_count)
    return nnx_task(
        lambda rngs: DigitNet(channels, rngs=rngs),
        cross_entropy,
        train,
        validation,
        batch_size=batch_size,
        metric=accuracy,
        maximize=True,
        name="digit classification",
    )


@functools.cache
def smudged_digits(train_count: int) -> tuple[dict[str, np.ndarray], ...]:
    """Returns training and validation data as `{"image": float32[n, 8, 8], "digit": int32[n]}`.

    A fifth of the training labels are wrong.
    """
    check_integer("train_count", train_count, f"[1, {MOST_TRAINING}]", "500 images are for validation")
    ink, numbers = _handwritten()
    rng = np.random.default_rng(0)
    order = rng.permutation(len(ink))
    images = (ink + SMUDGE * rng.standard_normal(ink.shape)).astype(np.float32)[order]
    labels = numbers.astype(np.int32)[order]
    wrong = rng.permutation(train_count)[: round(MISLABELLED * train_count)]
    labels[wrong] = (labels[wrong] + rng.integers(1, 10, size=len(wrong))) % 10
    sets = slice(train_count), slice(train_count, None)
    train, validation = ({"image": images[part], "digit": labels[part]} for part in sets)
    return train, validation


# ---- Which character comes next? ----

ALPHABET = " abcdefghijklmnopqrstuvwxyz.,()'"
VALIDATION_EVERY = 8  # every 8th topic, in alphabetical order, is for validation
ROTARY_BASE = 1000.0  # the longest wavelength, in characters / (2 pi)


def rotate(x: jax.Array) -> jax.Array:
    """Rotates pairs of features of x [window, head, position, feature] by angles that grow with the position.

    The product of a query and a key then depends only on their distance: rotary positions (Su et al. 2021).
    """
    positions, pairs = x.shape[-2], x.shape[-1] // 2
    angle = np.arange(positions)[:, None] * ROTARY_BASE ** (-np.arange(pairs) / pairs)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    a, b = x[..., :pairs], x[..., pairs:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class Block(nnx.Module):
    """Causal self-attention and a two-layer perceptron, each with layer norm first and a residual connection.

    Queries and keys are normalised (Henry et al. 2020): otherwise high learning rates freeze the attention.
    """

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.norm_1: nnx.LayerNorm = nnx.LayerNorm(width, use_bias=False, rngs=rngs)
        self.norm_2: nnx.LayerNorm = nnx.LayerNorm(width, use_bias=False, rngs=rngs)
        self.attend: nnx.Linear = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.unit: nnx.RMSNorm = nnx.RMSNorm(width // heads, use_scale=False, rngs=rngs)
        self.join: nnx.Linear = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.up: nnx.Linear = nnx.Linear(width, 4 * width, use_bias=False, rngs=rngs)
        self.down: nnx.Linear = nnx.Linear(4 * width, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [window, position, width] to the same."""
        query, key, value = (
            y.reshape(*x.shape[:2], self.heads, -1).swapaxes(1, 2)
            for y in jnp.split(self.attend(self.norm_1(x)), 3, axis=-1)
        )  # [window, head, position, feature]
        query, key = rotate(self.unit(query)), rotate(self.unit(key))
        scores = query @ key.swapaxes(2, 3) / math.sqrt(query.shape[-1])
        visible = np.tri(x.shape[1], dtype=bool)  # a position sees itself and earlier ones
        attention = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))
        x += self.join((attention @ value).swapaxes(1, 2).reshape(x.shape))
        return x + self.down(nnx.relu(self.up(self.norm_2(x))))


class CharacterTransformer(nnx.Module):
    """Predicts each next character of a window from the characters before it.

    Args:
        width: Size of the representation of a position, an even multiple of `heads`.
        layers: Blocks of attention and perceptron.
        heads: Attention heads.
        rngs: Random state for the initial weights.
    """

    def __init__(self, width: int, layers: int, heads: int, *, rngs: nnx.Rngs):
        initial = nnx.initializers.normal
        self.character: nnx.Embed = nnx.Embed(len(ALPHABET), width, embedding_init=initial(1.0), rngs=rngs)
        self.blocks: nnx.List[Block] = nnx.List([Block(width, heads, rngs=rngs) for _ in range(layers)])
        self.norm: nnx.LayerNorm = nnx.LayerNorm(width, use_bias=False, rngs=rngs)
        self.logits: nnx.Linear = nnx.Linear(
            width, len(ALPHABET), use_bias=False, kernel_init=initial(0.02), rngs=rngs
        )

    def __call__(self, codes: jax.Array) -> jax.Array:
        """Returns logits [window, position, character] for codes of `ALPHABET` [window, position]."""
        x = self.character(codes)
        for block in self.blocks:
            x = block(x)
        return self.logits(self.norm(x))


def text(
    *,
    context: int = 48,
    validation_count: int = 256,
    batch_size: int = 4,
    width: int = 48,
    layers: int = 2,
    heads: int = 2,
) -> Task:
    """Makes the task of predicting the next character of the prose in Python's own manual.

    The text is what `help()` prints about topics (`pydoc_data.topics` of the standard library): about 200,000
    characters without headings, tables, grammar and code, reduced to an alphabet of 32. A small nnx
    transformer (58,608 parameters) with causal attention, rotary positions and no dropout is trained with
    cross-entropy; the metric is cross-entropy in bits per character, on fixed windows. Uniform guessing costs
    5 bits, guessing by character frequency 4.2. Every eighth topic is for validation; paragraphs that share
    six consecutive words with these topics are excluded from training.

    The manual changes slightly between versions of Python, and so do the results.

    Args:
        context: Characters per window, the furthest that the model looks back.
        validation_count: At most this many validation windows, evenly spaced in the validation topics.
        batch_size: Windows per batch.
        width: Size of the representation of a position, an even multiple of `heads`.
        layers: Blocks of attention and perceptron.
        heads: Attention heads.

    Raises:
        ValueError: If a size is out of range.
    """
    sizes = {"context": context, "validation_count": validation_count, "layers": layers, "heads": heads}
    for name, value in sizes.items():
        check_integer(name, value, "[1, inf)")
    check_integer("width", width, "[1, inf)")
    if width % (2 * heads):
        raise ValueError(f"width must be an even multiple of heads={heads}, got {width}.")

    def cross_entropy(model, windows):
        codes = windows.astype(jnp.int32)
        logits = model(codes[:, :-1])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, codes[:, 1:]))

    def bits_per_character(model, windows):
        return cross_entropy(model, windows) / math.log(2)

    train, validation = prose_windows(context)
    spaced = np.linspace(0, len(validation) - 1, min(validation_count, len(validation))).astype(int)
    return nnx_task(
        lambda rngs: CharacterTransformer(width, layers, heads, rngs=rngs),
        cross_entropy,
        train,
        validation[spaced],
        batch_size=batch_size,
        metric=bits_per_character,
        name="character-level text",
    )


@functools.cache
def prose_windows(context: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the windows of training and validation topics: codes of `ALPHABET`, uint8[n, context + 1].

    Each window begins with the last character of the previous one, so that every character except a topic's
    first is predicted once.
    """
    from pydoc_data.topics import topics  # half a megabyte

    prose = {name: _prose(topics[name]) for name in sorted(topics)}
    validation = list(prose)[::VALIDATION_EVERY]
    seen = {phrase for name in validation for paragraph in prose[name] for phrase in _phrases(paragraph)}
    windows: dict[bool, list[np.ndarray]] = {True: [], False: []}
    used: set[str] = set()
    for name, paragraphs in prose.items():  # topics quote each other, so paragraphs recur
        new = [p for p in paragraphs if p not in used and (name in validation or not _phrases(p) & seen)]
        used.update(new)
        codes = np.array([ALPHABET.index(character) for character in " ".join(new)], np.uint8)
        starts = np.arange(0, len(codes) - context, context)
        windows[name in validation].append(codes[starts[:, None] + np.arange(context + 1)])
    return np.concatenate(windows[False]), np.concatenate(windows[True])


def _phrases(paragraph: str) -> set[tuple[str, ...]]:
    """Returns all sequences of six consecutive words, or of all words if there are fewer."""
    words = paragraph.split()
    return {tuple(words[i : i + 6]) for i in range(max(len(words) - 5, 1))}


def _prose(topic: str) -> list[str]:
    """Returns a topic's paragraphs of prose, in the characters of `ALPHABET`."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", topic):
        paragraph = " ".join(block.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").split())
        letters = sum(character.isalpha() or character == " " for character in paragraph)
        underlined = "***" in paragraph or "===" in paragraph or "---" in paragraph
        if len(paragraph) >= 60 and letters >= 0.88 * len(paragraph) and not underlined:
            allowed = (character if character in ALPHABET else " " for character in paragraph)
            paragraphs.append(" ".join("".join(allowed).split()))
    return paragraphs
