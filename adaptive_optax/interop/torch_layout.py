"""Matching parameters to PyTorch's names and array layouts.

PyTorch modules name their arrays "weight" and "bias"; Flax uses "kernel", "scale", "embedding" and "bias". A
Linear weight is (out, in) and a convolution's (out, in, *window); Flax's kernels are (in, out) and
(*window, in, out).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import numpy as np

from adaptive_optax._core.paths import paths_and_leaves
from adaptive_optax._core.trees import Params

Layout = Callable[[str, np.ndarray], np.ndarray | None]
"""`layout(path, array)` gives PyTorch's array in this library's layout; None applies `from_torch`'s rule."""

_WEIGHTS = ("kernel", "scale", "embedding")


class Place(NamedTuple):
    """The name and layout of a parameter in PyTorch.

    Attributes:
        name: The parameter's name in PyTorch.
        transposed: Whether the axes differ here, as for kernels: in and out come last, after the window.
    """

    name: str
    transposed: bool

    def from_torch(self, x: np.ndarray) -> np.ndarray:
        """Returns the array with this library's axes."""
        return x.transpose(*range(2, x.ndim), 1, 0) if self.transposed and x.ndim > 1 else x

    def to_torch(self, x: np.ndarray) -> np.ndarray:
        """Returns the array with PyTorch's axes."""
        return x.transpose(-1, -2, *range(x.ndim - 2)) if self.transposed and x.ndim > 1 else x


def places_in(
    owner: str, params: Params, names: Collection[str], mapping: Mapping[str, str] | None
) -> dict[str, Place]:
    """Finds each parameter, by its path, among PyTorch's names.

    Raises:
        ValueError: If a parameter has no match or several, two parameters have the same match, or `mapping`
            does not fit; if a name in PyTorch matches no parameter, not even a hidden one.
    """
    paths = [path for path, _ in paths_and_leaves(params)]
    hidden = {path for path, _ in paths_and_leaves(params, masked=True)} - set(paths)
    mapping = {} if mapping is None else mapping
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{owner}: mapping must be {{path: PyTorch's name}}, got {mapping!r}.")
    if unknown := sorted(mapping.keys() - set(paths) - hidden):
        raise ValueError(f"{owner}: mapping has {unknown[0]!r}, but the parameters are {', '.join(paths)}.")
    places: dict[str, Place] = {}
    by_rule: dict[str, str] = {}
    for path in paths:
        parts = path.split("/")
        candidates = _candidates(parts)
        if path in mapping:
            candidates = [mapping[path]]
        found = [name for name in candidates if name in names]
        if len(found) > 1:
            raise ValueError(
                f"{owner}: {path!r} could be {' or '.join(map(repr, found))} in PyTorch; specify which with "
                f"mapping={{{path!r}: ...}}."
            )
        if not found:
            called = f' (PyTorch calls a {parts[-1]} "weight")' if parts[-1] in _WEIGHTS else ""
            raise ValueError(
                f"{owner}: PyTorch's state has no {' and no '.join(map(repr, candidates))} for {path!r}"
                f"{called}; it has {', '.join(map(repr, names)) or 'nothing'}. Specify its name with "
                f"mapping={{{path!r}: ...}}."
            )
        (name,) = found
        if path not in mapping:
            if name in by_rule:
                raise ValueError(
                    f"{owner}: {name!r} in PyTorch could be {by_rule[name]!r} or {path!r}; specify which "
                    "with mapping=."
                )
            by_rule[name] = path
        places[path] = Place(name, parts[-1] == "kernel" and name.rpartition(".")[2] == "weight")
    known = {place.name for place in places.values()} | {
        name
        for path in hidden
        for name in ([mapping[path]] if path in mapping else _candidates(path.split("/")))
    }
    if extra := sorted(set(names) - known):
        raise ValueError(
            f"{owner}: {extra[0]!r} in PyTorch matches none of the parameters, which are {', '.join(paths)}. "
            "Specify its path with mapping={path: name}, or remove it from the state."
        )
    return places


def _candidates(parts: list[str]) -> list[str]:
    names = [".".join(parts)]
    if parts[-1] in _WEIGHTS:
        names.append(".".join([*parts[:-1], "weight"]))
    return names
