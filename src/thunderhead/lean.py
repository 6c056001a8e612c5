"""A third of the time to start and to end (docs/performance.md).

Torchmetrics, which Lightning imports, is imported without SciPy and Transformers: where they are installed it imports
both, for metrics of audio and of generated text, and has no switch for it. A program that needs those metrics imports
torchmetrics before thunderhead.

Python's garbage collector leaves alone what modules consist of, half a million objects that stay to the end.
"""

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

LEFT_OUT = ("scipy", "transformers")


class LeanTorchmetrics(MetaPathFinder):
    """Put into sys.meta_path: finds torchmetrics once, and leaves all else to the finders behind it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torchmetrics":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_lean(module: ModuleType) -> None:
                with _left_out():
                    execute(module)

            spec.loader.exec_module = execute_lean  # type: ignore[method-assign]
        return spec


@contextmanager
def _left_out() -> Iterator[None]:
    """As if what is not imported yet were not installed, for `import` and for the flags by which torchmetrics asks."""
    from unittest.mock import patch  # imports asyncio: not at the start of every program

    from lightning_utilities.core.imports import RequirementCache

    absent = [name for name in LEFT_OUT if name not in sys.modules]
    is_available = RequirementCache.__bool__

    def is_there(flag: RequirementCache) -> bool:
        if (flag.requirement or "").startswith(tuple(absent)):
            flag.available = False  # and stays so: what needs it was not imported
        return is_available(flag)

    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type] # None: importing it fails
    try:
        with patch.object(RequirementCache, "__bool__", is_there):
            yield
    finally:
        for name in absent:
            del sys.modules[name]


@contextmanager
def importing() -> Iterator[None]:
    """Import within it without garbage collection, which would look at all modules again with every few of them.

    What is there by then is left out of later collections, too.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def end() -> None:
    """Close what nobody holds any more, and leave the rest to the end of the process: saves its last second.

    Not with Triton, whose nanobind takes that for leaks, and complains.
    """
    if "triton" in sys.modules:
        gc.unfreeze()
    else:
        gc.collect()
        gc.freeze()
