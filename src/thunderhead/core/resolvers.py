"""What `${…}` in YAML may call beside OmegaConf's own and Hydra's."""

import errno
import functools
import itertools
import tempfile
from pathlib import Path

from omegaconf import OmegaConf


def divide(dividend: int, divisor: int) -> int:
    """`${divide:${model.d_model},64}`: as many as fit, exactly."""
    if dividend % divisor:
        raise ValueError(f"{dividend} is no multiple of {divisor}")
    return dividend // divisor


made: list[Path] = []
"""Folders that this process has made for its results; those still empty at its end are removed."""


@functools.cache  # Hydra asks more than once
def new_folder(path: str, is_dry: bool = False) -> str:
    """`${new_folder:logs/runs/…}`: this folder, or -2, -3 …; made at once, as another start may ask, too.

    Who only plans (`is_dry`) gets a temporary one where this cannot be written.
    """
    for folder in itertools.chain([path], (f"{path}-{number}" for number in itertools.count(2))):
        new = [place for place in (Path(folder), *Path(folder).parents) if not place.exists()]
        try:
            Path(folder).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            if not is_dry or error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            made.append(Path(temporary := tempfile.mkdtemp()))
            return temporary
        made.extend(place.absolute() for place in new)
        return folder
    raise AssertionError


OmegaConf.register_new_resolver("divide", divide, replace=True)
OmegaConf.register_new_resolver("larger", max, replace=True)  # `${larger:1024,${model.context_length}}`
OmegaConf.register_new_resolver("new_folder", new_folder, replace=True)
