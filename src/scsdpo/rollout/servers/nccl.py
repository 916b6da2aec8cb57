"""Weights over NCCL, by vLLM's own weight transfer engine.

`Nccl` is the delivery. It joins trainer and workers in a `Group`, whose `Source` is what vLLM's
engine reads the weights from.
"""

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from scsdpo import interrupt
from scsdpo.errors import ConfigurationError, TrainingStopped, first_line
from scsdpo.rollout.servers.delivery import Delivery
from scsdpo.rollout.servers.event_loop import EventLoop
from scsdpo.rollout.servers.server import SHORT, NotNow, Server, Silent, Unreachable
from scsdpo.rollout.weights.hashing import Receipt, StreamHash, refusal
from scsdpo.rollout.weights.stream import Pairs, Weights

_TRIES = 3
"""Transfers of one version, before the run stops."""
_LOOK = 0.1
"""Seconds between two looks at a transfer."""


class Nccl(Delivery):
    """Weights from GPU to GPU, by vLLM's weight transfer engine; no files.

    All servers get them at the same time, before sampling. One that is restarted meanwhile gets
    them at the next sampling, or when no other is left (under shards the run stops then). A
    transfer that fails is made again, with a new group of those servers that still answer. The
    servers are started with `--weight-transfer-config`, and the trainer has vLLM installed too.

    Args:
        host: name or address under which the servers reach the trainer.
        timeout: seconds that a transfer may take; also those after which a worker that was left
            alone in one can be reached again.
        buffer_gib: tensors are sent in parts of this size, GiB; two of it are held on each GPU.

    Raises:
        ValueError: if a number is not positive.
        ConfigurationError: from `publish`, without vLLM or a GPU.
        TrainingStopped: from `publish`, if no transfer comes to its end.
    """

    at_once = True

    def __init__(
        self, host: str = "127.0.0.1", timeout: float = 60.0, buffer_gib: float = 1.0
    ) -> None:
        for name, value in (("timeout", timeout), ("buffer_gib", buffer_gib)):
            if value <= 0:
                raise ValueError(f"`Nccl({name}=...)` must be > 0, got {value}")
        self.host, self.timeout, self.buffer_gib = host, timeout, buffer_gib
        self._group: Group | None = None
        self._sent = ""
        self._lacking: set[str] = set()

    @property
    def due(self) -> bool:  # type: ignore[override]
        """A server came back that has no weights."""
        return bool(self._lacking)

    def publish(
        self,
        weights: Weights,
        *,
        version: str,
        dtype: torch.dtype,
        servers: Sequence[Server],
        loop: EventLoop,
    ) -> None:
        _check_place()
        self._lacking = set()
        for attempt in range(_TRIES):
            found = loop.run(self._found(servers, self.timeout + SHORT if attempt else 0.0))
            # Those that have them may be sampled from by other ranks.
            found = {server: each for server, each in found.items() if each[1] != version}
            if not found:
                return  # those away are watched, and the run stops if it stays so
            try:
                self._send(weights, version, dtype, found, loop)
                return
            except TransferFailed as error:
                why = str(error)
                rank_zero_info(f"weights over NCCL: {why}; once more, to servers that answer")
        raise TrainingStopped(
            f"weights did not get over NCCL, {_TRIES} times in a row ({why}); no step was taken on "
            "this batch: restart the vLLM servers and go on with --ckpt_path, or use SharedFolder"
        )

    async def bring(self, server: Server, timeout: float) -> None:
        self._lacking.add(server.url)
        if self._group is not None and server.url in self._group.refused:
            raise Unreachable(self._group.refused[server.url])
        raise NotNow("gets weights over NCCL when they are sent again")

    def close(self) -> None:
        if self._group is not None:
            self._group.leave()
            self._group = None

    def _send(
        self,
        weights: Weights,
        version: str,
        dtype: torch.dtype,
        found: dict[Server, tuple[int, str]],
        loop: EventLoop,
    ) -> None:
        members = {server: workers for server, (workers, _) in found.items()}
        stale = any(label != self._sent for _, label in found.values())
        try:
            if self._group is None or self._group.servers != members or stale:
                self.close()
                self._group = Group(members, loop, self.timeout)
                self._group.join(self.host, int(self.buffer_gib * 2**30))
            self._group.send(lambda: weights(dtype), version)
            if (error := self._group.source.error) is not None:
                raise TransferFailed(first_line(error)) from error
        except BaseException:
            self.close()
            raise
        self._sent = version

    async def _found(
        self, servers: Sequence[Server], patience: float
    ) -> dict[Server, tuple[int, str]]:
        """Servers that answer: their workers and label. One may still wait in a lost transfer."""
        deadline = time.monotonic() + patience

        async def look(server: Server) -> tuple[int, str] | None:
            with suppress(Unreachable):
                while True:
                    try:
                        return await server.world_size(), await server.version()
                    except Silent:
                        if time.monotonic() > deadline:
                            raise
            return None

        seen = await asyncio.gather(*map(look, servers))
        return {server: each for server, each in zip(servers, seen, strict=True) if each}


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
        self._start: Callable[[], Pairs] = lambda: iter(())
        self._device = torch.device("cpu")

    def declare(self, start: Callable[[], Pairs]) -> None:
        """Take the weights from `start`; the first time a pass finds out what there is."""
        self._start = start
        if not self.declared:
            for name, value in start():
                self.declared.append(Declared(name, value.dtype, tuple(value.shape)))
                self._device = value.device

    def metadata(self) -> list[Declared]:
        """The declared weights, under vLLM's name for them."""
        return self.declared

    def __iter__(self) -> Pairs:
        self.hash, self.error = StreamHash(), None
        stream = self._start()
        for expected in self.declared:
            value = self._next(stream, expected)
            self.hash.add(expected.name, value)
            yield expected.name, value

    def _next(self, stream: Pairs, expected: Declared) -> Tensor:
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

    def send(self, start: Callable[[], Pairs], version: str) -> None:
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


def _check_place() -> None:
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            "model.rollout.engine.delivery: Nccl sends by vLLM's own engine, and vLLM is not "
            f"installed here ({error}): pip install 'scsdpo[vllm]', or use SharedFolder or Download"
        ) from error
    if not torch.cuda.is_available():
        raise ConfigurationError(
            "model.rollout.engine.delivery: Nccl sends from a GPU, and the trainer has none: use "
            "SharedFolder or Download"
        )
