"""Strategies with state, which is checkpointed however deep they are nested."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import nn

from scsdpo.types import Judged


class Stateful(nn.Module):
    """A part of a strategy that changes during training.

    Its buffers and `remembered` are in the checkpoint. The state must be the same on every rank:
    gather first what depends on a rank's questions.
    """

    def observe(self, judged: Judged) -> None:
        """Update the state from a batch; called once for each batch.

        It is called before the batch's first optimizer step, on every rank with its share. Other
        methods (`plan`, `weigh`, `claims`, `render`, `rates`) never change the state.
        """

    def after_step(self) -> None:
        """Called once after each optimizer step that was taken."""

    def remembered(self) -> dict[str, Any]:
        """State beside the buffers, in tensors and primitives.

        `get_extra_state` is not used, since a sharded load drops it without an error.
        """
        return {}

    def remember(self, remembered: Mapping[str, Any]) -> None:
        """Load the state that `remembered` returned."""


def all_remembered(owner: nn.Module) -> dict[str, dict[str, Any]]:
    """Module's name -> `remembered` of each `Stateful` in `owner` that has any."""
    parts = {n: m.remembered() for n, m in owner.named_modules() if isinstance(m, Stateful)}
    return {name: kept for name, kept in parts.items() if kept}


def remember_all(owner: nn.Module, remembered: Mapping[str, Mapping[str, Any]]) -> None:
    """Load the states that `all_remembered` returned.

    Raises:
        ValueError: if a state belongs to no part of `owner`, or a part has no state.
    """
    parts = {n: m for n, m in owner.named_modules() if isinstance(m, Stateful)}
    odd = remembered.keys() ^ {name for name, part in parts.items() if part.remembered()}
    if odd:
        raise ValueError(
            f"the saved state of strategies does not fit this configuration, e.g. {min(odd)!r}"
        )
    for name, kept in remembered.items():
        parts[name].remember(kept)


def memory(owner: nn.Module, strategies: Iterable[object]) -> nn.ModuleList:
    """The modules of `nested_state` that are not registered in `owner` yet."""
    known = set(owner.modules())
    return nn.ModuleList(part for part in nested_state(strategies) if part not in known)


def nested_state(strategies: Iterable[object]) -> Iterator[nn.Module]:
    """The outermost modules inside strategies, in the order of fields.

    A module registers the modules in it, but a dataclass does not.
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
