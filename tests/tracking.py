r"""How far a thousand steps in low precision may be from those in float32, derived (contract 9).

The runs are open loop: they are given the same gradients, independent and normal, and the parameters stand
still. Nothing is fed back, so a rounding does what the equations say and chaos has no part. Compared are the
updates u and u' of two runs, as

    D = RMS(u' - u) / RMS(u)    over the steps and the coordinates of a leaf.

**bfloat16 gradients.** g' = g + d with |d| <= U |g|, U = 2^-8, to nearest. d is an odd function of g, so the
d of different steps and coordinates are independent and of mean 0, as the g are.

* What is linear in the gradients, plus a constant (momentum, first moments, means, weight decay), is off by
  sum_j h_j d_j where it is sum_j h_j g_j. Given |g|, the signs being independent, the mean of its square is
  sum_j h_j^2 d_j^2 <= U^2 sum_j h_j^2 g_j^2, the same of the gradients: a relative RMS of U at most.
* The divisors (roots of mean squares, about a moving mean too, the largest of such, norms) are seminorms N of
  the sequence of gradients: |N(g') - N(g)| <= N(d) <= U N(g); where N is about a mean, by the means of the
  squares, as above.

A quotient of the two is off by U + U at most, over the divisor's 1 - U: `GRADIENTS`. It is a worst case: the
distance to the nearest number is uniform, so that the RMS of d is 0.35 U and D comes to about 0.4 U.

**Arithmetic.** Once they are rounded, gradients in bfloat16 have to do exactly what the same numbers do in
float32. A moving average keeps what rounding errors the last 1 / (1 - b) steps made, 2^-24 each at most:
`ARITHMETIC`, for two runs with b = 0.999. A single operation in bfloat16 is ten times that. An
`error_controlled` rate follows the error of a step, a small difference of losses: `PROBED` times as much for
four binary digits that cancel in it.

**State.** A kept average x_t = b x_{t-1} + (1 - b) s_t is rounded at every step.

* To nearest, by U |x| at most: U / (1 - b) of x in all.
* Stochastically, between neighbours at a distance of `gap` x, the errors have mean 0 given the past (they are
  martingale differences), so the means of their squares add up: sum_j b^2j Var_{t-j}. A single one has
  Var <= gap^2 x^2 / 4, wherever x is between the neighbours: gap^2 / 4 / (1 - b^2) in all. (x grows until it
  is an average, so that older errors are of smaller values.)
* A stored value is one of the format's: a step away from it by s is rounded up or down with Var <= s gap x.
  For a second moment, whose gradients are normal with variance 1, s = (1 - b) E|q - v| <= 1 - b, as E|q - v|
  is convex in v, 1 at v = 0 and 0.97 at v = 1, and pooling makes it less (Jensen). v is 1 - b^t at step t, so
  with sum_j b^2j = (1 - b^2t) / (1 - b^2) the relative variance is gap (1 + b^t) / (1 + b) at most. It is
  counted from step `START` on. In int8 the lattice moves with its scale too, which the largest value of a
  block sets: twice that. (Antithetic numbers only make it less.)

For bfloat16 gap = 2^-7. Int8's first moments are dithered: the variance is gap^2 / 12. Of normal values the
largest in a block of n is sqrt(2 log 2n) times their RMS at most (in expectation), the curvature at most 4
octaves, and 127 codes for them are at most 4/127 16/15 of the largest apart. Its second moments at step
`START` are within two octaves (of chi-squared with 100 degrees of freedom, the largest of 64 over the
smallest), so with the quarter of an octave above them 254 codes are at most 2.25 / 254 apart, of the value.

Adam's m / sqrt(v) with relative errors e and f is off by (1 + e) / sqrt(1 - f) - 1 at most. In centred
RMSprop m enters through delta = g - m: (1 - b) 2 delta e is another error of mean 0 in every step, which adds
4 ((1 - b) / (1 + b))^2 of the first moment's relative variance to that of the second. A floor under v changes
nothing: a maximum is not further off than the further of its two arguments.

**The largest so far.** `amsgrad` divides by the root of the largest v. The largest of perturbed values is off
by the largest perturbation at most, whose RMS is at most twice that of the last one (Doob's inequality, for
martingales). Kept as it is, the largest v stands on a value of the format and is not rounded again.

**Certainty.** These are expectations of squares, but for what is rounded to nearest. The RMS of N independent
errors is at most 1 + 3 / sqrt(2 N) times what is expected, but for what is three standard deviations off; N
is the number of values that are kept. The random bits are a hash: what passes once passes always.
"""

