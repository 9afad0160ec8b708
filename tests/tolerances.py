"""The table of relative tolerances. A test that needs another one says why beside it."""

# Against the NumPy float64 transcriptions in `reference`, by the dtype that is computed in. 2e-6 is 17 units
# in the last place of float32: what a hundred steps of averaging, a division and a root add up to.
REFERENCE = {"float64": 1e-10, "float32": 2e-6, "bfloat16": 2e-2}

# Against optax. In float32 its `1 - b**t` is 1e-5 off for b = 0.999.
OPTAX = {"float64": 1e-9, "float32": 3e-5}

# A signed sum (a first moment, momentum, a step with weight decay) can cancel to nearly nothing; its rounding
# error is relative to its terms then and not to itself. `assert_close(..., terms=...)` is for results of that
# kind: the same fraction of the largest term in the leaf at that step is allowed too.
