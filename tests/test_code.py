"""What `out` recognizes a training function by: all that it uses, and nothing else."""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adaptive_optax.study.engine.code import digest_code

CLASS = "class C:\n    def __init__(self, w): self.w = w\n"
CHANGED = {  # a module in which 64 becomes 128
    "a helper in a nested function": """
        def helper(x): return 64 * x
        def train(run):
            def loss(x): return helper(x)
            return loss(run.seed)""",
    "a helper in a lambda": """
        def helper(x): return 64 * x
        def train(run): return (lambda x: helper(x))(run.seed)""",
    "a helper in a comprehension": """
        def helper(x): return 64 * x
        def train(run): return sum([helper(i) for i in range(3)])""",
    "a helper in a generator": """
        def helper(): return 64
        def train(run):
            def generated(): yield helper()
            return next(generated())""",
    "a helper in a nested class": """
        def helper(): return 64
        def train(run):
            class Inner: width = helper()
            return Inner.width""",
    "a number in a nested function": """
        WIDTH = 64
        def train(run):
            def init(): return WIDTH
            return init()""",
    "an exception handler": """
        def train(run):
            try: return run.seed
            except ValueError: return 64""",
    "options": """
        import argparse
        args = argparse.Namespace(width=64)
        def train(run): return args.width""",
    "options that are passed on": """
        import argparse
        args = argparse.Namespace(width=64)
        def train(run): return vars(args)["width"]""",
    "a simple namespace": """
        import types
        args = types.SimpleNamespace(width=64)
        def train(run): return args.width""",
    "slots": """
        class C:
            __slots__ = ("w",)
            def __init__(self, w): self.w = w
        c = C(64)
        def train(run): return c.w""",
    "an object that can be called": """
        class C:
            __slots__ = ("w",)
            def __init__(self, w): self.w = w
            def __call__(self, run): return self.w
        train = C(64)""",
    "a deque": """
        import collections
        X = collections.deque([64])
        def train(run): return X[0]""",
    "a subclass of int": """
        class D(int): pass
        X = D(64)
        def train(run): return X""",
    "an attribute of a list": """
        class D(list): pass
        X = D([1])
        X.k = 64
        def train(run): return X.k""",
    "a method of a list": """
        class D(list):
            def f(self): return 64
        X = D()
        def train(run): return X.f()""",
    "a method of a named tuple": """
        from typing import NamedTuple
        class C(NamedTuple):
            w: int = 1
            def f(self): return 64
        c = C()
        def train(run): return c.f()""",
    "an attribute of the function": """
        def train(run): return train.k
        train.k = 64""",
    "an array of objects": """
        import numpy as np
        X = np.array([64, "a"], object)
        def train(run): return X[0]""",
    "a typed key": """
        import jax
        X = jax.random.key(64)
        def train(run): return jax.random.uniform(X)""",
    "a generator of random numbers": """
        import numpy as np
        X = np.random.default_rng(64)
        def train(run): return X.normal()""",
    "a decimal": """
        import decimal
        X = decimal.Decimal("64")
        def train(run): return X""",
    "a fraction": """
        import fractions
        X = fractions.Fraction(64)
        def train(run): return X""",
    "a frame": """
        import pandas as pd
        X = pd.DataFrame({"a": [64.0]})
        def train(run): return X.a.sum()""",
    "a property's setter": """
        class C:
            @property
            def x(self): return self._x
            @x.setter
            def x(self, value): self._x = 64 * value
        def train(run):
            c = C()
            c.x = 1
            return c.x""",
    "a cached property": """
        import functools
        class C:
            @functools.cached_property
            def x(self): return 64
        def train(run): return C().x""",
    "a base class": """
        class Base:
            def f(self): return 64
        class C(Base): pass
        def train(run): return C().f()""",
    "a method of a dataclass": """
        import dataclasses
        @dataclasses.dataclass
        class C:
            w: int = 1
            def f(self): return 64
        c = C()
        def train(run): return c.f()""",
    "an attribute of a dataclass that is no field": """
        import dataclasses
        @dataclasses.dataclass
        class C:
            w: int = 1
        c = C()
        c.z = 64
        def train(run): return c.z""",
    "a module of Linen": """
        import flax.linen as nn
        class M(nn.Module):
            @nn.compact
            def __call__(self, x): return nn.Dense(64)(x)
        model = M()
        def train(run): return model.apply""",
    "a module of NNX": """
        from flax import nnx
        model = nnx.Linear(2, 64, rngs=nnx.Rngs(0))
        def train(run): return model.out_features""",
    "a gradient": """
        import jax
        def f(x): return x**64
        g = jax.grad(f)
        def train(run): return g(1.0)""",
    "a compiled function": """
        import functools, jax
        @functools.partial(jax.jit, static_argnames="n")
        def f(x, n=64): return x * n
        def train(run): return f(1)""",
    "a transformation": """
        import optax
        tx = optax.adam(64.0)
        def train(run): return tx""",
    "a cached function": """
        import functools
        @functools.lru_cache
        def f(): return 64
        def train(run): return f()""",
    "what a decorator of another module keeps": """
        import contextlib
        @contextlib.contextmanager
        def f(): yield 64
        def train(run):
            with f() as x: return x""",
}
UNCHANGED = {  # a module in which 64 becomes 128, and train uses nothing of that
    "another option": """
        import argparse
        args = argparse.Namespace(width=1, out=64)
        def train(run): return args.width""",
    "a name that is only an attribute": """
        seed = 64
        def train(run): return run.seed""",
    "a comment": """
        def helper(x):  # 64
            return x
        class C:
            def f(self): return 1
        def train(run): return helper(C().f())""",
    "what is read lazily": """
        import functools
        class C:
            @functools.cached_property
            def data(self): return 1
        c = C()
        if 64 > 100: c.data
        def train(run): return c.data""",
    "the numbers of a lock": """
        import threading
        locks = [threading.Lock() for _ in range(64)]
        lock = threading.Lock()
        def train(run):
            with lock: return 1""",
    "randomness that the whole process shares": """
        import random
        random.seed(64)
        def train(run): return random.random() + random.gauss()""",
}


