"""What a step was trained on: python inspect_batch.py run=logs/runs/… step=120 (see --help)."""

import signal

if __name__ == "__main__":  # Ctrl-C while the rest is imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import hydra
from omegaconf import DictConfig

from thunderhead import command_line


@hydra.main(version_base="1.3", config_path="conf", config_name="inspect_batch")
def main(cfg: DictConfig) -> None:
    """Print the text of the step's batch."""
    print(command_line.job("thunderhead.training.inspect_batch.text_of_batch", cfg))


if __name__ == "__main__":
    command_line.run(main, "inspect_batch")
