"""Pretrain a decoder-only language model: python train.py attention=gqa optimizer=lion (see --help)."""

import hydra
from omegaconf import DictConfig

from thunderhead.core import config
from thunderhead.training.run import train


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Train the composed configuration and return its validation loss."""
    return config.job(train, cfg)


if __name__ == "__main__":
    config.run(main)
