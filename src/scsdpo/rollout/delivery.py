"""How files of weights get from the trainer to vLLM servers."""

import functools
import http.server
import secrets
import shutil
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

import torch
from safetensors.torch import save_file
from torch import Tensor

from scsdpo.rollout.weights import StreamHash

_SHARD_BYTES = 2**31
"""Size from which the next tensor goes into another file; bounds the memory of writing."""


class Delivery(ABC):
    """A way to the servers for files of weights."""

    @abstractmethod
    def open(self) -> Path:
        """The folder to write into; it exists. A second call gives the same one."""

    @abstractmethod
    def locations(self, files: Sequence[Path]) -> list[str]:
        """Where a server finds `files` of that folder: paths or URLs."""

    @abstractmethod
    def close(self) -> None:
        """Stop and tidy up."""


class SharedFolder(Delivery):
    """Files in a folder that trainer and servers see under the same path.

    Args:
        path: the folder, absolute; it is made if it is not there. Weights of the last two versions
            lie in it.

    Raises:
        ValueError: if `path` is not absolute.
    """

    def __init__(self, path: str) -> None:
        if not Path(path).is_absolute():
            raise ValueError(
                f"`SharedFolder(path=...)` must be absolute, got {path!r}: a server has a working "
                "directory of its own"
            )
        self.path = Path(path)

    def open(self) -> Path:
        self.path.mkdir(parents=True, exist_ok=True)
        return self.path

    def locations(self, files: Sequence[Path]) -> list[str]:
        return [str(file) for file in files]

    def close(self) -> None:
        """The folder is the user's, and stays."""


class Download(Delivery):
    """The trainer serves the files over HTTP, and each server's workers download them.

    Args:
        host: name or address under which the servers reach the trainer; it listens there only.
        port: 0: any that is free.

    Raises:
        ValueError: if `port` is not one.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        if not 0 <= port < 2**16:
            raise ValueError(f"`Download(port=...)` must be in [0, 65535], got {port}")
        self.host, self.port = host, port
        self._folder: Path | None = None
        self._server: http.server.ThreadingHTTPServer | None = None

    def open(self) -> Path:
        if self._folder is None:
            # A name that cannot be guessed: whoever knows it can read the weights.
            folder = Path(tempfile.mkdtemp(prefix="scsdpo-")) / secrets.token_hex(16)
            folder.mkdir()
            handler = functools.partial(_Quiet, directory=str(folder.parent))
            self._server = http.server.ThreadingHTTPServer((self.host, self.port), handler)
            threading.Thread(target=self._server.serve_forever, daemon=True).start()
            self._folder = folder
        return self._folder

    def locations(self, files: Sequence[Path]) -> list[str]:
        assert self._server is not None and self._folder is not None
        port = self._server.server_address[1]
        names = [quote(str(file.relative_to(self._folder.parent))) for file in files]
        return [f"http://{self.host}:{port}/{name}" for name in names]

    def close(self) -> None:
        if self._server is not None and self._folder is not None:
            self._server.shutdown()
            self._server.server_close()
            shutil.rmtree(self._folder.parent)
            self._server = self._folder = None


class _Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without a line on the terminal for each, and no listing of folders."""

    def log_message(self, format: str, *args: object) -> None:
        pass

    def list_directory(self, path: object) -> None:
        self.send_error(403)


def write_weights(
    weights: Iterable[tuple[str, Tensor]], folder: Path, *, dtype: torch.dtype, keep: bool
) -> tuple[list[Path], str]:
    """Write (name, value) pairs into safetensors files in a new `folder`.

    Args:
        weights: is iterated to its end.
        folder: must not exist yet, or hold an earlier try.
        dtype: to which floating point values are rounded.
        keep: False: only iterate (another rank writes, and sharded weights need everyone).

    Returns:
        The files, and the `StreamHash` of what they hold.
    """
    files: list[Path] = []
    shard: dict[str, Tensor] = {}
    stream = StreamHash()

    def flush() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        files.append(folder / f"{len(files):05d}.safetensors")
        save_file(shard, files[-1])
        shard.clear()

    for name, value in weights:
        if not keep:
            continue
        value = value.detach().to(dtype)
        stream.add(name, value)
        shard[name] = value.cpu().contiguous()
        if sum(tensor.nbytes for tensor in shard.values()) >= _SHARD_BYTES:
            flush()
    if shard:
        flush()
    return files, stream.hexdigest()
