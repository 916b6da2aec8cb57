"""Private names of TensorBoard."""

from threading import Thread

CHECKED = ">=2.20,<2.22"


def is_writer(thread: Thread | None) -> bool:
    """True if `thread` writes event files; the public writer does not expose it.

    The class is compared by name, because importing TensorBoard takes seconds.
    """
    return type(thread).__name__ == "_AsyncWriterThread"
