"""The source of a user's own components, kept with a run's record, for who gets the run."""

import sys
import sysconfig
from pathlib import Path

from thunderhead.core.components import nodes
from thunderhead.core.config import Config

CODE = "code"
"""The folder of a run that has them, as PYTHONPATH takes it."""
LARGEST = 2**20  # bytes of a file
INSTALLED = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}


def own_sources(config: Config) -> dict[str, str]:
    """The texts of all modules loaded of the packages that a configuration names, by their place in a run's folder.

    Not of installed packages, whose versions the record has.
    """
    roots = {str(node["_target_"]).partition(".")[0] for _, node in nodes(config)} - {"thunderhead"}
    found = {}
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None) if name.partition(".")[0] in roots else None
        if file is None or not _is_own(path := Path(file).resolve()):
            continue
        place = name.replace(".", "/") + ("/__init__.py" if path.name == "__init__.py" else ".py")
        found[f"{CODE}/{place}"] = path.read_text(encoding="utf-8", errors="replace")
    return found


def _is_own(file: Path) -> bool:
    is_installed = any(file.is_relative_to(place) for place in INSTALLED)
    return file.suffix == ".py" and not is_installed and file.is_file() and file.stat().st_size <= LARGEST
