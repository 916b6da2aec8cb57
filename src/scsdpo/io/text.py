"""Text of others as text: nothing in it acts on the terminal that shows it."""

_KEPT = "\n\t"


def printable(text: str) -> str:
    r"""`text` with everything that is neither seen nor a space, a tab or a line's end spelled out.

    Escape sequences, carriage returns, C1 controls, marks that turn or hide the text around them,
    and lone surrogates become `\x1b`, `\r`, `\x9b`, `\u202e`, `\ud800`.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in _KEPT or _is_wide_space(c) else _spelled(c) for c in text
    )


def in_one_line(text: str) -> str:
    """`printable`, with every run of white space as one space."""
    return printable(" ".join(text.split()))


def _is_wide_space(c: str) -> bool:
    """No-break, ideographic and other spaces; separators of lines are none."""
    return c.isspace() and c >= "\xa0" and c not in "\u2028\u2029"


def _spelled(c: str) -> str:
    return c.encode("unicode_escape").decode()
