"""Random trees, values and dtypes through 23 chains: nothing turns non-finite in silence, nothing drifts.

`pytest tests/test_random_chains.py -n 2 --random-examples 50000` draws shapes and dtypes as well. Compiling
is what costs, so an example draws its tree from a pool: a dozen fixed trees, then, where a chain has more
than a few hundred examples, a tree with random shapes and dtypes for every ten of them.
"""

import dataclasses
import functools
import inspect
import math
import typing
from collections.abc import Callable
from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import given, on_a_slope
from compiling import AS_IN_USE, QUICKLY

import adaptive_optax as ao

STEPS = 3
FIXED_ALONE = 200  # examples of a chain up to which the fixed trees suffice
EXAMPLES_A_TREE = 10

SIZES = (0, 1, 2, 3, 64, 65, 300)
LARGEST_LEAF = 4096
DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64")

# The documented range of a gradient's coordinates: its square and a few sums of squares fit in float32.
TOP, TOP_SHARED = 1e18, 1e15


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Shape and dtype of a parameter, and the dtype of its gradient where that is another."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    gradient: str = ""

    @property
    def gradient_dtype(self) -> str:
        return self.gradient or self.dtype


class Tree:
    """Some leaves; `x64` runs them with 64-bit types enabled, which float64 needs."""

    def __init__(self, *leaves: Leaf, x64: bool = False):
        self.leaves = leaves
        self.x64 = x64 or any("float64" in (leaf.dtype, leaf.gradient_dtype) for leaf in leaves)

    def __repr__(self) -> str:
        return f"Tree({', '.join(map(repr, self.leaves))}, x64={self.x64})"

    def filled(self, values: list[np.ndarray], *, gradients: bool = False) -> Any:
        """The leaves at two depths, beside a None and a MaskedNode."""
        dtypes = (leaf.gradient_dtype if gradients else leaf.dtype for leaf in self.leaves)
        arrays = [jnp.asarray(x.astype(jnp.dtype(d))) for x, d in zip(values, dtypes, strict=True)]
        named = {f"leaf_{i}": x for i, x in enumerate(arrays[1:])}
        return {"first": {"kernel": arrays[0]} if arrays else {}, "none": None, "rest": named}


# The simplest first: an example shrinks towards it. Every dtype, alone and mixed; empty leaves and a scalar;
# blocks of 64 that fill the last axis, do not, and are several; gradients in another dtype.
FIXED_TREES = [
    Tree(Leaf(())),
    Tree(Leaf((3,)), Leaf((2, 65))),
    Tree(Leaf((3,), "float16"), Leaf((64,), "float16")),
    Tree(Leaf((2,), "bfloat16"), Leaf((2, 65), "bfloat16")),
    Tree(Leaf((3,), "float64"), Leaf((64,), "float64")),
    Tree(Leaf((2, 3), "complex64"), Leaf((65,), "complex64")),
    Tree(Leaf((0,)), Leaf((0, 64), "bfloat16"), Leaf((3, 0), "complex64")),
    Tree(Leaf((1, 300)), Leaf((), "bfloat16"), x64=True),
    Tree(Leaf((3,), "float16"), Leaf((2, 64), "bfloat16"), Leaf(()), Leaf((1,), "complex64")),
    Tree(Leaf((64,), "float16"), Leaf((2, 65), "float64"), Leaf((0, 2)), Leaf((), "bfloat16")),
    Tree(Leaf((2, 1, 65), "bfloat16", "float32"), Leaf((3,), "float32", "float16")),
    Tree(),
]


def random_tree(rng: np.random.Generator) -> Tree:
    """One to four leaves of zero to three dimensions; of every fourth the gradient has another dtype."""

    def leaf():
        shape = (LARGEST_LEAF + 1,)
        while math.prod(shape) > LARGEST_LEAF:
            shape = tuple(int(n) for n in rng.choice(SIZES, rng.integers(0, 4)))
        dtype = str(rng.choice(DTYPES))
        # Not where a parameter could not hold a step as large as its gradient.
        gradient = str(rng.choice(DTYPES[:3])) if dtype in DTYPES[1:4] and rng.random() < 0.25 else dtype
        return Leaf(shape, dtype, gradient)

    return Tree(*(leaf() for _ in range(rng.integers(1, 5))))


