"""Pretrain a decoder-only language model: python train.py attention=gqa optimizer=lion (see --help)."""

import signal

if __name__ == "__main__":  # Ctrl-C while the rest is imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import hydra
from omegaconf import DictConfig

from thunderhead import command_line


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Train the composed configuration and return its validation loss."""
    return command_line.job("thunderhead.training.run.train", cfg)


if __name__ == "__main__":
    command_line.run(main, expand={"init_from": "thunderhead.release.pretrained.with_options"})
