"""From raw text to shards of tokens: sources, tokenizers, curation, deduplication, preparing."""
