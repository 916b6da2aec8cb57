"""What verifiers say, as text that can go anywhere: valid and of a bounded length."""

import hashlib

CUT = " [cut]"
"""Ends a text that was longer than it may be."""
_DIGEST_BYTES = 8


def valid(text: str) -> str:
    """The same text with halves of surrogate pairs joined, and U+FFFD for one that is alone."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def capped(text: str, most: int) -> str:
    """Valid text of at most `most` characters; the end of a longer one gives way to " [cut]"."""
    return valid(text if len(text) <= most else text[: most - len(CUT)] + CUT)


def capped_distinct(text: str, most: int) -> str:
    """`capped`, but texts that differ behind the cut still differ: they end in " [cut ...]" with a
    hash of the whole.
    """
    if len(text) <= most:
        return valid(text)
    whole = hashlib.blake2b(valid(text).encode(), digest_size=_DIGEST_BYTES).hexdigest()
    mark = f" [cut {whole}]"
    return valid(text[: most - len(mark)]) + mark
