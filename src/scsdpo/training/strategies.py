"""The strategies of a method, and which of them cannot work together."""

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
    """What a method is made of, beside the policy and how it is sampled."""

    teacher: Teacher
    reference: Teacher
    advantage: Advantage
    weighting: Weighting
    token_weighting: TokenWeighting
    reduction: Reduction
    importance: Importance
    selection: Selection

    def update(self) -> Update:
        """What turns a batch into losses."""
        looking = (self.token_weighting, self.advantage, self.importance)
        return Update(
            teacher=self.teacher,
            reference=self.reference,
            token_weighting=self.token_weighting,
            reduction=self.reduction,
            importance=self.importance,
            needs=frozenset().union(*(each.needs for each in looking)),
            derivations=tuple(make for each in looking for make in each.derivations),
        )

    def weightings(self) -> Weighting:
        """Each of them, in parts of the advantage too: what it is asked, all are asked."""
        return Product(factors=(self.weighting, *self.advantage.weightings))

    def remembering(self) -> tuple[object, ...]:
        """Those that may keep something over steps."""
        contexts = (self.teacher.context, self.reference.context)
        own = (self.advantage, self.weighting, self.token_weighting, self.selection)
        return (*own, self.teacher, self.reference, *contexts)

    def check(self, *, group: int, updates_per_rollout: int) -> None:
        """Check them against each other, before any weight is loaded.

        Args:
            group: G, rollouts a question.
            updates_per_rollout: optimizer steps a batch.

        Raises:
            ConfigurationError: naming the keys and the remedy.
        """
        self._check_teachers()
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
                "model.importance: set it to SamplerImportance, or model.updates_per_rollout to 1: "
                f"with {updates_per_rollout} updates {type(self.importance).__name__} and "
                f"model.advantage ({type(self.advantage).__name__}) would both multiply by the "
                "ratio of the policy to the one that sampled"
            )

    def _check_teachers(self) -> None:
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
                f"of the teacher, and {type(self.teacher.context).__name__} is {parts}: set it to "
                "Contexts with as many parts (configs/methods/purified-opsd.yaml, rlcsd.yaml)"
            )
        if self.teacher.exists and not (self.advantage.needs_teacher or entropy):
            raise ConfigurationError(
                f"model.teacher: {type(self.teacher).__name__} is not used, because "
                f"model.advantage is {advantage}: set model.teacher to NoTeacher"
            )
        if self.advantage.needs_reference and not self.reference.exists:
            raise ConfigurationError(
                f"model.advantage: {advantage} needs a reference, but model.reference is "
                "NoTeacher: set it to Frozen with the context PlainPrompt"
            )
        if self.reference.exists and not self.advantage.needs_reference:
            raise ConfigurationError(
                f"model.reference: {type(self.reference).__name__} is not used, because "
                f"model.advantage is {advantage}: set model.reference to NoTeacher, or Blend the "
                "advantage with a ReferenceAnchor"
            )


def _comparing(strategy: Advantage | Weighting | Selection) -> str:
    """The class that compares the rollouts of a question, however deep inside `strategy`."""
    parts: list[Advantage | Weighting] = []
    if isinstance(strategy, Composed):
        parts = [part for each in strategy.inner for part in (each.advantage, each.weighting)]
    elif isinstance(strategy, Product):
        parts = list(strategy.factors)
    inside = [part for part in parts if part.needs_group]
    return _comparing(inside[0]) if inside else type(strategy).__name__
