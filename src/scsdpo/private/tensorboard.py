"""Private names of TensorBoard."""

from threading import Thread

CHECKED = ">=2.20,<2.22"


def is_writer(thread: Thread | None) -> bool:
    """Whether it is the thread that writes event files; its public writer does not show it.

    By name, because the import of TensorBoard takes seconds.
    """
    return type(thread).__name__ == "_AsyncWriterThread"
