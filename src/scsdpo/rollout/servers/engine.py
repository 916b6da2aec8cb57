"""vLLM servers by URL: requests are spread over them, and weights are sent to them."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import torch

from scsdpo.distributed import rank_and_size
from scsdpo.errors import ConfigurationError, TrainingStopped
from scsdpo.policy import CausalLM
from scsdpo.policy.sharding import is_sharded
from scsdpo.rollout.servers.delivery import Delivery, Download, ServerSink
from scsdpo.rollout.servers.event_loop import EventLoop
from scsdpo.rollout.servers.nccl import Nccl
from scsdpo.rollout.servers.request_queue import (
    RequestQueue,
    Stranded,
    agreed_dtype,
    no_usable_server,
)
from scsdpo.rollout.servers.require_key import KEY_VARIABLE
from scsdpo.rollout.servers.server import ADAPTERS, NotNow, Server, Unreachable
from scsdpo.rollout.servers.watched_server import PAUSE, WatchedServer
from scsdpo.rollout.vllm.rollout import Engine, EngineAnswer, PendingAnswers, Request
from scsdpo.rollout.weights.stream import LoraTransport, WeightStream


class Servers(Engine):
    """One or several vLLM servers, each with the whole model; requests are spread over them.

    Each server takes the next request when it has room. A server that does not answer, was
    restarted or has other weights is set aside: its requests go to the others, and it gets the
    weights again in the background. The run stops, and says why, only if no server can be used for
    `patience` seconds. Rank 0 sends the weights, at any time also to servers that were restarted.
    The other ranks use a server once it has their weights, which they recognise by the label
    (`Versions`). A server belongs to one run at a time.

    Args:
        urls: e.g. `[http://node1:8000, http://node2:8000]`.
        delivery: how weights are sent: `SharedFolder(...)`, `Download(...)` or `Nccl(...)`.
        patience: seconds without a usable server after which the run stops. A server that has
            requests and does not answer for as long is set aside.
        timeout: seconds for one request, or for one load of weights. The run stops at the latest
            patience + 2 timeout seconds after the last response.
        key: environment variable with the servers' key; if it is unset, no key is sent.
        adapter: how the LoRA of a policy is sent: `merged` into the weights, which are all sent at
            each step, or `alone`, beside the base. `auto`: alone if all servers support it.

    Raises:
        ValueError: if there is no URL, one is not http, a number is not positive, or `key` cannot
            be the name of a variable.
        ConfigurationError: from `generate`, if a server was started without a flag that is needed.
        TrainingStopped: from `generate`, if no server can be used.
    """

    def __init__(
        self,
        urls: list[str],
        delivery: Delivery,
        patience: float = 60.0,
        timeout: float = 600.0,
        key: str = KEY_VARIABLE,
        adapter: LoraTransport = "auto",
    ) -> None:
        wrong = [url for url in urls if not _is_http(url)]
        if wrong or not urls:
            raise ValueError(
                "`Servers(urls=...)` must be URLs such as http://localhost:8000, got "
                f"{wrong[0] if wrong else 'none'}"
            )
        for name, value in (("patience", patience), ("timeout", timeout)):
            if value <= 0:
                raise ValueError(f"`Servers({name}=...)` must be > 0, got {value}")
        if not key.isidentifier():
            raise ValueError(
                "`Servers(key=...)` must be the name of an environment variable, not the key itself"
            )
        self.servers = [Server(url, key) for url in urls]
        self.delivery = delivery
        self.patience = patience
        self.timeout = timeout
        self.adapter = adapter
        self._helper = Download(delivery.host if isinstance(delivery, Nccl) else "127.0.0.1")
        self._sink: ServerSink | None = None
        self._version = ""
        """Label of the weights that servers get."""
        self._together = False
        """Weights are sharded, so that all ranks gather them together."""
        self._loop: EventLoop | None = None
        self._changed = asyncio.Event()
        self._watched: list[WatchedServer] = []
        self._published: list[str] = []
        """Labels of published weights, oldest first, from those of the oldest open request on."""
        self._behind: list[_PendingAnswers] = []
        """Requests that servers answer while the trainer does other things, in their order."""

    def generate(
        self, policy: CausalLM, requests: Sequence[Request], version: str
    ) -> list[list[EngineAnswer]]:
        loop = self._loop or self._start()
        queue = self._queue(requests, version)
        if version != self._version:
            self._publish(loop, policy, version)
        while True:
            with suppress(Stranded):
                return loop.run(queue.run())
            self._publish(loop, policy, version)

    @property
    def answers_behind(self) -> bool:
        return True

    def begin(self, requests: Sequence[Request], version: str, *, within: bool) -> PendingAnswers:
        loop = self._loop
        assert loop is not None and version == self._version, "call it inside `hold_weights`"
        for watched in self._watched:
            watched.draws_behind, watched.within = True, within
        queue = self._queue(
            requests,
            version,
            published=self._published,
            before=[each.queue for each in self._behind],
        )
        self._behind.append(_PendingAnswers(queue, loop))
        return self._behind[-1]

    def _queue(
        self,
        requests: Sequence[Request],
        version: str,
        *,
        published: Sequence[str] = (),
        before: Sequence[RequestQueue] = (),
    ) -> RequestQueue:
        return RequestQueue(
            requests,
            version,
            self._watched,
            published=published,
            before=before,
            patience=self.patience,
            timeout=self.timeout,
            changed=self._changed,
        )

    @contextmanager
    def hold_weights(
        self, policy: CausalLM, version: str, *, barrier: bool = True
    ) -> Iterator[None]:
        """Publish the weights, on all ranks; inside, each rank may sample any number of times."""
        self._publish(self._loop or self._start(), policy, version)
        yield

    def close(self) -> None:
        if self._loop is not None:
            self._loop.close()
            self._loop = None
        self._version, self._sink = "", None
        self._published, self._behind = [], []
        self.delivery.close()
        self._helper.close()

    def _start(self) -> EventLoop:
        self._loop = loop = EventLoop()
        self._changed = asyncio.Event()
        self._sink = ServerSink(self.delivery, self._helper, loop)
        self._watched = [
            WatchedServer(
                server=server,
                bring=self._bring if rank_and_size()[0] == 0 else None,
                patience=self.patience,
                timeout=self.timeout,
                changed=self._changed,
            )
            for server in self.servers
        ]
        for watched in self._watched:
            loop.start(watched.keep())
        return loop

    async def _bring(self, server: Server) -> None:
        assert self._sink is not None
        try:
            await self._sink.bring(server, self.timeout)
        except NotNow as error:
            if self._together:  # the other ranks are sampling
                raise Unreachable(str(error)) from error
            raise

    def _publish(self, loop: EventLoop, policy: CausalLM, version: str) -> None:
        """Publish the weights that servers get, unless they are published already.

        If weights are sharded, this is a collective.
        """
        self._together = is_sharded(policy)
        self._behind = [each for each in self._behind if not each.is_done]
        needed = self._behind[0].queue.version if self._behind else ""
        while self._published and self._published[0] != needed:
            del self._published[0]
        if self._published[-1:] != [version]:  # before a server can answer with them
            self._published.append(version)
        leads = rank_and_size()[0] == 0
        with closing(WeightStream(policy, self.adapter, led=True)) as stream:
            if leads and (version != self._version or self.delivery.due):
                self._version = ""
                loop.call(lambda: self._want(""))
                self._send(loop, stream, version)
        self._version = version
        loop.call(lambda: self._want(version))

    def _send(self, loop: EventLoop, stream: WeightStream, version: str) -> None:
        assert self._sink is not None
        dtype, described = loop.run(self._known())
        self._sink.servers = [each.server for each in self._watched if each.there]
        if self.delivery.at_once and any(each.draws_behind for each in self._watched):
            with self._paused(loop):
                self._deliver(stream, version, dtype, described)
        else:
            self._deliver(stream, version, dtype, described)

    @contextmanager
    def _paused(self, loop: EventLoop) -> Iterator[None]:
        """Let servers complete their responses, and pause them while their weights change."""
        assert self._sink is not None
        servers = self._sink.servers

        async def every(act: Callable[[Server], Coroutine[Any, Any, None]]) -> None:
            # The calls that follow find a server that failed.
            await asyncio.gather(*map(act, servers), return_exceptions=True)

        loop.run(every(lambda server: server.pause(self.timeout)))
        try:
            yield
        finally:
            loop.start(every(Server.resume)).result()

    def _deliver(
        self,
        stream: WeightStream,
        version: str,
        dtype: torch.dtype,
        described: dict[Server, dict[str, Any]],
    ) -> None:
        assert self._sink is not None
        supported = None if stream.rank is None else self._adaptable(stream.rank, described)
        self._sink.send(stream, version, dtype, supported)

    def _adaptable(self, rank: int, described: dict[Server, dict[str, Any]]) -> list[str] | None:
        """Last parts of names of modules that every server can adapt; None if one supports none."""
        found: set[str] | None = None
        for server, said in described.items():
            takes = said["adapters"]
            if not takes or not takes["updates"] or takes["rank"] < rank:
                if self.adapter == "alone":
                    raise ConfigurationError(
                        f"model.rollout.engine.adapter: the vLLM server {server.url} does not "
                        f"support adapters of rank {rank}: start it with {ADAPTERS} {rank}, or set "
                        "adapter to merged"
                    )
                return None
            found = set(takes["modules"]) if found is None else found & set(takes["modules"])
        return sorted(found or ())

    def _want(self, version: str) -> None:
        for watched in self._watched:
            watched.want(version)

    async def _known(self) -> tuple[torch.dtype, dict[Server, dict[str, Any]]]:
        """(dtype of the servers' weights, server -> its description), of those that answer now."""
        start = time.monotonic()
        while True:
            dtype = agreed_dtype(self._watched)
            if dtype and all(each.looked for each in self._watched):
                said = {each.server: each.described for each in self._watched if each.described}
                return getattr(torch, dtype), said
            if (waited := time.monotonic() - start) > self.patience:
                raise no_usable_server(self._watched, waited)
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(PAUSE):
                    await self._changed.wait()


class _PendingAnswers(PendingAnswers):
    """The answers of a queue that runs in the event loop.

    Args:
        queue: queue of the requests.
        loop: event loop in which to run it.
    """

    def __init__(self, queue: RequestQueue, loop: EventLoop) -> None:
        self.queue, self._loop = queue, loop
        self._run = loop.start(queue.run())

    @property
    def is_done(self) -> bool:
        return self._run.done() and not self._run.cancelled() and not self._run.exception()

    def answers(self, publish: Callable[[], None]) -> list[list[EngineAnswer]]:
        if self._run.done() and isinstance(self._run.exception(), TrainingStopped):
            # Nobody waited for it until now, and servers may work again.
            self.queue.forgive()
            self._run = self._loop.start(self.queue.run())
        while True:
            with suppress(Stranded):
                return self._loop.result(self._run)
            publish()
            self._run = self._loop.start(self.queue.run())


def _is_http(url: str) -> bool:
    """True if `url` is a valid HTTP URL; reading its port raises if that is out of range."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
