"""How to install what the package alone does not bring."""


def how_to_install(*extras: str) -> str:
    """How to install extras: from a clone, since no index has the package yet."""
    return f"in the clone of timm-tresnet, run pip install '.[{','.join(extras)}]'"
