"""How XLA compiles for the tests: quickly, or as in use.

The tests compile thousands of programs and run each for a moment, so that `conftest.py` makes the quick way
the rule: it takes a fifth of the time. What the two ways compute differs in the order of roundings at most.
"""

import jax

# A program in four parts at most, and not in 32: each is compiled alone, at a price.
QUICKLY: dict[str, int | bool] = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_parallel_codegen_split_count": 4,
}
AS_IN_USE: dict[str, int | bool] = {  # XLA's defaults
    "xla_backend_optimization_level": 3,
    "xla_cpu_parallel_codegen_split_count": 32,
}
# Later versions do not have this option, and XLA aborts at a flag that it does not know.
if jax.__version_info__ < (0, 11, 0):
    QUICKLY["xla_cpu_use_fusion_emitters"] = False
    AS_IN_USE["xla_cpu_use_fusion_emitters"] = True


def as_flags(options: dict[str, int | bool]) -> str:
    """The options as XLA_FLAGS has them."""
    return " ".join(f"--{name}={str(value).lower()}" for name, value in options.items())
