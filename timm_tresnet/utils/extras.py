"""Installation hints for optional dependencies."""


def how_to_install(*extras: str) -> str:
    """Return how to install extras: from a clone, because the package is not on an index yet."""
    return f"in the clone of timm-tresnet, run pip install '.[{','.join(extras)}]'"
