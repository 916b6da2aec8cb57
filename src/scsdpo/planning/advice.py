"""The fewest changes that make a setup fit."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any

from scsdpo.planning.memory import Memory, memory_of
from scsdpo.planning.setup import SecondWeights, Setup, with_lora, with_nf4
from scsdpo.policy import Stored

ROOM = 0.95
"""Share of a device's memory that a plan may fill; the allocator's fragments take the rest."""
FEW_TOKENS = 2048
"""Token budget from which micro-batches count as large enough."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Changes of a configuration, and the setup and memory that they give."""

    words: str
    setup: Setup
    memory: Memory


def fits(setup: Setup, memory: Memory) -> bool:
    """True if the peak leaves room on the device."""
    return memory.peak <= ROOM * setup.devices.memory


def advice(setup: Setup) -> Advice | None:
    """The fewest changes that make `setup` fit, or None if all of them do not suffice.

    It tries changes on the setup's own devices, then more devices, then LoRA instead of a full
    fine-tune, and at last a base in 4 bits.
    """
    own, ranks, quantized = _own(setup), setup.devices.ranks, setup.counted.quantized > 0
    more = [n for n in (2, 4, 8, 16, 32, 64) if n > ranks and setup.questions % n == 0]
    more = [] if quantized else more  # weights in 4 bits cannot be sharded
    rooms = [*_combined(own), *(each for n in more for each in _combined(own, _devices(n)))]
    if setup.counted.whole:
        rooms += _combined(own, _LORA)
        rooms += (each for n in more for each in _combined(own, _LORA, _devices(n)))
    if setup.shapes.is_plain and not quantized and not setup.devices.sharded:
        method = (_LORA, _NF4) if setup.counted.whole else (_NF4,)
        rooms += _combined(own, *method)
    for changes in rooms:
        changed = setup
        for change in changes:
            changed = change.apply(changed)
        memory = memory_of(changed)
        if changes and fits(changed, memory):
            words = " and ".join(change.words for change in changes)
            return Advice(words=words, setup=changed, memory=memory)
    return None


@dataclass(frozen=True, kw_only=True)
class _Change:
    words: str
    apply: Callable[[Setup], Setup]


def _combined(own: Sequence[_Change], *first: _Change) -> Iterator[tuple[_Change, ...]]:
    """`first` alone, then with each one of `own`, each pair, and so on."""
    for number in range(len(own) + 1):
        for chosen in combinations(own, number):
            yield (*first, *chosen)


def _own(setup: Setup) -> list[_Change]:
    """Changes that need no other devices and change no result, the cheapest first."""
    found = []
    if setup.optimizer.temporary:
        fused = replace(setup.optimizer, temporary=0.0, of_largest=0.0)
        words = "model.optimizer.init_args.fused=true"
        found.append(_Change(words=words, apply=lambda s: replace(s, optimizer=fused)))
    if not setup.checkpointing:
        words = "model.policy.gradient_checkpointing=true"
        found.append(_Change(words=words, apply=lambda s: replace(s, checkpointing=True)))
    if setup.max_tokens == "auto" or setup.max_tokens > FEW_TOKENS:
        words = f"model.limits.max_tokens={FEW_TOKENS}"
        found.append(_Change(words=words, apply=lambda s: replace(s, max_tokens=FEW_TOKENS)))
    if setup.sampler.kind == "hf":
        room = setup.sampler.max_tokens // 4
        words = f"model.rollout.init_args.max_tokens={room}"
        found.append(_Change(words=words, apply=lambda s: _sampled_by(s, max_tokens=room)))
    if setup.sampler.merges and not setup.counted.whole:
        words = "model.rollout.init_args.merged=false"
        found.append(_Change(words=words, apply=lambda s: _sampled_by(s, merges=False)))
    for second in setup.seconds:
        if second.kind == "external" and not second.stored.on_host and setup.devices.kind == "cuda":
            words = f"model.{second.slot}.on_host=true"
            found.append(_Change(words=words, apply=partial(_on_host, second)))
    if not (setup.devices.sharded or setup.counted.quantized) and setup.devices.ranks > 1:
        words = "FullySharded (configs/scale)"
        found.append(_Change(words=words, apply=lambda s: s.on(sharded=True)))
    return found


def _devices(ranks: int) -> _Change:
    words = f"{ranks} devices with FullySharded (configs/scale)"
    return _Change(words=words, apply=lambda s: on_ranks(s, ranks, sharded=True))


def _on_host(second: SecondWeights, setup: Setup) -> Setup:
    hosted = replace(second, stored=Stored(on_host=True))
    return replace(
        setup, seconds=tuple(hosted if each is second else each for each in setup.seconds)
    )


def _sampled_by(setup: Setup, **changes: Any) -> Setup:
    return replace(setup, sampler=replace(setup.sampler, **changes))


def on_ranks(setup: Setup, ranks: int, *, sharded: bool) -> Setup:
    """A copy of `setup` on `ranks` devices, which share the responses in flight equally."""
    asked = max(setup.in_flight * setup.devices.ranks // ranks, 1)
    sharded = sharded and not setup.counted.quantized
    return replace(setup.on(ranks=ranks, sharded=sharded), in_flight=asked)


_NF4 = _Change(
    words="model.policy.quantization=NF4 (another base: its weights in 4 bits)", apply=with_nf4
)
_LORA = _Change(words="model.policy.adapter=Lora (another method: rank 32)", apply=with_lora)
