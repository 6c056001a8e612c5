"""Callbacks around the run."""
