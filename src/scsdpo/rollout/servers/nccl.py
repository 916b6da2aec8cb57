"""Sending weights over NCCL, by vLLM's own weight transfer engine.

`Nccl` is the delivery. It joins trainer and workers in a `TransferGroup`. vLLM's engine reads the
weights from the group's `WeightSource`.
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
from scsdpo.rollout.weights.stream import Pairs, WeightPass

_TRIES = 3
"""Number of tries to transfer one version before the run stops."""
_LOOK = 0.1
"""Seconds between two checks of a transfer."""


class Nccl(Delivery):
    """Sends weights from GPU to GPU, by vLLM's weight transfer engine, without files.

    All servers get the weights at the same time, before sampling. A server that is restarted
    meanwhile gets them at the next sampling, or as soon as no other server is left (if weights are
    sharded, the run stops instead). After a failure a new group of the servers that still answer
    tries again. Servers must be started with `--weight-transfer-config`, and the trainer needs vLLM
    too.

    Args:
        host: name or address under which the servers reach the trainer.
        timeout: seconds for a transfer. A worker whose transfer failed answers again after this
            time.
        buffer_gib: size of the parts in which tensors are sent, in GiB; each GPU holds two parts.

    Raises:
        ValueError: if a number is not positive.
        ConfigurationError: from `publish`, without vLLM or a GPU.
        TrainingStopped: from `publish`, if no transfer succeeds.
    """

    at_once = True

    def __init__(
        self, host: str = "127.0.0.1", timeout: float = 60.0, buffer_gib: float = 1.0
    ) -> None:
        for name, value in (("timeout", timeout), ("buffer_gib", buffer_gib)):
            if value <= 0:
                raise ValueError(f"`Nccl({name}=...)` must be > 0, got {value}")
        self.host, self.timeout, self.buffer_gib = host, timeout, buffer_gib
        self._group: TransferGroup | None = None
        self._sent = ""
        self._lacking: set[str] = set()

    @property
    def due(self) -> bool:  # type: ignore[override]
        """True if a server came back without the weights."""
        return bool(self._lacking)

    def publish(
        self,
        weights: WeightPass,
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
            # Other ranks may be sampling from servers that have the weights.
            found = {server: each for server, each in found.items() if each[1] != version}
            if not found:
                return  # `WatchedServer` watches those that do not answer
            try:
                self._send(weights, version, dtype, found, loop)
                return
            except TransferFailed as error:
                why = str(error)
                rank_zero_info(
                    f"sending weights over NCCL failed ({why}); trying again with the servers that "
                    "answer"
                )
        raise TrainingStopped(
            f"sending weights over NCCL failed {_TRIES} times in a row ({why}); no step was taken "
            "on this batch: restart the vLLM servers and resume with --ckpt_path, or use "
            "SharedFolder"
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
        weights: WeightPass,
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
                self._group = TransferGroup(members, loop, self.timeout)
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
        """Server -> (number of workers, label) of those that answer within `patience` seconds.

        A worker that still waits in a failed transfer needs that long.
        """
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
    """Name, dtype and shape of a weight, which vLLM wants before the weight."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class TransferFailed(Exception):
    """A transfer failed; its group cannot be used any more."""


class WeightSource:
    """The weights of a transfer, in the form that vLLM's trainer engine reads.

    Every declared weight is sent, with zeros if the real one does not come: a worker would wait
    forever for a missing tensor and answer no other call. `error` then says what was wrong.
    """

    def __init__(self) -> None:
        self.declared: list[Declared] = []
        self.error: Exception | None = None
        """Why the last pass sent zeros; None: all weights came."""
        self.hash = StreamHash()
        self._start: Callable[[], Pairs] = lambda: iter(())
        self._device = torch.device("cpu")

    def declare(self, start: Callable[[], Pairs]) -> None:
        """Read weights from passes of `start`; the first call makes one pass to declare them."""
        self._start = start
        if not self.declared:
            for name, value in start():
                self.declared.append(Declared(name, value.dtype, tuple(value.shape)))
                self._device = value.device

    def metadata(self) -> list[Declared]:
        """The declared weights; vLLM calls this method."""
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


class TransferGroup:
    """The trainer and all workers of some servers, joined for transfers.

    It is also the client by which vLLM's trainer engine calls the servers. The trainer has rank 0,
    then come the workers of one server after another.

    Args:
        servers: server -> number of its workers.
        loop: event loop in which their endpoints are called.
        timeout: seconds for joining, and for a transfer.
    """

    def __init__(self, servers: dict[Server, int], loop: EventLoop, timeout: float) -> None:
        self.servers, self.loop, self.timeout = servers, loop, timeout
        self.source = WeightSource()
        self.refused: dict[str, str] = {}
        """URL of a server that must not be sampled from -> why."""
        self._version = ""
        self._received: dict[Server, list[Receipt]] = {}
        self._engine: Any = None
        self._failure: Exception | None = None
        self._leaving = threading.Lock()

    def join(self, host: str, buffer_bytes: int) -> None:
        """Form the group.

        Raises:
            TransferFailed: if a server does not join.
        """
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        info = NCCLTrainerInitInfo(
            master_address=host,
            master_port=port,
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
        """Send the weights to all servers, and label them.

        Raises:
            TransferFailed: if a server does not receive all of them.
        """
        self._version, self.refused = version, {}
        self.source.declare(start)
        work = _in_thread(self._engine.send_weights)
        try:
            self._wait(work)
        except BaseException:
            self.leave()
            wait([work], SHORT)  # until it has stopped reading this pass over the weights
            raise

    def leave(self) -> None:
        """Leave the group; a transfer that hangs is aborted."""
        with self._leaving:
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.shutdown()

    def _wait(self, work: Future[None]) -> None:
        """Wait until `work` is done or a server failed, after which `work` may never be done."""
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
        """Let every server join, with ranks after the workers of the servers before it."""
        offsets, offset = {}, 1
        for server, workers in self.servers.items():
            offsets[server], offset = offset, offset + workers
        self._all(lambda s: s.join(init_info | {"rank_offset": offsets[s]}, self.timeout))

    def start_weight_update(self) -> None:
        """Label the servers as loading: they have no policy's weights now."""
        self._all(lambda server: server.label(f"loading {self._version}"))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Let the servers receive; if one fails, leave, so that the sender does not wait for it."""

        async def receive(server: Server) -> None:
            self._received[server] = await server.receive(update_info, self.timeout)

        try:
            self._all(receive)
        except BaseException:
            self.leave()
            raise

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Label the servers that received the weights."""
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
    """Do `work` in a thread, which can be abandoned if it hangs."""
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


def _check_place() -> None:
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            "model.rollout.engine.delivery: Nccl needs vLLM in the trainer's environment too "
            f"({error}): pip install 'scsdpo[vllm]', or use SharedFolder or Download"
        ) from error
    if not torch.cuda.is_available():
        raise ConfigurationError(
            "model.rollout.engine.delivery: Nccl needs a GPU in the trainer: use SharedFolder or "
            "Download"
        )
