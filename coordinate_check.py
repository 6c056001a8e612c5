"""Does a parametrization keep its promise at every width: python coordinate_check.py attention=gqa (see --help)."""

import signal

if __name__ == "__main__":  # Ctrl-C while the rest is imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import hydra
from omegaconf import DictConfig

from thunderhead import command_line


@hydra.main(version_base="1.3", config_path="conf", config_name="coordinate_check")
def main(cfg: DictConfig) -> None:
    """Measure, print and draw."""
    command_line.job("thunderhead.lab.coordinate_check.check_coordinates", cfg, "thunderhead.options.mup.at_width")


if __name__ == "__main__":
    command_line.run(main, "coordinate_check")
