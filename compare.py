"""A report from finished runs: python compare.py runs=logs/sweeps/…,logs/runs/… baseline=mha (see --help)."""

import signal
import sys

if __name__ == "__main__":  # Ctrl-C while the rest is imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import hydra
from omegaconf import DictConfig

from thunderhead import command_line


@hydra.main(version_base="1.3", config_path="conf", config_name="compare")
def main(cfg: DictConfig) -> None:
    """Compare the runs and write the report."""
    command_line.job("thunderhead.lab.compare.compare_runs", cfg)


if __name__ == "__main__":
    sys.argv = command_line.commas_to_list(sys.argv)
    command_line.run(main, "compare")
