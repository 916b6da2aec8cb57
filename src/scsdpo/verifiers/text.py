"""Make verifiers' texts safe to store: valid Unicode of bounded length."""

import hashlib

CUT = " [cut]"
"""End of a text that was cut."""
_DIGEST_BYTES = 8


def valid(text: str) -> str:
    """The text with surrogate pairs joined, and U+FFFD for each lone surrogate."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def capped(text: str, most: int) -> str:
    """Valid text of at most `most` characters; a longer one is cut and ends in " [cut]"."""
    return valid(text if len(text) <= most else text[: most - len(CUT)] + CUT)


def capped_distinct(text: str, most: int) -> str:
    """`capped`, but a cut text ends in " [cut ...]" with a hash of the whole: different texts stay
    different.
    """
    if len(text) <= most:
        return valid(text)
    whole = hashlib.blake2b(valid(text).encode(), digest_size=_DIGEST_BYTES).hexdigest()
    mark = f" [cut {whole}]"
    return valid(text[: most - len(mark)]) + mark
