"""Splitting devices between trainers and the vLLM servers that sample for them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from scsdpo.planning.advice import ROOM, fits, on_ranks
from scsdpo.planning.memory import VLLM_BYTES, Memory, memory_of
from scsdpo.planning.setup import BFLOAT16, Sampler, Setup
from scsdpo.planning.speed import Rates, work_of

_WIDTHS = (1, 2, 4, 8)
"""Numbers of devices that one server may have."""


@dataclass(frozen=True, kw_only=True)
class DeviceSplit:
    """Trainers on some of the devices and servers on the others; they work in turns."""

    setup: Setup
    """Setup of the trainers."""
    memory: Memory
    """Memory of a trainer."""
    servers: int
    """Number of servers."""
    width: int
    """Devices of one server (vLLM's tensor_parallel_size)."""
    sampling: float
    """Seconds in which the servers sample a batch."""
    training: float
    """Seconds in which the trainers learn from a batch: teacher, update and optimizer step."""

    @property
    def trainers(self) -> int:
        """Number of devices that train."""
        return self.setup.devices.ranks

    @property
    def fits(self) -> bool:
        """True if a trainer's peak leaves room on its device."""
        return fits(self.setup, self.memory)

    @property
    def seconds(self) -> float:
        """Seconds of a batch, sampling and then training."""
        return self.sampling + self.training


def splits(setup: Setup, devices: int, rates: Rates) -> list[DeviceSplit]:
    """Every split of `devices` that leaves none idle; those that fit come first, the fastest first.

    Several trainers shard their weights if `setup` does, or if they do not fit otherwise.

    Args:
        setup: the planned one; servers replace its sampler.
        devices: number of all devices, each as large as the setup's.
        rates: rates of each device.
    """
    found = [
        split for trainers in range(1, devices) for split in _of(setup, trainers, devices, rates)
    ]
    return sorted(found, key=lambda split: (not split.fits, split.seconds))


def _of(setup: Setup, trainers: int, devices: int, rates: Rates) -> Iterator[DeviceSplit]:
    left = devices - trainers
    width = next((n for n in _WIDTHS if left % n == 0 and _rows(setup, n) >= 1), None)
    if width is None or setup.questions % trainers:
        return
    servers = left // width
    remote = replace(setup, sampler=Sampler(kind="remote"))
    plain = on_ranks(remote, trainers, sharded=setup.devices.sharded and trainers > 1)
    if trainers > 1 and not fits(plain, memory_of(plain)):
        plain = on_ranks(remote, trainers, sharded=True)
    memory = memory_of(plain)
    seconds = {name: work.seconds(rates) for name, work in work_of(plain, memory).items()}
    yield DeviceSplit(
        setup=plain,
        memory=memory,
        servers=servers,
        width=width,
        sampling=_sampling(setup, servers, width, rates),
        training=sum(seconds.values()) - seconds["sampling"],
    )


def _sampling(setup: Setup, servers: int, width: int, rates: Rates) -> float:
    """Seconds in which one server samples its share of the batch."""
    engine = Sampler(kind="remote", sharing=width, max_rows=_rows(setup, width))
    share = on_ranks(replace(setup, sampler=engine), servers, sharded=False)
    work = work_of(share, memory_of(share))["sampling"]
    return replace(work, flops=work.flops / width, memory=work.memory).seconds(rates)


def _rows(setup: Setup, width: int) -> int:
    """Number of full-length responses whose keys and values fit beside the weights on `width`
    devices.
    """
    free = ROOM * setup.devices.memory - VLLM_BYTES - BFLOAT16 * setup.shapes.parameters / width
    held = setup.shapes.cached(setup.lengths.prompt + setup.lengths.response)
    return int(free * width // (BFLOAT16 * held))
