"""A lock that allows one run a folder."""

import errno
import fcntl
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

import lightning as L

from scsdpo.errors import ConfigurationError
from scsdpo.io.files import tell

NAME = "run.lock"
_TAKEN = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_held: dict[Path, int] = {}
"""Descriptors by folder. POSIX releases a lock when the process closes the file anywhere, so each
file is opened once. A forked worker does not inherit the lock."""


def hold(trainer: L.Trainer, folder: Path, *, needed: bool) -> None:
    """Lock a folder against other runs while this process lives; call it on every rank.

    The kernel holds the lock, over NFS too, and releases it with the process, so a killed run
    leaves none. `run.lock` names the holder. If a file system has no locks, the run continues
    without one and logs that.

    Args:
        trainer: its rank 0 holds the lock, for all.
        folder: the folder; it is made if needed.
        needed: True if the folder must be writable, because it holds the checkpoints.

    Raises:
        ConfigurationError: on every rank, if another run holds it, or it is needed and cannot be
            written.
    """
    fault = _fault(folder, needed=needed) if trainer.is_global_zero else ""
    if fault := trainer.strategy.broadcast(fault):
        raise ConfigurationError(fault)


def release(folder: Path) -> None:
    """Release the lock of a folder."""
    descriptor = _held.pop(folder.resolve(), None)
    if descriptor is not None:
        with suppress(OSError):  # the folder may be gone, or its disk read-only
            (folder / NAME).unlink()
        os.close(descriptor)


def _fault(folder: Path, *, needed: bool) -> str:
    try:
        _take(folder.resolve())
    except BlockingIOError:
        who = ""
        with suppress(OSError):
            who = (folder / NAME).read_text(encoding="utf-8", errors="replace").strip()
        return (
            f"{folder}: another run writes there ({who or 'it has not given its name'}); stop it, "
            "or give this one another folder: trainer.default_root_dir, or the logger's version"
        )
    except OSError as error:
        if needed and error.errno not in _NO_LOCKS:
            return f"{folder} cannot be written: {error.strerror}; make room, or choose another"
        tell(f"{folder} cannot be locked ({error.strerror}); let no other run write there")
    return ""


def _take(folder: Path) -> None:
    """Take the lock and write our name; raises BlockingIOError if another process holds it."""
    if folder not in _held:
        _held[folder] = _locked(folder)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    who = f"pid {os.getpid()} on {socket.gethostname()} since {since}\n"
    os.ftruncate(_held[folder], 0)
    os.pwrite(_held[folder], who.encode(), 0)


def _locked(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor  # the file was not replaced meanwhile
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(descriptor)
            if error.errno in _TAKEN:
                raise BlockingIOError(error.errno, error.strerror) from error
            raise
        os.close(descriptor)
