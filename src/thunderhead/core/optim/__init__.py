"""Optimizers that torch lacks, parameter groups and learning-rate schedules."""
