"""Weights over NCCL, by vLLM's own weight transfer engine."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress

import torch
from lightning.pytorch.utilities import rank_zero_info

from scsdpo.errors import ConfigurationError, TrainingStopped, first_line
from scsdpo.rollout.servers.delivery import Delivery
from scsdpo.rollout.servers.event_loop import EventLoop
from scsdpo.rollout.servers.server import SHORT, NotNow, Server, Silent, Unreachable
from scsdpo.rollout.servers.transfer_group import Group, TransferFailed
from scsdpo.rollout.weights.stream import Weights

_TRIES = 3
"""Transfers of one version, before the run stops."""


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