@dataclasses.dataclass(frozen=True)
class Chain:
    """A transformation that is built anew for every tree.

    Attributes:
        name: Test id.
        make: Builds it.
        shares: Whether coordinates share a moment.
        rejects: Whether it is a `reject_nonfinite`, around or in which there may be a `verified`.
        leaps: Whether a step from a gradient within the range may be too large for a float16 parameter.
        verified: Whether it checks values, which needs `chex.chexify`.
        frozen: Whether it freezes the leaves under "first".
    """

    name: str
    make: Callable[[], optax.GradientTransformation]
    shares: bool = False
    rejects: bool = False
    leaps: bool = False
    verified: bool = False
    frozen: bool = False

    @property
    def top(self) -> float:
        return TOP_SHARED if self.shares else TOP

    def trained(self, tree: Any) -> Any:
        """The part of a tree of parameters, gradients or updates that the chain trains."""
        return tree | {"first": {}} if self.frozen else tree


INT8 = ao.Int8(block_size=64, min_size=1)  # on leaves as small as these
ONE_CYCLE = ao.one_cycle(0.1, total_steps=4)
LAYOUT = {pattern: role for pattern, role in ao.FLAX_LAYOUT.items() if role != "query_key"}


def by_depth(path: str, leaf: Any) -> int:
    return path.count("/")


def only_first(params: Any) -> Any:
    return {name: name == "first" for name in params}


