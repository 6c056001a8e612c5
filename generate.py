"""Text from a trained model: python generate.py run=logs/runs/… 'generation.prompt="def main"' (see --help)."""

import signal

if __name__ == "__main__":  # Ctrl-C while the rest is imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import hydra
from omegaconf import DictConfig

from thunderhead import command_line


@hydra.main(version_base="1.3", config_path="conf", config_name="generate")
def main(cfg: DictConfig) -> None:
    """Print the prompt and its continuation."""
    command_line.job("thunderhead.release.command.generate_text", cfg)


if __name__ == "__main__":
    command_line.run(main, "generate")
