"""A folder of this run alone, which goes with it, or with the next run if this one is killed."""

import atexit
import fcntl
import os
import secrets
import shutil
import socket
from contextlib import suppress
from pathlib import Path
from typing import IO

_PREFIX = "scsdpo-run-"
_OWNER = "owner"


def remove(folder: Path) -> None:
    """Remove a folder and all that is in it; nothing happens if it is not there."""
    shutil.rmtree(folder, ignore_errors=True)


class RunFolder:
    """A new folder under `parent`.

    It holds a file with the host's name, locked for as long as this process lives: folders of
    killed runs of the same host, and no others, are removed when the next one is made here.

    Args:
        parent: where; it is made if it is not there.
        mode: permissions of the new folder.
    """

    def __init__(self, parent: Path, mode: int = 0o777) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        for left in parent.glob(f"{_PREFIX}*"):
            _remove_if_left(left)
        self.path = parent / f"{_PREFIX}{secrets.token_hex(8)}"
        self.path.mkdir(mode=mode)
        self._owner = self._claim()
        self._pid = os.getpid()
        atexit.register(self.close)

    def close(self) -> None:
        """Remove it, with all that lies in it; a run that ends by an error does so too."""
        atexit.unregister(self.close)
        if os.getpid() == self._pid:  # and no fork of it
            remove(self.path)
        self._owner.close()

    def _claim(self) -> IO[str]:
        """Locked before it has its name: nobody ever sees it without a lock while we live."""
        unnamed = self.path / "claim"
        owner = unnamed.open("w")
        with suppress(OSError):  # a file system without locks: then nobody removes it but we
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            owner.write(socket.gethostname())
            owner.flush()
            unnamed.rename(self.path / _OWNER)
        return owner


def _remove_if_left(folder: Path) -> None:
    # Not ours to read, gone by now, or its lock is held: it stays.
    with suppress(OSError), (folder / _OWNER).open("r+") as owner:
        if owner.read() == socket.gethostname():
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(folder)
