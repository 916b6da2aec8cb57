"""Sets of weights that a teacher runs with, beside those that are trained."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scsdpo.policy.row_path import KnownPath
from scsdpo.policy.sharding import is_sharded
from scsdpo.policy.stored import OffloadHooks, Stored
from scsdpo.private.torch import Moved


class Weights(nn.Module, ABC):
    """A second set of weights: a whole model, or an adapter on the policy's base."""

    stored = Stored()
    """Where and in which dtype it is kept."""

    def begin(self, model: nn.Module) -> None:
        """Set the first values once shards are allocated; the policy's `model` has its values."""
        self.follow(model, 1.0)

    def runs_in(self, student: torch.dtype) -> torch.dtype:
        """Dtype of the weights while they run, given the student's."""
        return student

    def known(self, policy: KnownPath) -> KnownPath:
        """How rows run, given how the policy's rows run."""
        return policy

    @abstractmethod
    def active(self, model: nn.Module) -> AbstractContextManager[PreTrainedModel]:
        """The language model with these weights, while the context is open.

        Args:
            model: the policy's.
        """

    @abstractmethod
    def pairs(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """(own tensor, the student's) for each trained tensor; this rank's part if sharded."""

    def models(self) -> tuple[PreTrainedModel, ...]:
        """The models that this set owns beside the policy's."""
        return ()

    def same(self, other: "Weights") -> bool:
        """True if both are the same weights, so that one forward serves both."""
        return self is other

    @torch.no_grad()
    def follow(self, model: nn.Module, rate: float) -> None:
        """Move towards the policy's `model`: theta' <- (1 - rate) theta' + rate theta."""
        for own, student in self.pairs(model):
            if rate == 1:
                own.copy_(student)
            else:
                own.lerp_(student.to(own.dtype), rate)


class Whole(Weights, Moved):
    """A whole frozen model beside the policy's.

    Args:
        model: a model with its own weights.
        stored: how they are kept between forwards.
        saved: True: they are part of checkpoints.
    """

    def __init__(self, model: PreTrainedModel, stored: Stored, *, saved: bool) -> None:
        super().__init__()
        self.stored = stored
        self.copy = model.requires_grad_(False)
        self._hooks: OffloadHooks | None = None
        if not saved:
            self.register_state_dict_post_hook(_forget)

    @contextmanager
    def active(self, model: nn.Module) -> Iterator[PreTrainedModel]:
        if self.stored.is_plain or is_sharded(self.copy):
            yield self.copy
            return
        if self._hooks is None:
            self._hooks = OffloadHooks(self.copy)
        student = next(model.parameters())
        with self._hooks.open(student.device, self.runs_in(student.dtype)):
            yield self.copy

    def moves_alone(self, fn: Callable[[Tensor], Tensor]) -> bool:
        """Weights on the host stay there when the module moves; their buffers move."""
        if self.stored.on_host:
            for part in self.modules():
                for name, buffer in part.named_buffers(recurse=False, remove_duplicate=False):
                    setattr(part, name, fn(buffer))
        return self.stored.on_host

    def models(self) -> tuple[PreTrainedModel, ...]:
        return (self.copy,)


def _forget(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        del state[key]
