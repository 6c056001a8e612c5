"""Prepare a corpus for training: python prepare.py data=text data.path=my_folder tokenizer=byte (see --help)."""

import signal

if __name__ == "__main__":  # Ctrl-C while the rest is imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import hydra
from omegaconf import DictConfig

from thunderhead import command_line


@hydra.main(version_base="1.3", config_path="conf", config_name="prepare")
def main(cfg: DictConfig) -> None:
    """Write the shards of the composed data and tokenizer, or find those that are there."""
    command_line.job("thunderhead.corpus.command.prepare_corpus", cfg)


if __name__ == "__main__":
    command_line.run(main, "prepare")
