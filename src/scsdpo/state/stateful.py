"""Strategies that remember: what they keep is checkpointed, wherever they are nested."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import nn

from scsdpo.types import Judged


class Stateful(nn.Module):
    """A part of a strategy that changes during training.

    What it keeps in buffers, and what `remembered` gives, is in the checkpoint. Every rank keeps
    the same: what depends on a rank's questions is gathered first.
    """

    def observe(self, judged: Judged) -> None:
        """Remember of a batch what later ones are to know; called once for each batch.

        It is called before the batch's first optimizer step, on every rank with its share. Asking
        a strategy (`plan`, `weigh`, `claims`, `render`, `rates`) never changes what it remembers.
        """

    def after_step(self) -> None:
        """Called once after each optimizer step that was taken."""

    def remembered(self) -> dict[str, Any]:
        """What to save beyond buffers: tensors and primitives only.

        Not `get_extra_state`, which a sharded load loses without a word.
        """
        return {}

    def remember(self, remembered: Mapping[str, Any]) -> None:
        """Take back what `remembered` gave."""


def all_remembered(owner: nn.Module) -> dict[str, dict[str, Any]]:
    """What each `Stateful` in `owner` remembers, by the module's name."""
    parts = {n: m.remembered() for n, m in owner.named_modules() if isinstance(m, Stateful)}
    return {name: kept for name, kept in parts.items() if kept}


def remember_all(owner: nn.Module, remembered: Mapping[str, Mapping[str, Any]]) -> None:
    """Give back what `all_remembered` gave.

    Raises:
        ValueError: if something belongs to no part of `owner`, or a part has nothing.
    """
    parts = {n: m for n, m in owner.named_modules() if isinstance(m, Stateful)}
    odd = remembered.keys() ^ {name for name, part in parts.items() if part.remembered()}
    if odd:
        raise ValueError(
            f"what strategies remember does not fit this configuration, e.g. {min(odd)!r}"
        )
    for name, kept in remembered.items():
        parts[name].remember(kept)


def memory(owner: nn.Module, strategies: Iterable[object]) -> nn.ModuleList:
    """What `nested_state` finds and `owner` has not registered by itself."""
    known = set(owner.modules())
    return nn.ModuleList(part for part in nested_state(strategies) if part not in known)


def nested_state(strategies: Iterable[object]) -> Iterator[nn.Module]:
    """The outermost modules inside strategies that are dataclasses, in the order of their fields.

    A module registers what is in it by itself; a dataclass does not.
    """
    for strategy in strategies:
        if isinstance(strategy, nn.Module):
            yield strategy
        elif isinstance(strategy, list | tuple):
            yield from nested_state(strategy)
        elif isinstance(strategy, dict):
            yield from nested_state(strategy.values())
        elif is_dataclass(strategy):
            yield from nested_state(getattr(strategy, field.name) for field in fields(strategy))
