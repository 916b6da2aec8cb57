"""What servers get of a LoRA policy whose adapter is not merged."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from scsdpo.errors import ConfigurationError
from scsdpo.rollout.servers.delivery import Delivery, Download, Files
from scsdpo.rollout.servers.event_loop import EventLoop
from scsdpo.rollout.servers.run_folder import remove
from scsdpo.rollout.servers.server import ADAPTERS, Server, Unreachable
from scsdpo.rollout.weights.lora_adapter import (
    adapter_weights,
    base_weights,
    check_targets,
    write_adapter,
)
from scsdpo.rollout.weights.weight_passes import WeightPasses
from scsdpo.rollout.weights.weights import StreamHash


class AdapterFiles:
    """The base by the delivery, once, and at each version an adapter as files.

    Args:
        delivery: of all weights. One that has no files of its own is helped by a `Download`.
        helper: serves files where `delivery` has none.
    """

    def __init__(self, delivery: Delivery, helper: Download) -> None:
        self.delivery = delivery
        self.files = delivery if isinstance(delivery, Files) else helper
        self._base, self._stream = "", StreamHash()
        self._version, self._sent = "", ""
        self._locations: list[str] = []

    def publish(
        self,
        passes: WeightPasses,
        base: str,
        *,
        version: str,
        dtype: torch.dtype,
        servers: Sequence[Server],
        loop: EventLoop,
        supported: list[str],
    ) -> None:
        """Make these the weights that servers get.

        Args:
            passes: over the policy's weights.
            base: tells the base from another.
            version: label of base and adapter together.
            dtype: of the servers.
            servers: those that answered when they were looked at last.
            loop: where their endpoints are called.
            supported: modules that all of them can adapt.
        """

        def base_pass(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
            self._stream = StreamHash()
            return self._stream.over(passes(dtype, base_weights))

        if base != self._base or self.delivery.due:
            self._base = ""
            self.delivery.publish(
                base_pass, version=f"base-{base}", dtype=dtype, servers=servers, loop=loop
            )
            self._base = base
        weights = dict(passes(dtype, adapter_weights))
        check_targets(weights, supported)
        self.withdraw()
        folder = self.files.open() / f"adapter-{version}"
        remove(folder)  # an earlier try
        self._sent = write_adapter(weights, folder)
        self._locations = self.files.locations(sorted(folder.iterdir()))
        self._version = version

    async def bring(self, server: Server, timeout: float) -> None:
        """Let one server load what was published last, and label it.

        Raises:
            Unreachable: if it does not.
            ConfigurationError: if it was started without what adapters need.
        """
        if not self._version:
            raise Unreachable("there are no weights for it at the moment")
        seen = await server.describe()
        if not seen["adapters"] or not seen["adapters"]["updates"]:
            raise ConfigurationError(
                f"model.rollout.engine.adapter: the vLLM server {server.url} takes no adapters: "
                f"start it with {ADAPTERS}, or set adapter to merged"
            )
        if seen["loaded"] != self._stream.hexdigest():
            await self.delivery.bring(server, timeout)
        await server.load_adapter(self._locations, self._sent, self._version, timeout)

    def withdraw(self) -> None:
        """Remove the last adapter; a server that still reads it is brought the next one."""
        if self._version:
            remove(self.files.open() / f"adapter-{self._version}")
            self._version = ""
