"""The model of a run for Hugging Face's transformers: python export.py run=logs/runs/… (see --help)."""

import signal

if __name__ == "__main__":  # Ctrl-C while the rest is imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import hydra
from omegaconf import DictConfig

from thunderhead import command_line


@hydra.main(version_base="1.3", config_path="conf", config_name="export")
def main(cfg: DictConfig) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads."""
    command_line.job("thunderhead.release.export.export", cfg)


if __name__ == "__main__":
    command_line.run(main, "export")