import functools
import inspect
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from cases import INT8, Case
from compiling import QUICKLY

import adaptive_optax as ao
from adaptive_optax._core.paths import paths_and_leaves
from adaptive_optax.moments.bfloat16 import BFloat16
from adaptive_optax.moments.formats import as_storage
from adaptive_optax.moments.int8 import Int8
from adaptive_optax.moments.storage import as_nearest

STEPS, START = 1000, 100
SHAPES = {"bias": (3,), "kernel": (4, 64)}
SCALES = {"bias": 1e-2, "kernel": 1.0}

U = 2.0**-8
GRADIENTS = 2 * U / (1 - U)
ARITHMETIC = 2 * 2.0**-24 / (1 - 0.999)
PROBED = 2**4

# The arguments that say how a moment is kept, with the values for float32.
_FORMATS = {"mu_storage": "float32", "nu_storage": "float32", "storage": "float32"}
_FORMATS |= {"mu_dtype": None, "accumulator_dtype": None}
_STORAGES = ("mu_storage", "nu_storage", "storage")


class Run(NamedTuple):
    """One of the runs that are compared.

    Attributes:
        name: What is in low precision.
        formats: Arguments of the factory.
        gradients: "float32", "bfloat16", or "rounded": the values of bfloat16 in float32.
        reference: The run that it has to track, by name.
        allowed: The largest D, by leaf.
        start: The step from which on it is counted.
    """

    name: str
    formats: dict
    gradients: str
    reference: str
    allowed: dict
    start: int = 0


def runs_of(case: Case) -> list[Run]:
    """The runs of a case; the first is the one in float32, which tracks itself."""
    own = {name: value for name, value in case.arguments.items() if name in _FORMATS}
    plain = {name: _FORMATS[name] for name in own}
    runs = [Run("float32", plain, "float32", "float32", dict.fromkeys(SHAPES, 0.0))]

    def add(name, formats, gradients, reference, allowed, start=0):
        runs.append(Run(name, formats, gradients, reference, allowed, start))

    if own:
        allowed = _by_leaf(case, own)
        add("its own state", own, "float32", "float32", allowed, START)
        both = {leaf: (1 + x) * (1 + GRADIENTS) - 1 for leaf, x in allowed.items()}
        add("its own state and bfloat16 gradients", own, "bfloat16", "float32", both, START)
        return runs
    rounded = "float32 gradients with the values of bfloat16"
    add(rounded, {}, "rounded", "float32", dict.fromkeys(SHAPES, GRADIENTS))
    arithmetic = ARITHMETIC * (PROBED if case.factory == "error_controlled" else 1)
    add("bfloat16 gradients", {}, "bfloat16", rounded, dict.fromkeys(SHAPES, arithmetic))
    takes = [name for name in _STORAGES if name in _parameters(case)]
    if takes:
        for name, storage in (("bfloat16", BFloat16()), ("int8", INT8)):
            formats = dict.fromkeys(takes, storage)
            add(f"{name} state", formats, "float32", "float32", _by_leaf(case, formats), START)
    return runs


def distances(case: Case, runs: list[Run]) -> dict[str, dict[str, float]]:
    """D of each run, by leaf. All runs are one program, a scan over the steps."""
    rng = np.random.default_rng(0)
    noise = {leaf: rng.normal(size=(STEPS, *shape)) for leaf, shape in SHAPES.items()}
    given = {leaf: jnp.asarray(SCALES[leaf] * noise[leaf], jnp.float32) for leaf in SHAPES}
    params = {leaf: jnp.full(shape, 0.5) for leaf, shape in SHAPES.items()}
    transformations = [case.make(**run.formats) for run in runs]

    def step(states, g):
        low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), g)
        kinds = {"float32": g, "bfloat16": low, "rounded": jax.tree.map(lambda x: x.astype(jnp.float32), low)}
        updates, new = {}, []
        for run, tx, state in zip(runs, transformations, states, strict=True):
            updates[run.name], state = tx.update(kinds[run.gradients], state, params)
            new.append(state)

        def squares(tree):
            return jax.tree.map(lambda x: jnp.sum(jnp.square(x)), tree)

        off = {
            run.name: squares(jax.tree.map(jnp.subtract, updates[run.name], updates[run.reference]))
            for run in runs
        }
        return tuple(new), (off, {name: squares(u) for name, u in updates.items()})

    # Compiling takes longer than running.
    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def all_steps(states):
        return jax.lax.scan(step, states, given)[1]

    off, size = jax.tree.map(np.asarray, all_steps(tuple(tx.init(params) for tx in transformations)))

    def distance(run, leaf):
        return math.sqrt(
            np.sum(off[run.name][leaf][run.start :], dtype=np.float64)
            / max(np.sum(size[run.reference][leaf][run.start :], dtype=np.float64), 1e-30)
        )

    return {run.name: {leaf: distance(run, leaf) for leaf in SHAPES} for run in runs}


