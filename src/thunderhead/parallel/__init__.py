"""Runs on several devices: strategies, tensor parallelism, launching."""