CHAINS = [
    Chain("adam, telemetry", lambda: ao.telemetry(ao.adam(0.1), every=2, per="tensor")),
    Chain(
        "adam without eps, nesterov, moving b1",
        lambda: optax.chain(
            ao.scale_by_adam(ONE_CYCLE.momentum, eps=0.0, nesterov=True, mu_dtype=jnp.bfloat16),
            ao.scale_by_learning_rate(ONE_CYCLE.learning_rate),
        ),
    ),
    Chain(
        "clipping, TensorFlow's adam by axis, amsgrad",
        lambda: optax.chain(
            ao.clip_by_global_norm(1.0),
            ao.adam(
                ao.inverse_sqrt(0.1, warmup_steps=2),
                eps_form="tensorflow",
                amsgrad=True,
                granularity=ao.Axis(-1),
                nu_storage="bfloat16",
            ),
        ),
        shares=True,
    ),
    Chain(
        "adamw by label, 8-bit mu",
        lambda: ao.adamw(
            ao.exponential_decay(0.1, 2, 0.5), eps=0.0, mu_storage=INT8, granularity=ao.Labels(by_depth)
        ),
        shares=True,
    ),
    Chain(
        "adamw coupled to the schedule, a tensor, bfloat16",
        lambda: ao.adamw(
            0.1,
            decay_coupling="schedule",
            decay_schedule=ao.warmup_cosine(1.0, total_steps=4, warmup_steps=1),
            granularity="tensor",
            mu_storage="bfloat16",
            nu_storage="bfloat16",
        ),
        shares=True,
    ),
    Chain(
        "Adam-mini in 8-bit",
        lambda: ao.adam_mini(0.1, LAYOUT, mu_storage=INT8, nu_storage=INT8),
        shares=True,
    ),
    Chain(
        "groups by path: adamw coupled to nothing in 8-bit, rms by path, telemetry",
        lambda: ao.telemetry(
            ao.partition_by_path(
                {
                    "first|none": ao.adamw(
                        0.1, decay_coupling="independent", mu_storage=INT8, nu_storage=INT8, eps=0.0
                    )
                },
                default=ao.rmsprop(0.1, granularity=ao.ByPath({"1$": "tensor"}, ao.Axis(-1), strict=False)),
            )
        ),
        shares=True,
    ),
    Chain(
        "adam by axis, 8-bit, amsgrad, uncorrected",
        lambda: ao.adam(
            ao.warmup_stable_decay(0.1, total_steps=4, warmup_steps=1, decay_steps=1),
            amsgrad=True,
            bias_correction=False,
            granularity=ao.Axis(-2, reduce="sum"),
            mu_storage=INT8,
            nu_storage=INT8,
        ),
        shares=True,
    ),
    Chain(
        "rmsprop without eps, momentum, a plateau",
        lambda: optax.chain(
            ao.rmsprop(ao.cyclical(0.01, 0.1, 2), eps=0.0, momentum=0.9, nesterov=True),
            given(ao.reduce_on_plateau(0.5, patience=1), value=1.0),
        ),
    ),
    Chain(
        "centred rms, bfloat16 to nearest",
        lambda: optax.chain(
            ao.scale_by_rms(
                centered=True, bias_correction=True, eps_in_sqrt=False, storage=ao.BFloat16("nearest")
            ),
            ao.scale_by_learning_rate(ao.step_decay(0.1, 0.8, 2)),
            ao.average_parameters(),
        ),
    ),
    Chain(
        "centred rms by label, 8-bit, without eps",
        lambda: optax.chain(
            ao.scale_by_rms(eps=0.0, centered=True, granularity=ao.Labels(by_depth, "sum"), storage=INT8),
            ao.scale_by_learning_rate(0.1),
        ),
        shares=True,
    ),
    Chain(
        "global rms, weight decay",
        lambda: optax.chain(
            ao.scale_by_global_rms(eps=0.0, initial_scale=1.0),
            ao.add_decoupled_weight_decay(0.1),
            ao.scale_by_learning_rate(ao.per_epoch(ao.step_decay(0.1, 0.5, 1), steps_per_epoch=2)),
        ),
        shares=True,
    ),
    Chain(
        "rms in Adam-mini's blocks, sgd, momentum in bfloat16, stochastic rounding",
        lambda: optax.chain(
            ao.scale_by_rms(eps=0.0, granularity=ao.AdamMiniBlocks(LAYOUT)),
            ao.sgd(0.1, momentum=0.9, accumulator_dtype=jnp.bfloat16),
            ao.stochastic_rounding(),
        ),
    ),
    Chain("adamw, Kahan summation", lambda: ao.kahan_summation(ao.adamw(0.1, b2=0.99, eps=0.0))),
    Chain(
        "adam in 8-bit, master weights",
        lambda: ao.master_weights(ao.adam(0.1, mu_storage="bfloat16", nu_storage=INT8)),
    ),
    Chain(
        "adam, accumulating, rejecting",
        lambda: ao.reject_nonfinite(ao.telemetry(ao.accumulate_gradients(ao.adam(0.1, eps=0.0), every=2))),
        shares=True,  # the squares for the noise scale
        rejects=True,
    ),
    Chain(
        "hyperparameters in the state, rejecting",
        lambda: ao.reject_nonfinite(
            ao.inject_hyperparams(ao.adamw)(
                ONE_CYCLE.learning_rate, b1=ONE_CYCLE.momentum, mu_storage=INT8, nu_storage="bfloat16"
            )
        ),
        rejects=True,
    ),
    Chain(
        "momentum, rejecting",
        lambda: ao.reject_nonfinite(optax.chain(ao.trace(0.9, nesterov=True), ao.sgd(1.0))),
        rejects=True,
        leaps=True,
    ),
    Chain(
        "adgd, rejecting",
        lambda: ao.reject_nonfinite(optax.chain(ao.clip_by_global_norm(1e12), ao.adgd())),
        shares=True,
        rejects=True,
        leaps=True,
    ),
    Chain("adgd, rejecting all that leaps", lambda: ao.reject_nonfinite(ao.adgd()), rejects=True, leaps=True),
    Chain(
        "error control, rejecting",
        lambda: ao.reject_nonfinite(on_a_slope(ao.error_controlled(ao.scale_by_adam(eps=0.0), 0.1))),
        rejects=True,
    ),
    Chain(
        "centred rms in 8-bit, Kahan summation, rejecting",
        lambda: ao.reject_nonfinite(
            ao.kahan_summation(ao.rmsprop(0.1, eps=0.0, centered=True, momentum=0.9, storage=INT8))
        ),
        rejects=True,
    ),
    Chain(
        "global rms, master weights, average, rejecting",
        lambda: ao.reject_nonfinite(
            optax.chain(ao.master_weights(ao.global_rmsprop(0.1, momentum=0.9)), ao.average_parameters())
        ),
        shares=True,
        rejects=True,
    ),
    Chain(
        "verified, clipping, adam in 8-bit, rejecting",
        lambda: ao.verified(
            ao.reject_nonfinite(
                optax.chain(
                    ao.clip_by_global_norm(1.0),
                    ao.adam(0.1, mu_storage=INT8, nu_storage=INT8),
                    ao.stochastic_rounding(),
                )
            )
        ),
        rejects=True,
        verified=True,
    ),
    Chain(
        "frozen leaves, clipping, adam by tensor",
        lambda: ao.freeze(
            optax.chain(ao.clip_by_global_norm(1.0), ao.adam(0.1, granularity="tensor")), only_first
        ),
        shares=True,
        frozen=True,
    ),
    Chain(
        "loss scale, frozen leaves, adam in 8-bit",
        lambda: ao.dynamic_loss_scale(
            ao.freeze(ao.adam(0.1, eps=0.0, mu_storage=INT8, nu_storage=INT8), only_first), init_scale=1.0
        ),
        rejects=True,
    ),
]


