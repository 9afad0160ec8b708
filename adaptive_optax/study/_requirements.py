"""Says which package is missing before the study's modules fail to find it. Imported first."""

from importlib.util import find_spec

for _name in ("filelock", "matplotlib", "pandas", "rich", "scipy"):
    if find_spec(_name) is None:
        raise ImportError(f"adaptive_optax.study needs {_name}: pip install 'adaptive-optax[study]'.")
