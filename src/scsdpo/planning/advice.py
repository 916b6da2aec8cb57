"""The fewest changes that make a setup fit."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations

from scsdpo.planning.memory import Memory, memory_of
from scsdpo.planning.setup import SecondWeights, Setup, with_lora, with_nf4
from scsdpo.policy import Stored

ROOM = 0.95
"""Share of a device's memory that a plan may fill: allocators leave gaps."""
FEW_TOKENS = 2048
"""A budget from which micro-batches are no longer small."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A change, and what it leads to."""

    words: str
    setup: Setup
    memory: Memory


def fits(setup: Setup, memory: Memory) -> bool:
    """Whether the peak leaves room on the device."""
    return memory.peak <= ROOM * setup.devices.memory


def advice(setup: Setup) -> Advice | None:
    """The fewest changes that suffice: on the setup's own devices, then on more of them, then to
    another method, and last to a base in 4 bits. None: not even all of them do.
    """
    own, ranks, quantized = _own(setup), setup.devices.ranks, setup.counted.quantized > 0
    more = [n for n in (2, 4, 8, 16, 32, 64) if n > ranks and setup.questions % n == 0]
    more = [] if quantized else more  # weights in 4 bits cannot lie in shards
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
    """`first` with none of `own`, with each of them, each pair, and so on."""
    for number in range(len(own) + 1):
        for chosen in combinations(own, number):
            yield (*first, *chosen)


def _own(setup: Setup) -> list[_Change]:
    """Those that need no other device and change no number, from what costs least."""
    found = []
    if setup.optimizer.temporary:
        found.append(_Change(words="model.optimizer.init_args.fused=true", apply=_fused))
    if not setup.checkpointing:
        words = "model.policy.gradient_checkpointing=true"
        found.append(_Change(words=words, apply=lambda s: replace(s, checkpointing=True)))
    if setup.max_tokens == "auto" or setup.max_tokens > FEW_TOKENS:
        words = f"model.limits.max_tokens={FEW_TOKENS}"
        found.append(_Change(words=words, apply=lambda s: replace(s, max_tokens=FEW_TOKENS)))
    if setup.sampler.kind == "hf":
        room = setup.sampler.max_tokens // 4
        words = f"model.rollout.init_args.max_tokens={room}"
        found.append(_Change(words=words, apply=lambda s: _with_cache(s, room)))
    if setup.sampler.merges and not setup.counted.whole:
        words = "model.rollout.init_args.merged=false"
        found.append(_Change(words=words, apply=_apart))
    for second in setup.seconds:
        if second.kind == "external" and not second.stored.on_host and setup.devices.kind == "cuda":
            words = f"model.{second.slot}.on_host=true"
            found.append(_Change(words=words, apply=partial(_hosted, second)))
    if not (setup.devices.sharded or setup.counted.quantized) and setup.devices.ranks > 1:
        words = "FullySharded (configs/scale)"
        found.append(_Change(words=words, apply=lambda s: s.on(sharded=True)))
    return found


def _devices(ranks: int) -> _Change:
    words = f"{ranks} devices with FullySharded (configs/scale)"
    return _Change(words=words, apply=lambda s: on_ranks(s, ranks, sharded=True))


def _fused(setup: Setup) -> Setup:
    return replace(setup, optimizer=replace(setup.optimizer, temporary=0.0, of_largest=0.0))


def _hosted(second: SecondWeights, setup: Setup) -> Setup:
    hosted = replace(second, stored=Stored(on_host=True))
    return replace(
        setup, seconds=tuple(hosted if each is second else each for each in setup.seconds)
    )


def _with_cache(setup: Setup, tokens: int) -> Setup:
    return replace(setup, sampler=replace(setup.sampler, max_tokens=tokens))


def _apart(setup: Setup) -> Setup:
    return replace(setup, sampler=replace(setup.sampler, merges=False))


def on_ranks(setup: Setup, ranks: int, *, sharded: bool) -> Setup:
    """On so many devices; responses asked for at once are dealt anew."""
    asked = max(setup.in_flight * setup.devices.ranks // ranks, 1)
    sharded = sharded and not setup.counted.quantized
    return replace(setup.on(ranks=ranks, sharded=sharded), in_flight=asked)


_NF4 = _Change(
    words="model.policy.quantization=NF4 (another base: its weights in 4 bits)", apply=with_nf4
)
_LORA = _Change(words="model.policy.adapter=Lora (another method: rank 32)", apply=with_lora)
