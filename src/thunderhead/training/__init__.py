"""A run from its checked configuration to its record: plan, trainer, callbacks, loggers, exact resume."""
