"""vLLM servers found by URL: prompts spread over them, weights brought to them."""

import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from scsdpo import interrupt
from scsdpo.errors import ConfigurationError, TrainingStopped
from scsdpo.policy import CausalLM
from scsdpo.policy.sharding import is_sharded
from scsdpo.rollout.delivery import Delivery, write_weights
from scsdpo.rollout.vllm_rollout import Answer, Engine, Request, check_length
from scsdpo.rollout.vllm_server import START, Server, Unreachable
from scsdpo.rollout.weights import merged_weights

T = TypeVar("T")

_PAUSE = 0.5
"""Seconds between two tries."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Offer:
    """Weights that servers can fetch."""

    version: str
    """The label that a server has after it loaded them."""
    folder: Path
    locations: list[str]
    """Paths or URLs of the files."""
    hash: str
    """`StreamHash` of what the files hold."""


class Servers(Engine):
    """One or several vLLM servers, each with the whole model; prompts are spread over them.

    A server that does not answer, was restarted or holds other weights is given the weights and
    asked again until `patience` is over; then the run stops and says which. Rank 0 brings the
    weights, and other ranks wait until the servers have theirs: all call weights by the same label
    (`Versions`). A server belongs to one run at a time.

    Args:
        urls: e.g. `[http://node1:8000, http://node2:8000]`.
        delivery: how weights get there, `SharedFolder(...)` or `Download(...)`.
        patience: seconds for which a server may be away before the run stops.
        timeout: seconds that one prompt's responses, or one load of weights, may take. A server
            that hangs is noticed after it: the run stops within patience + 2 timeout.

    Raises:
        ValueError: if there is no URL, one is not http or a number is not positive.
        ConfigurationError: from `generate`, if a server was started without what is needed.
        TrainingStopped: from `generate`, if a server is away for too long.
    """

    def __init__(
        self,
        urls: list[str],
        delivery: Delivery,
        patience: float = 60.0,
        timeout: float = 600.0,
    ) -> None:
        wrong = [url for url in urls if not url.startswith(("http://", "https://"))]
        if wrong or not urls:
            raise ValueError(
                "`Servers(urls=...)` must be URLs such as http://localhost:8000, got "
                f"{wrong[0] if wrong else 'none'}"
            )
        for name, value in (("patience", patience), ("timeout", timeout)):
            if value <= 0:
                raise ValueError(f"`Servers({name}=...)` must be > 0, got {value}")
        self.servers = [Server(url) for url in urls]
        self.delivery = delivery
        self.patience = patience
        self.timeout = timeout
        self._offer: _Offer | None = None
        self._described: dict[str, dict[str, Any]] = {}

    def generate(
        self, policy: CausalLM, requests: Sequence[Request], version: str
    ) -> list[list[Answer]]:
        offer = self._write(policy, version)
        shares = [requests[i :: len(self.servers)] for i in range(len(self.servers))]

        def ask(server: Server, share: Sequence[Request]) -> list[list[Answer]]:
            return self._patiently(server, lambda: self._ask(server, share, offer))

        pool = ThreadPoolExecutor(len(self.servers))
        asked = [pool.submit(ask, *each) for each in zip(self.servers, shares, strict=True)]
        pool.shutdown(wait=False)
        while wait(asked, _PAUSE).not_done:
            interrupt.check()  # the process ends then, and with its connections their requests
        parts = [each.result() for each in asked]
        return [parts[q % len(parts)][q // len(parts)] for q in range(len(requests))]

    def close(self) -> None:
        self._forget()
        self.delivery.close()

    def _patiently(self, server: Server, action: Callable[[], T]) -> T:
        """Try again while the server cannot be reached, `patience` seconds after the first time."""
        deadline = None
        while True:
            try:
                return action()
            except Unreachable as error:
                self._described.pop(server.url, None)
                deadline = deadline or time.monotonic() + self.patience
                if time.monotonic() > deadline:
                    raise TrainingStopped(
                        f"the vLLM server {server.url} is of no use since {self.patience:g} s "
                        f"({error}); no step was taken on this batch. Is it running? It starts "
                        f"with `{START}`; go on with --ckpt_path"
                    ) from error
                time.sleep(_PAUSE)

    def _ask(
        self, server: Server, requests: Sequence[Request], offer: _Offer
    ) -> list[list[Answer]]:
        """Responses under the weights of `offer`, which the server gets if it has others."""
        if _rank() != 0:
            self._await(server, offer.version)
        elif server.version() != offer.version:
            server.load(offer.locations, offer.hash, offer.version, self.timeout)
        if not requests:
            return []
        remedy = f"start the server {server.url} with a larger --max-model-len"
        check_length(requests, self._describe(server)["max_model_len"], remedy)
        answers = server.generate(requests, self.timeout)
        for row in (row for group in answers for row in group):
            if why := row.fault(offer.version):
                raise Unreachable(why)
        return answers

    def _await(self, server: Server, version: str) -> None:
        """Until rank 0 has brought the weights; a server that loads does not answer meanwhile."""
        deadline = time.monotonic() + self.timeout
        while True:
            with suppress(Unreachable):
                if server.version() == version:
                    return
            if time.monotonic() > deadline:
                raise Unreachable("has not got these weights from rank 0 yet")
            time.sleep(_PAUSE)

    def _describe(self, server: Server) -> dict[str, Any]:
        """What the server said of itself, asked anew after it was away: it may be another one."""
        if server.url not in self._described:
            self._described[server.url] = server.describe()
        return self._described[server.url]

    def _write(self, policy: CausalLM, version: str) -> _Offer:
        """The policy's weights as files of rank 0, unless they lie there already."""
        if self._offer is not None and self._offer.version == version:
            return self._offer
        writes = _rank() == 0
        folder, dtype = Path(), torch.float32
        if writes:
            folder, dtype = self.delivery.open() / version, self._dtype()
        weights = merged_weights(policy) if writes or is_sharded(policy) else ()
        files, sent = write_weights(weights, folder, dtype=dtype, keep=writes)
        self._forget()
        self._offer = _Offer(
            version=version,
            folder=folder,
            locations=self.delivery.locations(files) if writes else [],
            hash=sent,
        )
        return self._offer

    def _dtype(self) -> torch.dtype:
        """The servers' own: files in a wider one would be rounded to it anyway."""
        told = [self._patiently(s, partial(self._describe, s)) for s in self.servers]
        dtypes = sorted({seen["dtype"] for seen in told})
        if len(dtypes) > 1:
            raise ConfigurationError(
                "model.rollout.engine: the vLLM servers hold weights of different dtypes "
                f"({', '.join(dtypes)}): start them with the same --dtype"
            )
        return getattr(torch, dtypes[0])

    def _forget(self) -> None:
        """Remove the files of the last weights."""
        if self._offer is not None and self._offer.locations:
            shutil.rmtree(self._offer.folder, ignore_errors=True)
        self._offer = None


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
