"""Sending weights from the trainer to vLLM servers: by a shared folder or by download."""

import atexit
import fcntl
import functools
import http.server
import os
import secrets
import shutil
import socket
import tempfile
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import quote

import torch
from torch import Tensor

from scsdpo.errors import ConfigurationError
from scsdpo.rollout.servers.event_loop import EventLoop
from scsdpo.rollout.servers.server import ADAPTERS, Server, Unreachable
from scsdpo.rollout.weights.files import write_adapter, write_weights
from scsdpo.rollout.weights.stream import Sink, WeightPass

_IDLE = 60.0
"""Seconds without traffic after which a connection is closed."""
_PREFIX = "scsdpo-run-"
"""Start of the names of runs' folders."""
_OWNER = "owner"
"""File in a run's folder that its process locks."""


class Delivery(ABC):
    """A way to send weights to servers. Only rank 0 uses it."""

    due = False
    """True: servers need another `publish`, although the weights are the same."""
    at_once = False
    """True: `publish` changes the servers' weights. False: `bring` does."""

    @abstractmethod
    def publish(
        self,
        weights: WeightPass,
        *,
        version: str,
        dtype: torch.dtype,
        servers: Sequence[Server],
        loop: EventLoop,
    ) -> None:
        """Publish the weights that servers get from now on.

        Args:
            weights: makes a pass over them; call it any number of times, and read each pass to its
                end.
            version: label of the weights.
            dtype: dtype of the servers' weights.
            servers: servers that answered at the last check.
            loop: event loop in which to call their endpoints.
        """

    @abstractmethod
    async def bring(self, server: Server, timeout: float) -> None:
        """Let one server load the weights that were published last, and label them.

        Raises:
            NotNow: if the server needs another `publish`.
            Unreachable: if the server does not load them.
        """

    @abstractmethod
    def close(self) -> None:
        """Free all resources; a later `publish` may start again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Offer:
    """Files that servers can load now."""

    version: str
    folder: Path
    locations: list[str]
    """Paths or URLs of the files."""
    hash: str
    """`StreamHash` of weights, `adapter_hash` of an adapter."""


class Files(Delivery):
    """Sends weights as safetensors files in a folder of this run, one version at a time.

    The files of the last version are removed before the next ones are written, or once the last
    server has read them. Files of an adapter can be published beside them.
    """

    def __init__(self) -> None:
        self._folder: RunFolder | None = None
        self._offers: dict[str, _Offer] = {}
        """`weights` or `adapter` -> their files."""
        self._readers: Counter[Path] = Counter()
        self._lock = threading.Lock()

    @abstractmethod
    def open(self) -> Path:
        """The existing folder to write into; each call returns the same one."""

    @abstractmethod
    def locations(self, files: Sequence[Path]) -> list[str]:
        """Paths or URLs by which a server reads `files` of that folder."""

    def publish(
        self,
        weights: WeightPass,
        *,
        version: str,
        dtype: torch.dtype,
        servers: Sequence[Server],
        loop: EventLoop,
    ) -> None:
        self._offer("weights", version, version, lambda f: write_weights(weights(dtype), f))

    async def bring(self, server: Server, timeout: float) -> None:
        with self._reading("weights") as offer:
            await server.load(offer.locations, offer.hash, offer.version, timeout)

    def publish_adapter(self, weights: dict[str, Tensor], version: str) -> None:
        """Publish the adapter that servers get; `version` labels base and adapter together."""
        self._offer("adapter", version, f"adapter-{version}", lambda f: write_adapter(weights, f))

    async def bring_adapter(self, server: Server, timeout: float) -> None:
        """Let one server load the adapter that was published last, and label its weights."""
        with self._reading("adapter") as offer:
            await server.load_adapter(offer.locations, offer.hash, offer.version, timeout)

    def close(self) -> None:
        for kind in list(self._offers):
            self.withdraw(kind)
        if self._folder is not None:
            self._folder.close()
            self._folder = None

    def withdraw(self, kind: str) -> None:
        """Stop offering the files of `kind`; remove them unless a server is reading them."""
        with self._lock:
            offer = self._offers.pop(kind, None)
            if offer is not None and not self._readers[offer.folder]:
                remove(offer.folder)

    def _offer(
        self, kind: str, version: str, name: str, write: Callable[[Path], tuple[list[Path], str]]
    ) -> None:
        self.withdraw(kind)
        folder = self.open() / name
        remove(folder)  # left by an earlier try
        try:
            files, sent = write(folder)
        except BaseException:
            remove(folder)
            raise
        locations = self.locations(files)
        self._offers[kind] = _Offer(version=version, folder=folder, locations=locations, hash=sent)

    @contextmanager
    def _reading(self, kind: str) -> Iterator[_Offer]:
        """Keep the offered files until the end of the block."""
        with self._lock:
            offer = self._offers.get(kind)
            if offer is None:
                raise Unreachable("no weights are published at the moment")
            self._readers[offer.folder] += 1
        try:
            yield offer
        finally:
            with self._lock:
                self._readers[offer.folder] -= 1
                if offer is not self._offers.get(kind) and not self._readers[offer.folder]:
                    remove(offer.folder)


class SharedFolder(Files):
    """Sends files in a folder that trainer and servers see under the same path.

    Args:
        path: absolute path of the folder; created if it does not exist. Each run writes into its
            own subfolder, so several runs can share it. On one machine `/dev/shm` needs no disk.

    Raises:
        ValueError: if `path` is not absolute.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        if not Path(path).is_absolute():
            raise ValueError(
                f"`SharedFolder(path=...)` must be absolute, got {path!r}: a server has another "
                "working directory"
            )
        self.path = Path(path)

    def open(self) -> Path:
        self._folder = self._folder or RunFolder(self.path)
        return self._folder.path

    def locations(self, files: Sequence[Path]) -> list[str]:
        return [str(file) for file in files]