def signed(rng, magnitudes):
    return magnitudes * rng.choice([-1.0, 1.0], magnitudes.shape)


def log_uniform(rng, shape, low, high):
    return signed(rng, np.exp(rng.uniform(math.log(low), math.log(high), shape)))


def with_one(rng, array, value):
    if array.size:
        array.flat[rng.integers(array.size)] = value
    return array


def everything(rng, shape, limits, top):
    some = (0.0, limits.smallest_subnormal, limits.tiny, 1e-18, 1.0, top, limits.max, np.inf, np.nan)
    return signed(rng, rng.choice(np.array(some, float), shape))


def up_to_the_top(rng, shape, limits, top):
    return signed(rng, np.full(shape, min(top, float(limits.max))))


def subnormal(rng, shape, limits, top):
    smallest, tiny = float(limits.smallest_subnormal), float(limits.tiny)
    return signed(rng, rng.integers(0, 1 + round(tiny / smallest), shape) * smallest)


# Kinds of values: float64 from a generator, a shape, the limits of the dtype and the documented range.
# Those within the range first, the plainest first of all.
CALM = {
    "ones": lambda rng, shape, limits, top: np.ones(shape),
    "zeros": lambda rng, shape, limits, top: signed(rng, np.zeros(shape)),
    "normal": lambda rng, shape, limits, top: rng.normal(size=shape),
    "sparse": lambda rng, shape, limits, top: rng.normal(size=shape) * (rng.random(shape) < 0.2),
    "tiny": lambda rng, shape, limits, top: log_uniform(rng, shape, 1e-30, 1e-15),
    "subnormal": subnormal,
    "top": up_to_the_top,
    "tiny to top": lambda rng, shape, limits, top: log_uniform(rng, shape, 1e-30, top),
    "a spike": lambda rng, shape, limits, top: with_one(
        rng, log_uniform(rng, shape, 1e-30, 1e-15), min(top, float(limits.max))
    ),
}
WILD = {
    "huge": lambda rng, shape, limits, top: log_uniform(rng, shape, 1.0, float(limits.max) * 0.99),
    "largest": lambda rng, shape, limits, top: signed(rng, np.full(shape, float(limits.max))),
    "one nan": lambda rng, shape, limits, top: with_one(rng, rng.normal(size=shape), np.nan),
    "one inf": lambda rng, shape, limits, top: with_one(rng, rng.normal(size=shape), np.inf),
    "everything": everything,
}
GRADIENTS = CALM | WILD
STARTS = {name: GRADIENTS[name] for name in ("ones", "zeros", "normal", "subnormal")}


