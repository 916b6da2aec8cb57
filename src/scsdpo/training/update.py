"""The update: from a batch of judged rollouts to losses with a gradient."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from scsdpo import contracts
from scsdpo.advantage import Batch
from scsdpo.distributed import all_max
from scsdpo.loss import (
    Chunk,
    Derivation,
    Importance,
    LossOutput,
    Objective,
    Observer,
    Signals,
    Tokens,
    credit_loss,
    unobserved,
)
from scsdpo.metrics import PhaseTimer
from scsdpo.policy import CausalLM
from scsdpo.reduction import Reduction
from scsdpo.teacher import Teacher
from scsdpo.training.budget import agreed
from scsdpo.training.forwards import Forwards, Loss
from scsdpo.training.measure import measure
from scsdpo.weighting import TokenWeighting


@dataclass(frozen=True, kw_only=True)
class Update:
    """Turns rows of a batch into losses with a gradient, micro-batch by micro-batch.

    Args:
        teacher: asked where the plan needs it.
        reference: the same, for the anchor.
        token_weighting: factor on each token.
        reduction: how tokens add up; denominators are those of the whole optimizer step.
        importance: factor on each token from the sampler's log-probs.
        needs: fields of `Signals` that the strategies ask for: a pass without gradient fills them.
        derivations: tables that strategies make of them.
        observe: called by the kernel with each block's credit; for looking, changes nothing.
        timer: told when a teacher runs.
    """

    teacher: Teacher
    reference: Teacher
    token_weighting: TokenWeighting
    reduction: Reduction
    importance: Importance
    needs: frozenset[str]
    derivations: tuple[Derivation, ...] = ()
    observe: Observer = unobserved
    timer: PhaseTimer = field(default_factory=PhaseTimer)

    def losses(
        self, policy: CausalLM, batch: Batch, rows: Sequence[int], max_tokens: int
    ) -> Iterator[tuple[LossOutput, Tensor]]:
        """Per micro-batch of the active ones among `rows`, its share of the step's loss and the
        sampler's log-probs [N]. The caller runs backward on each before asking for the next. There
        is none where every token of all ranks weighs 0.

        Args:
            policy: is run, and gets the gradient.
            batch: the rollouts and what is known of them.
            rows: those of this optimizer step.
            max_tokens: tokens whose activations are alive at a time. It changes memory and speed,
                and no number.
        """
        forwards = self._forwards(policy, batch, rows, max_tokens)
        with agreed(policy):  # collectives follow
            signals = measure(forwards, self.needs)
        for make in (*batch.plan.derivations, *self.derivations):
            signals.derive(make)
        factors = self._coefficients(forwards), self._token_weights(forwards, signals)
        chosen = forwards.chosen
        weighed = (factors[0][:, None] * factors[1])[chosen] * batch.sampled[chosen]
        if not bool(all_max(weighed.any().double())):
            return
        sampled = batch.judged.responses.policy_logprobs.flatten(0, 1)
        for micro, output in forwards.losses(partial(self._loss, forwards, signals, factors)):
            yield output, forwards.of_tokens(micro, sampled)

    def measure(
        self, policy: CausalLM, batch: Batch, rows: Sequence[int], max_tokens: int
    ) -> Tensor:
        """[R, L]: log S(y) of the active ones among `rows`, without gradient; nan elsewhere."""
        forwards = self._forwards(policy, batch, rows, max_tokens)
        signals = measure(forwards, {"student_logprob"})
        measured = batch.sampled & forwards.chosen[:, None]
        return torch.where(measured, signals.student_logprob, torch.nan)

    def _forwards(
        self, policy: CausalLM, batch: Batch, rows: Sequence[int], max_tokens: int
    ) -> Forwards:
        owners = {"teacher": self.teacher, "reference": self.reference}
        teachers = {slot: owners[slot.partition("/")[0]] for slot in batch.contexts}
        return Forwards(policy, teachers, batch, rows, max_tokens=max_tokens, timer=self.timer)

    def _coefficients(self, forwards: Forwards) -> Tensor:
        """[R]: question weight / denominator of every rollout."""
        batch, index = forwards.batch, forwards.index
        coefficients = torch.zeros_like(batch.weights.flatten())
        coefficients[index] = self.reduction.coefficients(
            forwards.lengths[index], batch.active[index]
        ).to(coefficients.dtype)
        return coefficients * batch.weights.flatten()

    def _token_weights(self, forwards: Forwards, signals: Signals) -> Tensor:
        """[R, L]."""
        distilled = forwards.batch.sampled & (forwards.reads["teacher"] & forwards.chosen)[:, None]
        return contracts.weights(
            self.token_weighting.weigh(signals, distilled),
            of=f"{type(self.token_weighting).__name__}.weigh",
            axes="[R, L]",
            shape=tuple(distilled.shape),
        )

    def _loss(
        self,
        forwards: Forwards,
        signals: Signals,
        factors: tuple[Tensor, Tensor],
        micro: list[int],
    ) -> Loss:
        """The micro-batch's share of the step's loss, once the student has run."""
        mask, (coefficients, weights) = forwards.batch.sampled, factors
        places = torch.arange(mask.numel(), device=mask.device).view_as(mask)
        tokens = Tokens(
            ids=forwards.of_tokens(micro, forwards.batch.ids),
            places=forwards.of_tokens(micro, places),
            scale=forwards.of_tokens(micro, coefficients[:, None].expand_as(mask)),
            weight=forwards.of_tokens(micro, weights),
            signals=signals,
        )
        objective = Objective(
            credit=forwards.batch.plan.credit,
            importance=self._importance,
            teacher=forwards.take("teacher", micro),
            reference=forwards.take("reference", micro),
            others=tuple(forwards.take(slot, micro) for slot in forwards.others),
            temperature=forwards.temperature,
            observe=self.observe,
        )
        return partial(credit_loss, tokens=tokens, objective=objective)

    def _importance(self, chunk: Chunk) -> Tensor:
        return contracts.numbers(
            self.importance.weigh(chunk),
            of=f"{type(self.importance).__name__}.weigh",
            axes="[n]",
            shape=tuple(chunk.ids.shape),
        )
