"""The trainer and the workers of servers, joined by vLLM's weight transfer engine."""

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, wait
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scsdpo import interrupt
from scsdpo.errors import ConfigurationError, first_line
from scsdpo.rollout.servers.event_loop import EventLoop
from scsdpo.rollout.servers.server import SHORT, Server
from scsdpo.rollout.weights.hashing import Receipt, StreamHash, refusal

_LOOK = 0.1
"""Seconds between two looks at a transfer."""


class Declared(NamedTuple):
    """A weight as it is announced to vLLM before it comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class TransferFailed(Exception):
    """A transfer did not reach its end; its group is of no use any more."""


class Source:
    """The weights of a transfer, as vLLM's trainer engine reads them.

    All that was declared is sent, with zeros in place of what does not come: workers that wait for
    a tensor for ever could not be reached any more. `error` then says what was wrong.
    """

    def __init__(self) -> None:
        self.declared: list[Declared] = []
        self.error: Exception | None = None
        self.hash = StreamHash()
        self._start: Callable[[], Iterator[tuple[str, Tensor]]] = lambda: iter(())
        self._device = torch.device("cpu")

    def declare(self, start: Callable[[], Iterator[tuple[str, Tensor]]]) -> None:
        """Take the weights from `start`; the first time a pass finds out what there is."""
        self._start = start
        if not self.declared:
            for name, value in start():
                self.declared.append(Declared(name, value.dtype, tuple(value.shape)))
                self._device = value.device

    def metadata(self) -> list[Declared]:
        """The declared weights, under vLLM's name for them."""
        return self.declared

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self.hash, self.error = StreamHash(), None
        stream = self._start()
        for expected in self.declared:
            value = self._next(stream, expected)
            self.hash.add(expected.name, value)
            yield expected.name, value

    def _next(self, stream: Iterator[tuple[str, Tensor]], expected: Declared) -> Tensor:
        if self.error is None:
            try:
                name, value = next(stream, ("nothing", torch.empty(0)))
                came = Declared(name, value.dtype, tuple(value.shape))
                if came == expected:
                    return value
                self.error = ValueError(f"{expected} was declared, and {came} came")
            except Exception as error:
                self.error = error
        return torch.zeros(expected.shape, dtype=expected.dtype, device=self._device)


class Group:
    """The trainer and all workers of some servers, joined for transfers; vLLM's client of them.

    Ranks: the trainer is 0, then come the workers of one server after the other.

    Args:
        servers: and how many workers each has.
        loop: where their endpoints are called.
        timeout: seconds for joining, and for a transfer.
    """

    def __init__(self, servers: dict[Server, int], loop: EventLoop, timeout: float) -> None:
        self.servers, self.loop, self.timeout = servers, loop, timeout
        self.source = Source()
        self.refused: dict[str, str] = {}
        """Servers that must not be sampled from, and why."""
        self._version = ""
        self._received: dict[Server, list[Receipt]] = {}
        self._engine: Any = None
        self._failure: Exception | None = None
        self._leaving = threading.Lock()

    def join(self, host: str, buffer_bytes: int) -> None:
        """Make it.

        Raises:
            TransferFailed: if a server does not come.
        """
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        info = NCCLTrainerInitInfo(
            master_address=host,
            master_port=_free_port(),
            world_size=1 + sum(self.servers.values()),
            packed_buffer_size_bytes=buffer_bytes,
            rank=0,
        )

        def make() -> None:
            self._engine = WeightTransferTrainerFactory.trainer_init(
                info, client=self, source=self.source
            )

        self._wait(_in_thread(make))

    def send(self, start: Callable[[], Iterator[tuple[str, Tensor]]], version: str) -> None:
        """Send the weights to all, and label them.

        Raises:
            TransferFailed: if a server does not come to the end.
        """
        self._version, self.refused = version, {}
        self.source.declare(start)
        work = _in_thread(self._engine.send_weights)
        try:
            self._wait(work)
        except BaseException:
            self.leave()
            wait([work], SHORT)  # then it takes no more from this pass over the weights
            raise

    def leave(self) -> None:
        """Give it up; a transfer that hangs is let go."""
        with self._leaving:
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.shutdown()

    def _wait(self, work: Future[None]) -> None:
        """Until it is done, or a server failed: the other side may then wait for ever."""
        deadline = time.monotonic() + self.timeout + SHORT
        while self._failure is None and wait([work], _LOOK).not_done:
            interrupt.check()
            if time.monotonic() > deadline:
                raise TransferFailed(f"not done within {self.timeout:g} s")
        error = self._failure or work.exception()
        if isinstance(error, ConfigurationError):
            raise error
        if error is not None:
            raise TransferFailed(first_line(error)) from error

    # ------------------------------------------------- called by vLLM, in its threads

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let every server join, after the workers of those before it."""
        offsets, offset = {}, 1
        for server, workers in self.servers.items():
            offsets[server], offset = offset, offset + workers
        self._all(lambda s: s.join(init_info | {"rank_offset": offsets[s]}, self.timeout))

    def start_weight_update(self) -> None:
        """From now on they have no policy's weights."""
        self._all(lambda server: server.label(f"loading {self._version}"))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Let them receive; if one does not, the sender must not wait for it."""

        async def receive(server: Server) -> None:
            self._received[server] = await server.receive(update_info, self.timeout)

        try:
            self._all(receive)
        except BaseException:
            self.leave()
            raise

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Label those that have what was sent."""
        if self.source.error is None:
            self._all(self._finish)

    async def _finish(self, server: Server) -> None:
        sent = self.source.hash.hexdigest()
        for worker in self._received[server]:
            if why := refusal(worker, sent):
                self.refused[server.url] = why
                return
        await server.forget()
        await server.label(self._version)

    def _all(self, act: Callable[[Server], Coroutine[Any, Any, None]]) -> None:
        async def every() -> None:
            tasks = [asyncio.ensure_future(act(server)) for server in self.servers]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()

        try:
            self.loop.start(every()).result()
        except Exception as error:
            self._failure = error
            raise


def _in_thread(work: Callable[[], None]) -> Future[None]:
    """Do it where it can be left alone if it hangs."""
    future: Future[None] = Future()
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
                torch.cuda.synchronize()  # vLLM reads the weights on streams of its own
            work()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]