@dataclasses.dataclass(frozen=True)
class Example:
    """A tree, the kinds of its parameters and, step by step, of its gradients, a kind a leaf."""

    tree: Tree
    start: tuple[str, ...]
    steps: tuple[tuple[str, ...], ...]
    seed: int

    def values(self, top: float) -> tuple[Any, list[Any]]:
        """The parameters and the gradients."""
        rng = np.random.default_rng(self.seed)

        def drawn(kinds, gradients):
            arrays = []
            for kind, leaf in zip(kinds, self.tree.leaves, strict=True):
                dtype = leaf.gradient_dtype if gradients else leaf.dtype
                parts = [
                    GRADIENTS[kind](rng, leaf.shape, jnp.finfo(dtype), top)
                    for _ in range(2 if dtype.startswith("complex") else 1)
                ]
                arrays.append(parts[0] if len(parts) == 1 else joined(*parts))
            return self.tree.filled(arrays, gradients=gradients)

        with np.errstate(over="ignore", under="ignore"):
            return drawn(self.start, False), [drawn(kinds, True) for kinds in self.steps]


def joined(real, imag):
    """The complex numbers with these parts, which `real + 1j * imag` is not where one is not finite."""
    result = np.empty(real.shape, np.complex128)
    result.real, result.imag = real, imag
    return result


@st.composite
def examples(draw, trees: list[Tree], chain: Chain) -> Example:
    tree = draw(st.sampled_from(trees))
    kinds = st.sampled_from(list(GRADIENTS if draw(st.booleans()) else CALM))
    # At the end of a float's range only a step that may be rejected stays in it.
    starts = st.sampled_from([*STARTS, "largest"] if chain.rejects else list(STARTS))
    n = len(tree.leaves)
    return Example(
        tree,
        draw(st.tuples(*[starts] * n)),
        draw(st.tuples(*[st.tuples(*[kinds] * n)] * STEPS)),
        draw(st.integers(0, 2**32 - 1)),
    )


class Compiled:
    """The jitted init and step of a chain; one is made for each tree.

    Without --optimize five of six are compiled quickly: what is looked for is seldom the compiler's.
    """

    def __init__(self, chain: Chain, as_users_do: bool):
        tx = chain.make()
        self.traces = 0

        def step(gradients, state, params):
            self.traces += 1
            updates, state = tx.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            return updates, state, params, ao.averaged_parameters(params, state)

        self.init = jax.jit(tx.init, compiler_options=QUICKLY)
        if chain.verified:  # has no such option
            self.step = chex.chexify(jax.jit(step), async_check=False)
        else:
            self.step = jax.jit(step, compiler_options=AS_IN_USE if as_users_do else QUICKLY)


