"""Does a parametrization keep its promise at every width: python coordinate_check.py attention=gqa (see --help)."""

from functools import partial

import hydra
from omegaconf import DictConfig

from thunderhead.core import config
from thunderhead.lab.coordinate_check import check_coordinates
from thunderhead.options.parametrization import at_width


@hydra.main(version_base="1.3", config_path="conf", config_name="coordinate_check")
def main(cfg: DictConfig) -> None:
    """Measure, print and draw."""
    config.job(partial(check_coordinates, resize=at_width), cfg)


if __name__ == "__main__":
    config.run(main, "coordinate_check")
