"""Packages that are needed for some options only: the extras of pyproject.toml."""

import shlex

CHECKOUT = "uv pip install -e '.[{}]'"


def install(extra: str) -> str:
    """The command that installs an extra's packages, from whatever folder it is typed in."""
    from importlib import metadata  # Hydra imports who asks at every start

    try:
        requirements = metadata.requires("thunderhead") or []
    except metadata.PackageNotFoundError:  # on the path only
        requirements = []
    parts = [requirement.partition(";") for requirement in requirements]
    wanted = [
        what.strip() for what, _, marker in parts if f"extra=='{extra}'" in marker.replace('"', "'").replace(" ", "")
    ]
    return f"pip install {shlex.join(wanted)}" if wanted else CHECKOUT.format(extra)
