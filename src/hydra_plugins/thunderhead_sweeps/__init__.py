"""Thunderhead's launchers and sweepers, where Hydra looks for plugins."""
