"""The policy's weights as an engine of its own loads them, and how two copies are told apart."""

import copy
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from scsdpo.policy import CausalLM
from scsdpo.policy.adapter import adapted_ends, adapted_layers, is_tied, merged_layer
from scsdpo.policy.shard_loading import as_stored
from scsdpo.policy.sharding import is_sharded, local, settle

_WRAPPED = ".base_layer"
"""What peft puts into the name of a layer that has an adapter."""


@torch.no_grad()
def digest(
    policy: nn.Module, most: int | None = None, among: Callable[[str], bool] = lambda name: True
) -> str:
    """16 hexadecimal digits that tell these weights from any others.

    Made of `fold` of each parameter: it is the same on every rank, after a restart, and in every
    process and on every device that holds these weights.

    Args:
        policy: under shards every rank must ask, in step.
        most: of each parameter's elements that are read, evenly spread; None: all.
        among: whether a parameter of that name is read.
    """
    settle(policy)
    folds: list[Tensor] = []
    for _, parameter in filter(lambda pair: among(pair[0]), policy.named_parameters()):
        value = local(parameter).detach()
        stride = 1 if most is None else max(value.numel() // most, 1)
        folds.append(fold(value.reshape(-1)[::stride]))
    parts: list[object] = [torch.stack(folds).tolist()]
    if is_sharded(policy):
        own, parts = parts, [None] * dist.get_world_size()
        dist.all_gather_object(parts, own)
    return _hex(repr(parts))


class StreamHash:
    """What a stream of (name, value) pairs held: names, dtypes, shapes and every bit of the values.

    Sender and receiver each keep one, on the device where the values lie, and compare: what was
    left out, doubled, renamed or changed on the way shows; the order does not matter.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[str, Tensor]] = []

    def over(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The pairs of `weights`, as they pass by."""
        for name, value in weights:
            self.add(name, value)
            yield name, value

    def add(self, name: str, value: Tensor) -> None:
        """One more pair passes by."""
        self._seen.append((f"{name} {value.dtype} {tuple(value.shape)}", fold(value)))

    def hexdigest(self) -> str:
        """16 hexadecimal digits of all pairs so far."""
        return _hex(repr(sorted((what, int(folded)) for what, folded in self._seen)))


_COLUMNS = 2**12
_SLAB, _SLAB_ON_CPU = 2**12, 2**6
"""Rows of so many columns that are multiplied at a time: 128 MiB of products; in a cache on CPU."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
"""By bytes of an element. Halves of 8 bytes: 2^63 times any odd number is 2^63, and pairs of signs
would cancel."""


@torch.no_grad()
def fold(value: Tensor) -> Tensor:
    """sum_rc bits_rc u_c v_r modulo 2^64, on the value's device: a number for a tensor's bits.

    u and v are fixed pseudo-random numbers, so that other values, signs and orders give another
    number; integers are the same on every device. An empty tensor gives 0.

    Args:
        value: of any shape and dtype of 1, 2, 4 or 8 bytes.
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


def _hex(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@torch.no_grad()
def merged_weights(
    policy: CausalLM, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every weight of the plain model; LoRA factors are merged into them.

    W + scale B A is formed in float32, on a copy of one layer at a time: the policy's own weights
    are not touched. A tied head comes once, as the embedding, unless one of the two is adapted:
    then they are two tables. On several ranks everyone must ask for all of them, in step: sharded
    weights are gathered.

    Names are those of the checkpoint, which may hold apart what transformers has fused, such as the
    matrices of each expert.

    Args:
        policy: whose weights.
        dtype: to which they are rounded, before they are gathered; None: nothing is rounded.
    """
    model = policy.language_model
    settle(model)
    adapted = adapted_layers(model)
    two_tables = is_tied(model) and bool(adapted_ends(model))
    done: set[str] = set()

    def plain() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in model.named_parameters(remove_duplicate=not two_tables):
            owner = next((a for a in adapted if name.startswith(f"{a}.")), "")
            if not owner:
                yield name, whole_weight(parameter, dtype)
            elif owner not in done:
                done.add(owner)
                for inner, value in _merged(adapted[owner]).named_parameters():
                    yield f"{owner}.{inner}", value if dtype is None else value.to(dtype)

    yield from as_stored(model, plain())


def whole_weight(parameter: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The weight itself, rounded to `dtype` if there is one, and gathered if it is sharded."""
    value = parameter.detach() if dtype is None else parameter.detach().to(dtype)
    return value.full_tensor() if isinstance(value, DTensor) else value


def _merged(layer: LoraLayer) -> nn.Module:
    """The plain layer that does what `layer` does with its adapter, on a copy."""
    alone = copy.deepcopy(layer)
    for module in alone.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(
                module, name, nn.Parameter(whole_weight(parameter).float(), requires_grad=False)
            )
    return merged_layer(alone)
