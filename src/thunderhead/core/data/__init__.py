"""From source text to batches of tokens, in the order in which data flows."""