@pytest.fixture
def digest_of(tmp_path, monkeypatch):
    """The digest of `train` in a module with this source."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def found(source):
        lines = source.split("\n")
        indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
        (tmp_path / "own_module.py").write_text("\n".join(line[indent:] for line in lines))
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, "own_module", raising=False)
        return digest_code(importlib.import_module("own_module").train)

    return found


@pytest.mark.parametrize("source", CHANGED.values(), ids=list(CHANGED))
def test_a_change_is_seen(source, digest_of):
    before = digest_of(source)
    assert digest_of(source) == before != digest_of(source.replace("64", "128"))


@pytest.mark.parametrize("source", UNCHANGED.values(), ids=list(UNCHANGED))
def test_what_is_not_used_is_no_change(source, digest_of):
    assert digest_of(source) == digest_of(source.replace("64", "128"))


def test_a_changed_tensor_is_seen(digest_of):
    pytest.importorskip("torch")
    source = """
        import torch
        X = {"a": torch.full((3,), 64.0, dtype=torch.bfloat16), "b": torch.eye(2).to_sparse()}
        def train(run): return X"""
    before = digest_of(source)
    assert digest_of(source) == before != digest_of(source.replace("64", "128"))
    assert before != digest_of(source.replace("eye(2)", "zeros(2, 2)"))


def test_cells_may_be_empty_and_values_nested_deeply():
    def train(run):
        return later if run else deep

    deep = []
    for _ in range(3000):
        deep = [deep]
    before = digest_code(train)
    deep = [deep]
    assert digest_code(train) != before
    if before is None:
        later = 1


def test_what_cannot_be_seen_is_said():
    state = (i for i in range(3))

    def train(run):
        return next(state)

    with pytest.warns(
        UserWarning, match=r"out: train uses values of builtins.generator, in which a change cann"
    ):
        digest_code(train)


SCRIPT = """
import abc, collections, enum, functools, random, threading
import flax.linen as nn, jax, numpy as np, optax, pandas as pd
from flax import nnx
from adaptive_optax.study.engine.code import digest_code
class Color(enum.Enum):
    A = 1
    B = 2
class Base(abc.ABC):
    @abc.abstractmethod
    def f(self): ...
class C(Base):
    def f(self): return helper
class Model(nn.Module):
    @nn.compact
    def __call__(self, x): return nn.Dense(3)(x)
def helper(x): return x in {"a", "b", "c"} or Color.A
mesh = jax.make_mesh((1,), ("b",))
held = {
    "set": {helper, C, Color, len, "a", ("b", 2)}, "mesh": jax.NamedSharding(mesh, jax.P("b")),
    "object": object(),
    "model": Model(), "module": nnx.Dropout(0.5, rngs=nnx.Rngs(0)),
    "frame": pd.DataFrame({"a": ["x"], "b": [1]}),
    "tx": optax.chain(optax.masked(optax.adam(0.1), {"w": True})), "jit": jax.jit(jax.vmap(helper)), "c": C(),
    "random": random.random, "rng": np.random.default_rng(0),
    "event": threading.Event(), "key": jax.random.key(0),
}
def train(run): return held
print(digest_code(train))
"""
EXAMPLES = Path(__file__).parents[1] / "examples"


def test_digests_are_the_same_in_every_process():
    """With other hash seeds, of values of many kinds and of the examples' training functions."""
    torch = "own_script_torch" if importlib.util.find_spec("torch") else "own_script"
    script = f"{SCRIPT}\nimport sys; sys.path.insert(0, {str(EXAMPLES)!r})\n" + "".join(
        f"import {name}; print(digest_code({name}.train))\n" for name in ("own_script", torch)
    )
    found = []
    for seed in ("1", "2"):
        path = {"PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-W", "error", "-c", script]
        ran = subprocess.run(command, env=os.environ | path, capture_output=True, text=True, check=True)
        found.append(ran.stdout.split())
    assert found[0] == found[1] and len(found[0]) == 3
