"""Strategies that remember: what they keep is checkpointed, wherever they are nested."""

from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass

from torch import nn


class Stateful(nn.Module):
    """A part of a strategy that changes during training.

    What it keeps in buffers or `get_extra_state` (tensors and primitives only) is in the
    checkpoint. Every rank keeps the same: what depends on a rank's questions is gathered first.
    """

    def after_step(self) -> None:
        """Called once after each optimizer step that was taken."""


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
        elif is_dataclass(strategy):
            yield from nested_state(getattr(strategy, field.name) for field in fields(strategy))
