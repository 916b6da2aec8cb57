"""The contract of a teacher: its weights, and the context that they read."""

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
    """A distribution T(. | x, f, y<t) that knows more than the student: it reads a context f.

    A teacher has one or two sets of weights (`weights_to_run`), which read the context and then the
    student's own response, and a rule (`combine`) that makes one distribution from their logits.
    It is an `nn.Module`, so that its own weights are checkpointed and moved with the model.

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
        """Name of each part of the context (`Context.named`) -> teacher prompts."""
        return {name: part.render(chat, judged) for name, part in self.context.named.items()}

    def available(self, contexts: Mapping[str, TeacherContexts]) -> Tensor:
        """[Q, G] bool: rollouts that have all contexts that the teacher needs.

        Args:
            contexts: slot -> teacher prompts, as `contexts_of` gives them.
        """
        needed = self.context.needed if isinstance(self.context, Contexts) else 1
        own = [each for slot, each in contexts.items() if slot.startswith("teacher")]
        return torch.stack([each.available for each in own[: needed or len(own)]]).all(0)

    def check(self, policy: CausalLM) -> None:
        """Check, before any weight is loaded, that the teacher can teach this policy.

        Raises:
            ValueError: if it cannot, in one line with the remedy.
        """

    def configure(self, policy: CausalLM, slot: str) -> None:
        """Make the teacher's own weights; a second call does nothing.

        Args:
            policy: with its weights loaded.
            slot: `teacher` or `reference`; names a LoRA teacher's adapter.
        """

    def share(self, other: "Teacher") -> None:
        """Use the weights of `other` if both will never change; called before `configure`."""

    @abstractmethod
    def weights_to_run(self, policy: CausalLM) -> tuple[Weights, ...]:
        """The sets of weights whose logits `combine` needs."""

    def combine(
        self, student: Callable[[], TokenLogits], teachers: tuple[TokenLogits, ...]
    ) -> TokenLogits:
        """The target distribution T.

        Args:
            student: gives the student's logits, which are computed if it is called.
            teachers: the logits of each set of `weights_to_run`.
        """
        return teachers[0]

    def after_step(self, policy: CausalLM) -> None:
        """Follow the student; called once after each optimizer step that was taken."""

    @declared
    def can_begin_anew(self) -> bool:
        """True if `begin_anew` can set the teacher's weights to the policy's."""
        return True

    def begin_anew(self, policy: CausalLM) -> None:
        """Set the weights to those of the present policy; called once, at a warm-up's end."""


class NoTeacher(Teacher):
    """No teacher: for advantages that read rewards alone, and for an unused reference."""

    def __init__(self) -> None:
        super().__init__(PlainPrompt())

    @property
    def exists(self) -> bool:
        return False

    def contexts(self, chat: Chat, judged: Judged) -> dict[str, TeacherContexts]:
        questions, group = judged.rewards.shape
        return {"": TeacherContexts(ids=(((),) * group,) * questions)}

    def weights_to_run(self, policy: CausalLM) -> tuple[Weights, ...]:
        return ()


def contexts_of(
    teacher: Teacher, reference: Teacher, chat: Chat, judged: Judged
) -> dict[str, TeacherContexts]:
    """Slot (`teacher`, `teacher/NAME`, `reference`, ...) -> teacher prompts, for both teachers."""
    found = {}
    for slot, each in (("teacher", teacher), ("reference", reference)):
        for number, (name, context) in enumerate(each.contexts(chat, judged).items()):
            found[f"{slot}/{name}" if number else slot] = context
    return found
