"""The contract of a teacher: whose weights read which context."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import nn

from scsdpo.loss import TokenLogits
from scsdpo.policy import CausalLM, Weights
from scsdpo.policy.chat import Chat
from scsdpo.teacher.context import Context, PlainPrompt
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

    @property
    def exists(self) -> bool:
        """False for `NoTeacher` only."""
        return True

    def contexts(self, chat: Chat, judged: Judged) -> TeacherContexts:
        """Teacher prompts [Q][G], or none, per rollout."""
        return self.context.render(chat, judged)

    def configure(self, policy: CausalLM, slot: str) -> None:
        """Make weights of its own once the policy has its own; a second call does nothing.

        Args:
            policy: with its weights loaded.
            slot: `teacher` or `reference`; names a LoRA teacher's adapter.
        """

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


class NoTeacher(Teacher):
    """There is none: for advantages made from rewards alone, and for an unused reference."""

    def __init__(self) -> None:
        super().__init__(PlainPrompt())

    @property
    def exists(self) -> bool:
        return False

    def contexts(self, chat: Chat, judged: Judged) -> TeacherContexts:
        questions, group = judged.rewards.shape
        return TeacherContexts(ids=(((),) * group,) * questions)

    def trunks(self, policy: CausalLM) -> tuple[Weights, ...]:
        return ()
