"""The strategies of a method, and the check that they can work together."""

from dataclasses import dataclass

from scsdpo.advantage import Advantage, Composed
from scsdpo.errors import ConfigurationError
from scsdpo.loss import Importance
from scsdpo.reduction import Reduction
from scsdpo.selection import Selection
from scsdpo.teacher import Teacher
from scsdpo.training.step import OBJECTIVE_OF_TABLES, Update
from scsdpo.weighting import Product, TokenWeighting, Weighting


@dataclass(frozen=True, kw_only=True, eq=False)
class Strategies:
    """The strategies of a method, beside the policy and its sampling."""

    teacher: Teacher
    reference: Teacher
    advantage: Advantage
    weighting: Weighting
    token_weighting: TokenWeighting
    reduction: Reduction
    importance: Importance
    selection: Selection

    def update(self) -> Update:
        """The `Update` that computes the losses of a batch."""
        reading = (self.token_weighting, self.advantage, self.importance)
        return Update(
            teacher=self.teacher,
            reference=self.reference,
            token_weighting=self.token_weighting,
            reduction=self.reduction,
            importance=self.importance,
            needs=frozenset().union(*(each.needs for each in reading)),
            derivations=tuple(make for each in reading for make in each.derivations),
        )

    def weightings(self) -> Weighting:
        """The product of all weightings, those in parts of the advantage too; to configure them."""
        return Product(factors=(self.weighting, *self.advantage.weightings))

    def remembering(self) -> tuple[object, ...]:
        """The strategies and contexts that may have state."""
        contexts = (self.teacher.context, self.reference.context)
        own = (self.advantage, self.weighting, self.token_weighting, self.selection)
        return (*own, self.teacher, self.reference, *contexts)

    def check(self, *, group: int, updates_per_rollout: int, warms_up: bool) -> None:
        """Check that the strategies can work together, before any weight is loaded.

        Args:
            group: G, rollouts per question.
            updates_per_rollout: optimizer steps per batch.
            warms_up: True if a warm-up reads the teacher's prompt.

        Raises:
            ConfigurationError: naming the keys and the remedy.
        """
        self._check_teachers(warms_up)
        compared: list[tuple[str, Advantage | Weighting | Selection]] = [
            ("advantage", self.advantage),
            *[("advantage", weighting) for weighting in self.advantage.weightings],
            ("weighting", self.weighting),
            ("selection", self.selection),
        ]
        for key, strategy in compared:
            if strategy.needs_group and group == 1:
                raise ConfigurationError(
                    f"model.{key}: {_comparing(strategy)} compares the rollouts of a question: "
                    "set model.sampling.n above 1"
                )
        reads = self.advantage.needs or self.advantage.derivations
        if reads and "objective" in self.token_weighting.needs:
            raise ConfigurationError(f"model.token_weighting: {OBJECTIVE_OF_TABLES}")
        if updates_per_rollout < 1:
            raise ConfigurationError(
                f"model.updates_per_rollout must be >= 1, got {updates_per_rollout}"
            )
        if updates_per_rollout > 1 and self.advantage.has_ratio and self.importance.of_current:
            raise ConfigurationError(
                f"model.importance: with model.updates_per_rollout at {updates_per_rollout}, both "
                f"{type(self.importance).__name__} and model.advantage "
                f"({type(self.advantage).__name__}) correct for the updates within a batch, which "
                "would count twice: set model.importance to SamplerImportance, or "
                "model.updates_per_rollout to 1"
            )

    def _check_teachers(self, warms_up: bool) -> None:
        advantage = type(self.advantage).__name__
        entropy = any(name.startswith("teacher") for name in self.token_weighting.needs)
        if entropy and not self.teacher.exists:
            raise ConfigurationError(
                f"model.token_weighting: {type(self.token_weighting).__name__} reads the teacher, "
                "but model.teacher is NoTeacher: choose one, such as EMA (--model.teacher.help)"
            )
        if self.advantage.needs_teacher and not self.teacher.exists:
            raise ConfigurationError(
                f"model.advantage: {advantage} needs a teacher, but model.teacher is NoTeacher: "
                "choose one, such as EMA (--model.teacher.help)"
            )
        parts, wanted = len(self.teacher.context.named), self.advantage.contexts
        if "others" in self.token_weighting.needs:
            wanted = max(wanted, 2)
        if self.teacher.exists and parts < wanted:
            raise ConfigurationError(
                f"model.teacher.context: the advantage or the token weights read {wanted} contexts "
                f"of the teacher, but {type(self.teacher.context).__name__} has {parts}: set it to "
                f"Contexts with {wanted} parts (configs/methods/purified-opsd.yaml, rlcsd.yaml)"
            )
        if self.teacher.exists and not (self.advantage.needs_teacher or entropy or warms_up):
            raise ConfigurationError(
                f"model.teacher: {type(self.teacher).__name__} is never used, because "
                f"model.advantage ({advantage}) reads no teacher: set model.teacher to NoTeacher"
            )
        if self.advantage.needs_reference and not self.reference.exists:
            raise ConfigurationError(
                f"model.advantage: {advantage} needs a reference, but model.reference is "
                "NoTeacher: set it to Frozen with the context PlainPrompt"
            )
        if self.reference.exists and not self.advantage.needs_reference:
            raise ConfigurationError(
                f"model.reference: {type(self.reference).__name__} is never used, because "
                f"model.advantage ({advantage}) reads no reference: set model.reference to "
                "NoTeacher, or Blend the advantage with a ReferenceAnchor"
            )


def _comparing(strategy: Advantage | Weighting | Selection) -> str:
    """Name of the class inside `strategy`, at any depth, that compares a question's rollouts."""
    parts: list[Advantage | Weighting] = []
    if isinstance(strategy, Composed):
        parts = [part for each in strategy.inner for part in (each.advantage, each.weighting)]
    elif isinstance(strategy, Product):
        parts = list(strategy.factors)
    inside = [part for part in parts if part.needs_group]
    return _comparing(inside[0]) if inside else type(strategy).__name__
