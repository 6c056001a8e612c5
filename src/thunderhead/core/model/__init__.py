"""The decoder, in plain PyTorch: no Lightning, no Hydra."""
