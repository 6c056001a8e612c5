"""Many configurations composed at the cost of a few: the arms of a sweep seldom differ in more than some groups.

A single run gains, too: Hydra composes it twice, first to find out whether it is a sweep.
"""

import dataclasses
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.defaults_list import DefaultsList, Overrides, create_defaults_list

merge = ConfigLoaderImpl._compose_config_from_defaults_list


@contextmanager
def groups_composed_once() -> Iterator[None]:
    """Within it, Hydra merges the files of a choice of groups once, and applies all other overrides to a copy.

    Merging takes nearly all of the third of a second that Hydra takes. Files that change meanwhile change nothing.
    """
    lists: dict[str, DefaultsList] = {}
    merged: dict[str, bytes] = {}

    def create_once(repo: Any, config_name: Any, overrides_list: Any, **how: Any) -> DefaultsList:
        asked = Overrides(repo=repo, overrides_list=overrides_list)
        groups = asked.override_choices, asked.append_group_defaults, asked.deletions
        key = repr((config_name, how, repo.get_sources(), *groups))
        if key not in lists:
            lists[key] = create_defaults_list(repo, config_name, overrides_list, **how)
        return dataclasses.replace(lists[key], config_overrides=asked.config_overrides)

    def merge_once(loader: ConfigLoaderImpl, defaults: Any, repo: Any) -> Any:
        key = repr((defaults, repo.get_sources()))
        if key not in merged:
            merged[key] = pickle.dumps(merge(loader, defaults, repo))
        return pickle.loads(merged[key])

    places = (config_loader_impl, "create_defaults_list"), (ConfigLoaderImpl, "_compose_config_from_defaults_list")
    before = [getattr(*place) for place in places]
    try:
        for place, function in zip(places, (create_once, merge_once), strict=True):
            setattr(*place, function)
        yield
    finally:
        for place, function in zip(places, before, strict=True):
            setattr(*place, function)
