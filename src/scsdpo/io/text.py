"""Make foreign text safe to show: nothing in it acts on the terminal."""

_KEPT = "\n\t"


def printable(text: str) -> str:
    r"""`text` with every character escaped that is neither visible nor a space, tab or newline.

    Escape sequences, carriage returns, C1 controls, marks of text direction, and lone surrogates
    become `\x1b`, `\r`, `\x9b`, `\u202e`, `\ud800`.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in _KEPT or _is_wide_space(c) else _spelled(c) for c in text
    )


def in_one_line(text: str) -> str:
    """`printable` text with every run of white space replaced by one space."""
    return printable(" ".join(text.split()))


def _is_wide_space(c: str) -> bool:
    """True for no-break, ideographic and other wide spaces, but not for line separators."""
    return c.isspace() and c >= "\xa0" and c not in "\u2028\u2029"


def _spelled(c: str) -> str:
    return c.encode("unicode_escape").decode()