class Download(Files):
    """The trainer serves the files over HTTP, and each server's workers download them.

    Args:
        host: name or address under which the servers reach the trainer; it listens there only.
        port: port to listen on; 0: any free one.

    Raises:
        ValueError: if `port` is not in [0, 65535].
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__()
        if not 0 <= port < 2**16:
            raise ValueError(f"`Download(port=...)` must be in [0, 65535], got {port}")
        self.host, self.port = host, port
        self._secret = secrets.token_hex(16)
        """Part of the URLs: clients that know it can read the weights."""
        self._server: _FileServer | None = None

    def open(self) -> Path:
        if self._folder is None:
            folder = RunFolder(Path(tempfile.gettempdir()), mode=0o700)
            served = folder.path / "served"
            (served / self._secret).mkdir(parents=True)
            handler = functools.partial(_Quiet, directory=str(served))
            try:
                self._server = _FileServer((self.host, self.port), handler)
            except OSError:
                folder.close()
                raise
            threading.Thread(target=self._server.serve_forever, daemon=True).start()
            self._folder = folder
        return self._folder.path / "served" / self._secret

    def locations(self, files: Sequence[Path]) -> list[str]:
        assert self._server is not None
        port, folder = self._server.server_address[1], self.open()
        names = [f"{self._secret}/{quote(str(file.relative_to(folder)))}" for file in files]
        return [f"http://{self.host}:{port}/{name}" for name in names]

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        super().close()


class _FileServer(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Print no traceback: the client is gone or too slow, and reports that itself."""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without log lines, and lists no folders."""

    timeout = _IDLE

    def log_message(self, format: str, *args: object) -> None:
        pass

    def list_directory(self, path: object) -> None:
        self.send_error(403)


class ServerSink(Sink):
    """Loads weights into servers by a delivery, and adapters always as files.

    Args:
        delivery: sends weights.
        helper: sends adapters if `delivery` is not `Files`.
        loop: event loop in which the servers' endpoints are called.
    """

    def __init__(self, delivery: Delivery, helper: Download, loop: EventLoop) -> None:
        super().__init__()
        self.delivery, self.loop = delivery, loop
        self.servers: Sequence[Server] = ()
        """Servers that answered at the last check."""
        self._files = delivery if isinstance(delivery, Files) else helper
        self._has_adapter = False

    @property
    def due(self) -> bool:  # type: ignore[override]
        return self.delivery.due

    def load(self, weights: WeightPass, version: str, dtype: torch.dtype) -> None:
        self._has_adapter = False
        self._files.withdraw("adapter")
        self.delivery.publish(
            weights, version=version, dtype=dtype, servers=self.servers, loop=self.loop
        )

    def load_adapter(self, weights: dict[str, Tensor], version: str) -> None:
        self._files.publish_adapter(weights, version)
        self._has_adapter = True

    async def bring(self, server: Server, timeout: float) -> None:
        """Let one server load the weights, and the adapter, that were sent last, and label them.

        Raises:
            NotNow: if the server needs another `publish`.
            Unreachable: if the server does not load them.
            ConfigurationError: if the server was started without support for adapters.
        """
        if not self._has_adapter:
            await self.delivery.bring(server, timeout)
            return
        seen = await server.describe()
        if not seen["adapters"] or not seen["adapters"]["updates"]:
            raise ConfigurationError(
                f"model.rollout.engine.adapter: the vLLM server {server.url} was started without "
                f"support for adapters: start it with {ADAPTERS} R, or set adapter to merged"
            )
        if seen["loaded"] != self.base_hash.hexdigest():
            await self.delivery.bring(server, timeout)
        await self._files.bring_adapter(server, timeout)


def remove(folder: Path) -> None:
    """Remove a folder with its contents; do nothing if it does not exist."""
    shutil.rmtree(folder, ignore_errors=True)


class RunFolder:
    """A new folder under `parent`.

    It holds a file with the host's name, which is locked while this process lives. The constructor
    removes folders whose lock is free and that this host made: those of killed runs.

    Args:
        parent: parent folder; created if it does not exist.
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
        """Remove the folder with its contents; the interpreter's exit does so too."""
        atexit.unregister(self.close)
        if os.getpid() == self._pid:  # a forked process must not remove it
            remove(self.path)
        self._owner.close()

    def _claim(self) -> IO[str]:
        """Write and lock the owner's file, then rename it, so that it is never seen unlocked."""
        unnamed = self.path / "claim"
        owner = unnamed.open("w")
        with suppress(OSError):  # no locks on this file system: only `close` removes the folder
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            owner.write(socket.gethostname())
            owner.flush()
            unnamed.rename(self.path / _OWNER)
        return owner


def _remove_if_left(folder: Path) -> None:
    # An OSError means that we may not read it, that it is gone, or that its lock is held.
    with suppress(OSError), (folder / _OWNER).open("r+") as owner:
        if owner.read() == socket.gethostname():
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(folder)
