"""The contract of a teacher: whose weights read which context."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from scsdpo.contracts import declared
from scsdpo.loss import TokenLogits
from scsdpo.policy import CausalLM, Weights
from scsdpo.policy.chat import Chat
from scsdpo.teacher.context import Context, Contexts, PlainPrompt
from scsdpo.types import Judged, TeacherContexts


class Teacher(nn.Module, ABC):
    """What would the model say, had it known more?

    A teacher is one or two sets of weights (`trunks`) that read the context and then the
    student's own response, and a rule (`combine`) that makes one distribution of their logits.
    It is an `nn.Module`, so that weights of its own are checkpointed and moved with the model.

    Args:
        context: the privileged information.
    """

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.context = context

    @declared
    def exists(self) -> bool:
        """False for `NoTeacher` only."""
        return True

    def contexts(self, chat: Chat, judged: Judged) -> dict[str, TeacherContexts]:
        """What it reads before each response, by the names of `Context.named`."""
        return {name: part.render(chat, judged) for name, part in self.context.named.items()}

    def available(self, contexts: Mapping[str, TeacherContexts]) -> Tensor:
        """[Q, G] bool: rollouts that have what it needs of its contexts, which go by slot."""
        needed = self.context.needed if isinstance(self.context, Contexts) else 1
        own = [each for slot, each in contexts.items() if slot.startswith("teacher")]
        return torch.stack([each.available for each in own[: needed or len(own)]]).all(0)

    def check(self, policy: CausalLM) -> None:
        """Refuse a policy that it cannot teach, before any weight is loaded.

        Raises:
            ValueError: in one line, with the remedy.
        """

    def configure(self, policy: CausalLM, slot: str) -> None:
        """Make weights of its own once the policy has its own; a second call does nothing.

        Args:
            policy: with its weights loaded.
            slot: `teacher` or `reference`; names a LoRA teacher's adapter.
        """

    def share(self, other: "Teacher") -> None:
        """Use the weights of `other` if they stay the same for good; called before `configure`."""

    @abstractmethod
    def trunks(self, policy: CausalLM) -> tuple[Weights, ...]:
        """The sets of weights to run."""

    def combine(
        self, student: Callable[[], TokenLogits], trunks: tuple[TokenLogits, ...]
    ) -> TokenLogits:
        """The target distribution, from each trunk's logits and, if asked for, the student's."""
        return trunks[0]

    def after_step(self, policy: CausalLM) -> None:
        """Follow the student; called once after each optimizer step that was taken."""

    @declared
    def can_begin_anew(self) -> bool:
        """Whether `begin_anew` makes its weights those of the policy, for good."""
        return True

    def begin_anew(self, policy: CausalLM) -> None:
        """Be the policy as it is now; called once, at the end of a warm-up."""


class NoTeacher(Teacher):
    """There is none: for advantages made from rewards alone, and for an unused reference."""

    def __init__(self) -> None:
        super().__init__(PlainPrompt())

    @property
    def exists(self) -> bool:
        return False

    def contexts(self, chat: Chat, judged: Judged) -> dict[str, TeacherContexts]:
        questions, group = judged.rewards.shape
        return {"": TeacherContexts(ids=(((),) * group,) * questions)}

    def trunks(self, policy: CausalLM) -> tuple[Weights, ...]:
        return ()


def contexts_of(
    teacher: Teacher, reference: Teacher, chat: Chat, judged: Judged
) -> dict[str, TeacherContexts]:
    """What both read before each response, by slot: `teacher`, `teacher/NAME`, `reference`, ..."""
    found = {}
    for slot, each in (("teacher", teacher), ("reference", reference)):
        for number, (name, context) in enumerate(each.contexts(chat, judged).items()):
            found[f"{slot}/{name}" if number else slot] = context
    return found
