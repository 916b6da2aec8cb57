"""The smallest change that makes a setup fit."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from scsdpo.planning.memory import Memory, memory_of
from scsdpo.planning.setup import Setup, with_lora

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
    """The first change that suffices, those that change no number first; then several together.

    None: not even all of them do.
    """
    together: list[str] = []
    changed = setup
    steps = list(_changes(setup))
    for words, change in steps:
        if (found := _tried(words, change(setup))) is not None:
            return found
    for words, change in steps:
        if (next_ := change(changed)) != changed:
            changed = next_
            together.append(words)
            if (found := _tried(" and ".join(together), changed)) is not None:
                return found
    return None


def _tried(words: str, setup: Setup) -> Advice | None:
    memory = memory_of(setup)
    return Advice(words=words, setup=setup, memory=memory) if fits(setup, memory) else None


def _changes(setup: Setup) -> Iterator[tuple[str, Callable[[Setup], Setup]]]:
    """From what costs least to what costs most."""
    if setup.optimizer.temporary:
        yield "model.optimizer.init_args.fused=true", _fused
    if not setup.checkpointing:
        yield "model.policy.gradient_checkpointing=true", lambda s: replace(s, checkpointing=True)
    if setup.max_tokens == "auto" or setup.max_tokens > FEW_TOKENS:
        yield f"model.limits.max_tokens={FEW_TOKENS}", lambda s: replace(s, max_tokens=FEW_TOKENS)
    if setup.sampler.kind == "hf":
        room = setup.sampler.max_tokens // 4
        yield f"model.rollout.init_args.max_tokens={room}", lambda s: _with_cache(s, room)
    if not setup.devices.sharded and setup.devices.ranks > 1:
        yield "FullySharded (configs/scale)", lambda s: s.on(sharded=True)
    for ranks in (2, 4, 8, 16, 32, 64):
        if ranks > setup.devices.ranks and setup.questions % ranks == 0:
            yield f"{ranks} devices with FullySharded (configs/scale)", _sharded(ranks)
    if setup.counted.whole:
        yield "model.policy.adapter=Lora (another method: rank 32)", with_lora


def _fused(setup: Setup) -> Setup:
    return replace(setup, optimizer=replace(setup.optimizer, temporary=0.0, of_largest=0.0))


def _with_cache(setup: Setup, tokens: int) -> Setup:
    return replace(setup, sampler=replace(setup.sampler, max_tokens=tokens))


def _sharded(ranks: int) -> Callable[[Setup], Setup]:
    def change(setup: Setup) -> Setup:
        # Responses asked for at once are dealt anew.
        asked = max(setup.in_flight * setup.devices.ranks // ranks, 1)
        return replace(setup.on(ranks=ranks, sharded=True), in_flight=asked)

    return change
