"""Which documents are held out for validation."""

import hashlib

SPLIT_RULE = "a document is for validation if the first 8 bytes of its text's sha256, over 2**64, are < fraction"


def is_validation(text: str, fraction: float) -> bool:
    """Say on which side of the split a document falls: by its text alone, so equal documents never end up on both."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) < fraction * 2**64
