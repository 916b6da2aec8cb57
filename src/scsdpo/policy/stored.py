"""How a second set of weights is kept between forwards, and how an average in bf16 moves."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scsdpo.policy.decoder import decoder_of

_PIECE = 2**22
"""Elements that are rounded at a time: random bits take 8 bytes each."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The device and the dtype that hold a teacher's own copy of the weights. P parameters take

        bytes = P * (4 or 2), on the device or on the host

    The copy always runs in the student's dtype on the student's device. If it is kept in another
    way, each layer (each FSDP unit, if weights are sharded) is copied for its forward. This costs
    one pass over the weights for each micro-batch, and their transfer from the host.
    `compile_layers` does not compile such a copy.

    Args:
        dtype: `float32` or `bfloat16`. In bfloat16, frozen weights are rounded to nearest (exact
            if the checkpoint was bf16), and a moving average is rounded stochastically.
        on_host: keep them in memory of the host, pinned if there is a GPU.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    on_host: bool = False

    @property
    def is_plain(self) -> bool:
        """True if they are kept as the student's weights are."""
        return self == Stored()

    def kept(self, parameter: nn.Parameter) -> nn.Parameter:
        """A frozen copy, kept as this says; a copy on `meta` stays there until it is allocated."""
        narrow = torch.bfloat16 if self.dtype == "bfloat16" else parameter.dtype
        value = parameter.detach().to(narrow, copy=True)
        if self.on_host and value.device.type != "meta":
            value = value.cpu()
            value = value.pin_memory() if torch.cuda.is_available() else value
        return nn.Parameter(value, requires_grad=False)


def stochastically_rounded(value: Tensor, seed: int, start: int = 0) -> Tensor:
    """Round `value` at random to one of its two neighbours in bf16, so that the mean is `value`.

    P(up) = (value - lower) / (upper - lower). With round-to-nearest, an average in bf16 does not
    move if its step, rate * distance, is below half the spacing of neighbours, which is 2^-8 to
    2^-7 of a weight. Stochastic rounding follows the average in float32 without bias. Its distance
    from that average has

        rms <= spacing / 2 / sqrt(1 - (1 - rate)^2)

    (1.6 spacings at rate .05), however long it runs.

    Args:
        value: [N] float32.
        seed: for this tensor at this step.
        start: index of the first element in the unsharded tensor, so that shards draw the same.

    Source:
        Gupta et al. 2015, arXiv:1502.02551; bits by splitmix64.
    """
    bits = _random_bits(start, len(value), seed, value.device)
    drawn = (value.view(torch.int32) + bits) & -(2**16)
    return torch.where(value.isfinite(), drawn.view(torch.float32), value).to(torch.bfloat16)


@torch.no_grad()
def mix(own: Tensor, student: Tensor, rate: float, *, seed: int, start: int) -> None:
    """Own' = (1 - rate) own + rate student, in float32 on the student's device, piece by piece.

    Args:
        own: the kept weight; updated in place.
        student: the student's weight, of the same shape.
        rate: weight of the student.
        seed: for this tensor at this step.
        start: index of the first element in the unsharded tensor.
    """
    pieces = zip(own.view(-1).split(_PIECE), student.view(-1).split(_PIECE), strict=True)
    for number, (kept, new) in enumerate(pieces):
        wide = torch.lerp(kept.to(new.device, new.dtype), new, rate)
        if kept.dtype == torch.bfloat16:
            wide = stochastically_rounded(wide.float(), seed, start + number * _PIECE)
        kept.copy_(wide)


def _random_bits(start: int, count: int, seed: int, device: torch.device) -> Tensor:
    """[N] int32 in [0, 2^16): a hash of seed and index, the same on any device."""
    z = torch.arange(start + 1, start + count + 1, device=device).mul_(-0x61C8864680B583EB)
    z.add_(seed & 0x7FFFFFFFFFFFFFFF)
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        z.bitwise_xor_((z >> shift) & (2 ** (64 - shift) - 1)).mul_(factor)
    return ((z >> 40) & 0xFFFF).to(torch.int32)


class OffloadHooks:
    """Forward hooks that load the weights of a model that is kept on the host or in another dtype.

    A layer's weights are loaded during its own forward only. Those of embedding, last norm and head
    are loaded while `open` is.

    Args:
        model: not sharded, without gradients.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        layers = decoder_of(model).layers
        inner = {id(p) for layer in layers for p in layer.parameters()}
        self._rest = [p for p in model.parameters() if id(p) not in inner]
        self._to: tuple[torch.device, torch.dtype] | None = None
        for layer in layers:
            weights = list(layer.parameters())
            kept: list[Tensor] = []
            layer.register_forward_pre_hook(partial(self._load_layer, weights, kept))
            layer.register_forward_hook(partial(_unload, weights, kept), always_call=True)

    @contextmanager
    def open(self, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
        """Let the model run on `device` in `dtype` while the context is open."""
        self._to = device, dtype
        kept = _load(self._rest, self._to)
        try:
            yield
        finally:
            _unload(self._rest, kept)
            self._to = None

    def _load_layer(
        self, weights: Sequence[nn.Parameter], kept: list[Tensor], layer: nn.Module, args: Any
    ) -> None:
        assert self._to is not None
        kept[:] = _load(weights, self._to)


def _load(weights: Sequence[nn.Parameter], to: tuple[torch.device, torch.dtype]) -> list[Tensor]:
    kept = [weight.data for weight in weights]
    for weight in weights:
        weight.data = weight.data.to(*to, non_blocking=True)
    return kept


def _unload(weights: Sequence[nn.Parameter], kept: Sequence[Tensor], *of_hook: Any) -> None:
    for weight, data in zip(weights, kept, strict=True):
        weight.data = data
