"""Thunderhead: pretrain decoder-only language models with Lightning and Hydra, and find out fairly which choice helps."""

__version__ = "0.1.0"
