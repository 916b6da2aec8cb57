"""Hashes of weights: they tell if two copies are equal, and if a transfer arrived completely."""

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypedDict

import torch
from torch import Tensor, nn

from scsdpo.distributed import all_gather
from scsdpo.policy.quantization import scale_tensors
from scsdpo.policy.sharding import is_sharded, local, reshard


class StreamHash:
    """A hash of (name, value) pairs: of names, dtypes, shapes and every bit of the values.

    Sender and receiver each compute one, on the device of the values, and compare. It changes if a
    pair is left out, doubled, renamed or altered; the order does not matter.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._hashes: list[Tensor] = []

    def over(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Add each pair of `weights`, and pass it on."""
        for name, value in weights:
            self.add(name, value)
            yield name, value

    def add(self, name: str, value: Tensor) -> None:
        """Add one pair."""
        self._names.append(f"{name} {value.dtype} {tuple(value.shape)}")
        self._hashes.append(tensor_hash(value))

    def hexdigest(self) -> str:
        """16 hexadecimal digits of all pairs so far."""
        hashes = torch.stack(self._hashes).tolist() if self._hashes else []
        return _hex(sorted(zip(self._names, hashes, strict=True)))


class Receipt(TypedDict):
    """The report of a worker that has loaded weights or an adapter."""

    hash: str
    """`StreamHash` of the received weights, or `adapter_hash` of the adapter."""
    missing: list[str]
    """Modules of its model that did not get all of their parameters."""


def refusal(receipt: Receipt, sent: str, *, adapter: bool = False) -> str:
    """Why an engine must not be sampled from after a load; '' if it may.

    Args:
        receipt: `WeightReceiver`'s.
        sent: the sender's hash.
        adapter: True: an adapter was loaded; False: weights.
    """
    if receipt["hash"] != sent:
        did = "holds another adapter" if adapter else "received other weights"
        return f"{did} ({receipt['hash']}) than {'was' if adapter else 'were'} sent ({sent})"
    if missing := receipt["missing"]:
        return (
            f"got incomplete weights for {len(missing)} of its modules "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''})"
        )
    return ""


GLIMPSE = 1024
"""Elements of each parameter that are compared when reading all of them would take too long."""


@torch.no_grad()
def weights_digest(
    policy: nn.Module, most: int | None = None, among: Callable[[str], bool] = lambda name: True
) -> str:
    """`StreamHash` of a model's parameters: 16 hexadecimal digits.

    Weights in 4 bits are hashed as their packed bytes and scales. The digest is the same on every
    rank, after a restart, and in every process and on every device with these weights. Shards are
    not gathered: each rank hashes its own. If weights are sharded, this is a collective.

    Args:
        policy: the model.
        most: elements of each parameter to read, evenly spread; None: all.
        among: True for the name of a parameter that is read.
    """
    reshard(policy)
    stream = StreamHash()
    for name, parameter in policy.named_parameters():
        if not among(name):
            continue
        for part, value in (("", local(parameter)), *scale_tensors(parameter)):
            flat = value.reshape(-1)
            step = 1 if most is None else max(flat.numel() // most, 1)
            stream.add(name + part, flat[::step])
    own = stream.hexdigest()
    return _hex(all_gather([own])) if is_sharded(policy) else own


_COLUMNS = 2**12
_SLAB, _SLAB_ON_CPU = 2**12, 2**6
"""Rows multiplied at a time, on a GPU (128 MiB of products) and on a CPU (to fit its cache)."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
"""Bytes of an element -> integer type. 8 bytes are read as two halves: as one, 2^63 times any odd
number is 2^63, and two changed signs would cancel."""


@torch.no_grad()
def tensor_hash(value: Tensor) -> Tensor:
    """Hash of a tensor's bits: sum_rc bits_rc u_c v_r modulo 2^64, on the value's device.

    u and v are fixed pseudo-random numbers, so that other values, signs and orders give another
    hash. Integer arithmetic gives the same hash on every device. An empty tensor gives 0.

    Args:
        value: any shape; a dtype of 1, 2, 4 or 8 bytes.
    Shapes:
        value, read as rows r of 4,096 columns c -> [] int64.
    """
    bits = value.detach().reshape(-1).contiguous().view(_INTEGERS[value.element_size()])
    rows = -(-bits.numel() // _COLUMNS)
    whole = bits.numel() // _COLUMNS
    u, v = _columns(bits.device), _numbers(rows, 1, bits.device)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    table = bits[: whole * _COLUMNS].view(whole, _COLUMNS)
    height = _SLAB_ON_CPU if bits.device.type == "cpu" else _SLAB
    for start in range(0, whole, height):
        slab = slice(start, min(start + height, whole))
        total += ((table[slab] * u).sum(1) * v[slab]).sum()
    rest = bits[whole * _COLUMNS :]
    if rest.numel():
        total += (rest * u[: rest.numel()]).sum() * v[-1]
    return total


@functools.cache
def _columns(device: torch.device) -> Tensor:
    return _numbers(_COLUMNS, 0, device)


def _numbers(count: int, salt: int, device: torch.device) -> Tensor:
    """Pseudo-random int64, the same on every device (SplitMix64's finalizer)."""
    x = torch.arange(1, count + 1, device=device) * 0x1E3779B97F4A7C15 + salt
    x = (x ^ (x >> 30)) * 0x3F58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x14D049BB133111EB
    return x ^ (x >> 31)


def _hex(what: object) -> str:
    return hashlib.blake2b(repr(what).encode(), digest_size=8).hexdigest()
