"""Reports which package of an extra is missing and how to install it."""

from importlib.util import find_spec


def require(what: str, extra: str, *packages: str) -> None:
    """Raises ImportError if one of the packages that `what` needs is not installed."""
    for name in packages:
        if find_spec(name) is None:
            raise ImportError(f"{what} needs {name}: pip install 'adaptive-optax[{extra}]'.")
