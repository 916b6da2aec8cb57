"""Ways for weights from the trainer to vLLM servers."""

import functools
import http.server
import secrets
import tempfile
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import torch
from torch import Tensor

from scsdpo.errors import ConfigurationError
from scsdpo.rollout.servers.event_loop import EventLoop
from scsdpo.rollout.servers.run_folder import RunFolder, remove
from scsdpo.rollout.servers.server import ADAPTERS, Server, Unreachable
from scsdpo.rollout.weights.files import write_adapter, write_weights
from scsdpo.rollout.weights.stream import Sink, Weights

_IDLE = 60.0
"""Seconds after which a connection that does nothing is closed."""


class Delivery(ABC):
    """A way to the servers for weights. On rank 0 alone."""

    due = False
    """Servers need another `publish`, though the weights are the same."""
    at_once = False
    """`publish` itself changes the weights of servers; else `bring` does."""

    @abstractmethod
    def publish(
        self,
        weights: Weights,
        *,
        version: str,
        dtype: torch.dtype,
        servers: Sequence[Server],
        loop: EventLoop,
    ) -> None:
        """Make these the weights that servers get.

        Args:
            weights: any number of passes; each is iterated to its end.
            version: their label.
            dtype: of the servers.
            servers: those that answered when they were looked at last.
            loop: where their endpoints are called.
        """

    @abstractmethod
    async def bring(self, server: Server, timeout: float) -> None:
        """Let one server load what was published last, and label it.

        Raises:
            NotNow: if only another `publish` can.
            Unreachable: if it does not.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop and tidy up; `publish` may begin again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Offer:
    """Files that servers can load."""

    version: str
    folder: Path
    locations: list[str]
    """Paths or URLs of the files."""
    hash: str
    """`StreamHash` of weights, `adapter_hash` of an adapter."""


class Files(Delivery):
    """Weights as safetensors files in a folder of this run, one version at a time.

    The files of the last version are removed before the next ones are written; if a server is
    still reading them, then when it is done. An adapter can lie beside them.
    """

    def __init__(self) -> None:
        self._folder: RunFolder | None = None
        self._offers: dict[str, _Offer] = {}
        """By what they are: weights, and an adapter."""
        self._readers: Counter[Path] = Counter()
        self._lock = threading.Lock()

    @abstractmethod
    def open(self) -> Path:
        """The folder to write into; it exists. A second call gives the same one."""

    @abstractmethod
    def locations(self, files: Sequence[Path]) -> list[str]:
        """Where a server finds `files` of that folder: paths or URLs."""

    def publish(
        self,
        weights: Weights,
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
        """Make this the adapter that servers get, with the label of base and adapter together."""
        self._offer("adapter", version, f"adapter-{version}", lambda f: write_adapter(weights, f))

    async def bring_adapter(self, server: Server, timeout: float) -> None:
        """Let one server load the adapter that was published last, and label it."""
        with self._reading("adapter") as offer:
            await server.load_adapter(offer.locations, offer.hash, offer.version, timeout)

    def close(self) -> None:
        for kind in list(self._offers):
            self.withdraw(kind)
        if self._folder is not None:
            self._folder.close()
            self._folder = None

    def withdraw(self, kind: str) -> None:
        """Remove files that are offered, unless a server reads them, who gets the next ones."""
        with self._lock:
            offer = self._offers.pop(kind, None)
            if offer is not None and not self._readers[offer.folder]:
                remove(offer.folder)

    def _offer(
        self, kind: str, version: str, name: str, write: Callable[[Path], tuple[list[Path], str]]
    ) -> None:
        self.withdraw(kind)
        folder = self.open() / name
        remove(folder)  # an earlier try
        try:
            files, sent = write(folder)
        except BaseException:
            remove(folder)
            raise
        locations = self.locations(files)
        self._offers[kind] = _Offer(version=version, folder=folder, locations=locations, hash=sent)

    @contextmanager
    def _reading(self, kind: str) -> Iterator[_Offer]:
        """The files stay until the end of the block."""
        with self._lock:
            offer = self._offers.get(kind)
            if offer is None:
                raise Unreachable("there are no weights for it at the moment")
            self._readers[offer.folder] += 1
        try:
            yield offer
        finally:
            with self._lock:
                self._readers[offer.folder] -= 1
                if offer is not self._offers.get(kind) and not self._readers[offer.folder]:
                    remove(offer.folder)


class SharedFolder(Files):
    """Files in a folder that trainer and servers see under the same path.

    Args:
        path: the folder, absolute; it is made if it is not there. Each run writes into a folder of
            its own in it, so several can share it. In `/dev/shm` weights of one machine need no
            disk.

    Raises:
        ValueError: if `path` is not absolute.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        if not Path(path).is_absolute():
            raise ValueError(
                f"`SharedFolder(path=...)` must be absolute, got {path!r}: a server has a working "
                "directory of its own"
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
        port: 0: any that is free.

    Raises:
        ValueError: if `port` is not one.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__()
        if not 0 <= port < 2**16:
            raise ValueError(f"`Download(port=...)` must be in [0, 65535], got {port}")
        self.host, self.port = host, port
        self._secret = secrets.token_hex(16)
        """Whoever knows it can read the weights."""
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
        """No traceback: the client is gone or too slow, and notices it."""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without a line on the terminal for each, and no listing of folders."""

    timeout = _IDLE

    def log_message(self, format: str, *args: object) -> None:
        pass

    def list_directory(self, path: object) -> None:
        self.send_error(403)


class ServerSink(Sink):
    """Servers' end of the stream: weights by the delivery, an adapter always as files.

    Args:
        delivery: brings weights.
        helper: brings adapters if `delivery` has no files of its own.
        loop: where the servers' endpoints are called.
    """

    def __init__(self, delivery: Delivery, helper: Download, loop: EventLoop) -> None:
        super().__init__()
        self.delivery, self.loop = delivery, loop
        self.servers: Sequence[Server] = ()
        """Those that answered when they were looked at last."""
        self._files = delivery if isinstance(delivery, Files) else helper
        self._has_adapter = False

    @property
    def due(self) -> bool:  # type: ignore[override]
        return self.delivery.due

    def load(self, weights: Weights, version: str, dtype: torch.dtype) -> None:
        self._has_adapter = False
        self._files.withdraw("adapter")
        self.delivery.publish(
            weights, version=version, dtype=dtype, servers=self.servers, loop=self.loop
        )

    def load_adapter(self, weights: dict[str, Tensor], version: str) -> None:
        self._files.publish_adapter(weights, version)
        self._has_adapter = True

    async def bring(self, server: Server, timeout: float) -> None:
        """Let one server load what was sent last, and label it.

        Raises:
            NotNow: if it can get its weights only when they are sent again.
            Unreachable: if it does not.
            ConfigurationError: if it was started without what adapters need.
        """
        if not self._has_adapter:
            await self.delivery.bring(server, timeout)
            return
        seen = await server.describe()
        if not seen["adapters"] or not seen["adapters"]["updates"]:
            raise ConfigurationError(
                f"model.rollout.engine.adapter: the vLLM server {server.url} takes no adapters: "
                f"start it with {ADAPTERS}, or set adapter to merged"
            )
        if seen["loaded"] != self.base_hash.hexdigest():
            await self.delivery.bring(server, timeout)
        await self._files.bring_adapter(server, timeout)
