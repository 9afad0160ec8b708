"""What a compiled program runs: its kernels, what they read and write, and its collectives."""

from __future__ import annotations

import collections
import dataclasses
import math
import re

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5} | {
    f"{kind}{bits}": bits / 8 for kind in ("s", "u", "f", "bf") for bits in (8, 16, 32, 64)
}
_KERNELS = frozenset(
    ("fusion", "copy", "sort", "custom-call", "reduce", "scatter", "convert", "select", "broadcast", "add")
) | {"multiply"}
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*?)\)(?:, |$)")
_ARRAY = re.compile(r"\b([a-z]+\d+|pred)(?:e\w+)?\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_CALLED_BY_CALL = re.compile(r"to_apply=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An instruction that is run by itself, and the bytes of its operands and results."""

    name: str
    operation: str
    traffic: float


def kernels(hlo: str, *, all_branches: bool = True) -> list[Kernel]:
    """Returns the kernels of a compiled program. Bodies of loops count once.

    Args:
        hlo: The program.
        all_branches: Whether every branch of a conditional counts, although a step runs only one; otherwise
            the one that moves the least, as on ordinary steps.
    """
    bodies, entry = _computations(re.sub(r"/\*.*?\*/", "", hlo))
    seen: set[str] = set()

    def of(computation: str) -> list[Kernel]:
        found: list[Kernel] = []
        if computation in seen:
            return found
        seen.add(computation)
        sizes: dict[str, float] = {}
        for line in bodies.get(computation, ()):
            match = _INSTRUCTION.match(line)
            if not match:
                continue
            name, shape, operation, operands = match.groups()
            sizes[name] = _bytes(shape)
            if operation in _KERNELS:
                read = (sizes.get(each.strip().lstrip("%"), 0) for each in operands.split(","))
                found.append(Kernel(name, operation, sizes[name] + sum(read)))
            branches = [
                each.strip().lstrip("%") for names in _BRANCHES.findall(line) for each in names.split(",")
            ]
            called = _CALLED.findall(line) + (_CALLED_BY_CALL.findall(line) if operation == "call" else [])
            if operation == "conditional":
                choices = [of(each) for each in (*branches, *called)]
                if all_branches:
                    found += [kernel for choice in choices for kernel in choice]
                elif choices:
                    found += min(choices, key=lambda choice: sum(kernel.traffic for kernel in choice))
            else:
                found += [kernel for each in called for kernel in of(each)]
        return found

    return of(entry)


def collectives(hlo: str) -> dict[str, int]:
    """Counts the collectives of a compiled program, by kind."""
    kinds = "|".join(_COLLECTIVES)
    return dict(collections.Counter(re.findall(rf" ({kinds})(?:-start)?\(", hlo)))


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of every computation, and the name of the one that the program begins with."""
    starts = list(_COMPUTATION.finditer(hlo))
    ends = [start.start() for start in starts[1:]] + [len(hlo)]
    bodies = {start[2]: hlo[start.end() : end].splitlines() for start, end in zip(starts, ends, strict=True)}
    return bodies, next(start[2] for start in starts if start[1])


def _bytes(shape: str) -> float:
    return sum(
        _BYTES.get(dtype, 0) * math.prod(int(n) for n in sizes.split(",") if n)
        for dtype, sizes in _ARRAY.findall(shape)
    )


def entry_kernels(hlo: str) -> int:
    """Counts the kernels in an optimized module's entry computation: fusions, reductions, copies, calls."""
    entry = hlo[hlo.index("\nENTRY ") :]
    entry = entry[: entry.index("\n}")]
    opcodes = re.findall(r"^\s+(?:ROOT )?%?\S+ = (?:\(.*?\)|\S+) ([a-z][\w-]*)\(", entry, re.MULTILINE)
    # A pair of start and done is one kernel.
    return sum(opcode not in _NO_KERNEL and not opcode.endswith("-done") for opcode in opcodes)
