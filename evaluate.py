"""Loss and bits per byte on any text: python evaluate.py run=logs/runs/… data=text data.path=… (see --help)."""

import signal

if __name__ == "__main__":  # Ctrl-C while the rest is imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import hydra
from omegaconf import DictConfig

from thunderhead import command_line


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Print a table, a line for each source."""
    command_line.job("thunderhead.release.evaluate.evaluate", cfg)


if __name__ == "__main__":
    command_line.run(main, "evaluate")