class _Kept(NamedTuple):
    """How a moment of a leaf is kept.

    Attributes:
        size: The number of the leaf's values.
        is_alone: Whether the array they are in holds a single one.
        is_coded: Whether they are codes of `Int8`.
    """

    size: int
    is_alone: bool
    is_coded: bool


def _by_leaf(case: Case, formats: dict) -> dict[str, float]:
    """The largest D for moments in these formats, by leaf."""
    params = {leaf: jax.ShapeDtypeStruct(shape, jnp.float32) for leaf, shape in SHAPES.items()}
    state = [
        (path.split("/"), x)
        for path, x in paths_and_leaves(jax.eval_shape(case.make(**formats).init, params))
    ]

    def kept(role, leaf):
        moment = [(path, x) for path, x in state if role in path and "scale" not in path]
        for path, x in moment:
            if path[-1] == leaf:
                return _Kept(x.size, x.size == 1, x.dtype in (jnp.int8, jnp.uint8))
        # One value for the leaf, in an array for several leaves.
        return _Kept(1, all(x.size == 1 for _, x in moment), False)

    def error(leaf):
        mu, nu = kept("mu", leaf), kept("nu", leaf)
        return _state_error(case, formats, {"mu": mu, "nu": nu, "trace": kept("trace", leaf)}) + ARITHMETIC

    return {leaf: error(leaf) for leaf in SHAPES}


def _state_error(case: Case, formats: dict, kept: dict[str, _Kept]) -> float:
    """The largest D of a leaf whose moments are kept like this."""
    arguments = {name: p.default for name, p in _parameters(case).items()} | dict(case.arguments)

    def error(moment, decay):
        name, dtype_name = (
            f"{moment}_storage",
            "accumulator_dtype" if moment == "trace" else f"{moment}_dtype",
        )
        if formats.get(dtype_name) is not None:
            storage = as_nearest(dtype_name, formats[dtype_name])
        else:
            storage = as_storage(formats.get(name, formats.get("storage", "float32")), name)
        role = "nu" if moment == "nu" else "mu"
        return _error(storage, role, _largest(arguments[decay]), kept[moment])

    if "accumulator_dtype" in formats:
        return error("trace", "decay")
    if "b1" in arguments:
        second = error("nu", "b2") * (2 if arguments.get("amsgrad") else 1)
        return _of_quotient(error("mu", "b1"), second)
    second = error("nu", "decay")
    if arguments["centered"]:
        b = _largest(arguments["decay"])
        second = math.hypot(second, 2 * (1 - b) / (1 + b) * error("mu", "decay"))
    return _of_quotient(0.0, second)


def _of_quotient(numerator: float, second: float) -> float:
    """The relative error of a quotient by the root of a second moment."""
    return (1 + numerator) / math.sqrt(1 - second) - 1 if second < 1 else math.inf


def _parameters(case: Case):
    return inspect.signature(getattr(ao, case.factory)).parameters


def _largest(decay) -> float:
    return float(jnp.max(jax.vmap(decay)(jnp.arange(STEPS)))) if callable(decay) else float(decay)


def _error(storage: ao.Storage, role: str, decay: float, kept: _Kept) -> float:
    """The relative RMS error of an average that is kept in a format, inf where there is no bound."""
    gap, moving = storage.relative_error, 1
    if isinstance(storage, Int8):  # relative to the largest of a block, not to the value
        gap, moving = (2.25 / 254 if kept.is_coded else 0.0), 2
        if kept.is_coded and role == "mu":
            widest = 4 / 127 * 16 / 15 * math.sqrt(2 * math.log(2 * storage.block_size))
            gap = widest / math.sqrt(3)  # dither: the variance below is gap^2 / 4
    if gap == 0 or (math.isinf(gap) and kept.is_alone):  # a single value is its own scale
        return 0.0
    if gap == U:  # to nearest
        return U / (1 - decay)
    variance = gap**2 / 4 / (1 - decay**2)
    if role == "nu":
        variance = min(variance, moving * gap * (1 + decay**START) / (1 + decay))
    return (1 + 3 / math.sqrt(2 * kept.size)) * math.sqrt(variance)
