"""Thunderhead: pretrain decoder-only language models; every design choice is an option of a config group."""

__version__ = "0.1.0"