def layout(tree: Any) -> Any:
    """The structure of a tree, and shape, dtype and weak type of every leaf."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(x.shape, x.dtype, x.weak_type) for x in leaves]


def paths_and_values(tree: Any) -> list[tuple[str, np.ndarray]]:
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    return [(jax.tree_util.keystr(path), np.asarray(x)) for path, x in leaves]


def not_finite(tree: Any) -> list[str]:
    return [path for path, x in paths_and_values(tree) if not np.isfinite(x).all()]


def within_range(gradients: Any, top: float) -> bool:
    top *= 1 + 2**-7  # rounded to bfloat16

    values = [x.astype(np.complex128) for _, x in paths_and_values(gradients)]
    # False for NaN, and part by part, so that no magnitude overflows.
    return all((np.abs(part) <= top).all() for x in values for part in (x.real, x.imag))


def run(chain: Chain, compiled: Compiled, example: Example) -> None:
    """Takes the steps of an example, and checks each."""
    params, sequence = example.values(chain.top)
    state = compiled.init(params)
    expected = layout(state), layout(params)
    assert not any(weak for _, _, weak in expected[0][1]), "init: a weak type in the state"
    calm = "largest" not in example.start
    for t, gradients in enumerate(sequence):
        before = state, params
        updates, state, params, averaged = compiled.step(gradients, state, params)
        where = f"{chain.name}, step {t}, gradients {example.steps[t]}"

        # Nothing drifts.
        assert layout(state) == expected[0], f"{where}: the state changed its layout"
        assert layout(params) == layout(averaged) == expected[1], f"{where}: the parameters did"
        for (path, u), (_, g) in zip(paths_and_values(updates), paths_and_values(gradients), strict=True):
            assert u.shape == g.shape and u.dtype == np.promote_types(u.dtype, np.float32), f"{where}: {path}"
            # A bad gradient shows, if it does not cost the step.
            hidden = chain.frozen and "first" in path
            assert not hidden or not u.any(), f"{where}: moves {path}"
            assert hidden or chain.rejects or not np.isfinite(u[~np.isfinite(g)]).any(), (
                f"{where}: hides {path}"
            )

        # Nothing turns non-finite, but by gradients that are too large.
        calm = calm and within_range(chain.trained(gradients), chain.top)
        if calm or chain.rejects:
            bad = not_finite({"u": updates, "state": state, "params": params, "averaged": averaged})
            assert not bad, f"{where}: not finite: {bad}"
        if chain.rejects:
            rejections, earlier = ao.get_rejections(state), ao.get_rejections(before[0])
            assert not calm or chain.leaps or rejections.total == 0, f"{where}: rejected"
            if not_finite(gradients):
                assert rejections.total == earlier.total + 1, f"{where}: not rejected"
            if rejections.total > earlier.total:
                assert_same((state, params), before, where)
                assert not any(u.any() for _, u in paths_and_values(updates)), f"{where}: moves"
    assert compiled.traces == 1


# The counters, and what a rejection is to change.
MOVE_AT_A_REJECTION = (".total", ".in_a_row", ".scale", ".fin_steps")


def assert_same(actual: Any, expected: Any, where: str) -> None:
    for (path, x), (_, y) in zip(paths_and_values(actual), paths_and_values(expected), strict=True):
        if path.endswith(MOVE_AT_A_REJECTION):
            continue
        # The sum of a subnormal number and 0 is 0 on some devices; of a complex number both parts may be.
        moved = np.abs(x.astype(np.complex128) - y.astype(np.complex128)) > 2 * np.finfo(np.float32).tiny
        assert not moved.any(), f"{where}: rejected, but {path} changed"


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain.name.replace(" ", "_"))
def test_nothing_turns_nonfinite_in_silence_and_nothing_drifts(chain, random_examples, request):
    count = max(1, random_examples // len(CHAINS))
    rng = np.random.default_rng(CHAINS.index(chain))
    more = count // EXAMPLES_A_TREE if count > FIXED_ALONE else 0
    trees = FIXED_TREES + [random_tree(rng) for _ in range(more)]
    optimize = request.config.getoption("--optimize")

    @functools.cache
    def compiled(tree):
        # A third of the trees, others for every chain.
        return Compiled(chain, optimize or (trees.index(tree) + CHAINS.index(chain)) % 3 == 0)

    @hypothesis.settings(max_examples=count)
    @hypothesis.given(examples(trees, chain))
    def check(example):
        with jax.enable_x64(example.tree.x64):
            run(chain, compiled(example.tree), example)

    check()
    if more:
        jax.clear_caches()  # else JAX keeps the programs of all chains, gigabytes


def test_the_chains_have_every_public_factory_granularity_and_schedule():
    def builds(value):
        returned = typing.get_type_hints(value).get("return") if inspect.isfunction(value) else None
        return inspect.isclass(returned) and issubclass(returned, optax.GradientTransformation)

    factories = {name for name, value in vars(ao).items() if builds(value)}
    granularities = {cls.__name__ for cls in ao.Granularity.__subclasses__() if hasattr(ao, cls.__name__)}
    used = {name for chain in CHAINS for name in named_in(chain.make.__code__)}
    # Its updates are as narrow as the parameters, where every chain is checked for wide ones.
    assert factories - {"match_parameter_dtype"} <= used
    assert granularities - {"Coordinate", "Tensor", "Global"} <= used  # these go by a string


def named_in(code: Any) -> set[str]:
    inner = (named_in(c) for c in code.co_consts if inspect.iscode(c))
    return set(code.co_names).union(*inner)
