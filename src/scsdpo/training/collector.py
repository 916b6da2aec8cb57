"""Samples and judges responses, in training, evaluation and analysis alike."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from scsdpo.errors import ConfigurationError
from scsdpo.metrics import PhaseTimer
from scsdpo.policy import CausalLM
from scsdpo.rollout import Drawing, Drawn, Rollout
from scsdpo.training.budget import SAMPLING_REMEDY, Budget, as_out_of_memory
from scsdpo.training.finite import check_sampled
from scsdpo.types import Judged, Prompt, Responses, Sampling, Verdict
from scsdpo.verifiers import Episodes, Failures, Verification, VerifierPool


class Collector:
    """Samples responses, as many at a time as memory allows, and judges them in other processes.

    Args:
        rollout: the sampler.
        verification: number of processes that judge, and their deadlines.
        success_threshold: a rollout with at least this reward is a success.
        timer: measures the phases `rollout` and `verify`.
    """

    def __init__(
        self,
        rollout: Rollout,
        verification: Verification,
        success_threshold: float,
        timer: PhaseTimer,
    ) -> None:
        self.rollout, self.verifiers = rollout, VerifierPool(verification)
        self.failures = Failures()
        self.success_threshold, self.timer = success_threshold, timer
        self.room = Budget("responses in flight", SAMPLING_REMEDY)
        self._said = False

    def sample(
        self, module: nn.Module, policy: CausalLM, prompts: Sequence[Prompt], sampling: Sampling
    ) -> Responses:
        """Sample responses of the present policy, with fewer rows at a time if memory runs out.

        Args:
            module: holds policy and teachers, whose weights are searched for faults if nothing can
                be sampled.
            policy: the language model.
            prompts: the questions.
            sampling: how responses are drawn.

        Raises:
            TrainingStopped: if memory does not suffice for one row, or logits are not finite.
        """

        def attempt(rows: int) -> Responses:
            sampler = self.rollout.with_max_rows(rows)
            with as_out_of_memory():
                if not any(prompt.has_turns for prompt in prompts):
                    return sampler.sample(policy, prompts, sampling)
                with Episodes(self.verifiers, prompts, sampling.n) as episodes:
                    return sampler.play(policy, prompts, sampling, episodes)

        with self.timer("rollout"):
            most = self.rollout.rows_in_flight(len(prompts) * sampling.n)
            least = most if self.rollout.with_max_rows(1) is self.rollout else 1
            with self.rollout.hold_weights(policy):  # so that ranks may try different times
                responses = self.room.run(attempt, most=most, extent=lambda: (least, most))
            check_sampled(responses, module)
        self.timer.count("rollout", int(responses.lengths.sum()))
        return responses

    def begin(
        self,
        module: nn.Module,
        policy: CausalLM,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        within: bool,
    ) -> Drawing:
        """Ask for responses. This waits for them only if the sampler cannot draw while the trainer
        learns: in this process, and episodes of several turns, whose environments answer meanwhile.

        Ranks may have different questions: each begins something, so that the engine knows.

        Args:
            module: as for `sample`.
            policy: the language model, whose present weights are sampled from.
            prompts: the questions.
            sampling: how responses are drawn.
            within: weights may change amid a response.
        """
        if not self.rollout.draws_behind:
            return Drawn(self.sample(module, policy, prompts, sampling))
        alone = [q for q, prompt in enumerate(prompts) if not prompt.has_turns]
        with_turns = [q for q, prompt in enumerate(prompts) if prompt.has_turns]
        with self.timer("rollout"), self.rollout.hold_weights(policy):
            asked = [prompts[q] for q in alone]
            behind = self.rollout.begin(policy, asked, sampling, within=within)
            if not with_turns:
                return behind
            played = self.sample(module, policy, [prompts[q] for q in with_turns], sampling)
        return _Mixed(behind, played, [*alone, *with_turns])

    def finish(self, module: nn.Module, drawing: Drawing) -> Responses:
        """Wait for the responses that `begin` asked for.

        Args:
            module: as for `sample`.
            drawing: what `begin` returned.

        Raises:
            TrainingStopped: if logits are not finite, or the sampler has failed.
        """
        if isinstance(drawing, Drawn):
            return drawing.responses()
        if isinstance(drawing, _Mixed):
            return drawing.joined(self.finish(module, drawing.behind))
        with self.timer("rollout"):
            responses = drawing.responses()
            check_sampled(responses, module)
        self.timer.count("rollout", int(responses.lengths.sum()))
        return responses

    def check_room(self, key: str, sampling: Sampling, prompt_tokens: int) -> None:
        """Check that the sampler has room for the longest prompt and its longest response.

        Args:
            key: name of `sampling` in the configuration.
            sampling: how responses are drawn.
            prompt_tokens: `data.max_prompt_tokens`.

        Raises:
            ConfigurationError: if it has not.
        """
        room = self.rollout.max_length()
        if room is not None and prompt_tokens > self.prompt_room(sampling):
            raise ConfigurationError(
                f"model.rollout has room for {room} tokens of a prompt and its response, but "
                f"data.max_prompt_tokens ({prompt_tokens}) and model.{key}.max_new_tokens "
                f"({sampling.max_new_tokens}) are {prompt_tokens + sampling.max_new_tokens}: raise "
                "model.rollout.init_args.engine.init_args.max_model_len, or lower one of them"
            )

    def prompt_room(self, sampling: Sampling) -> float:
        """Tokens that a prompt may have, so that the longest response has room behind it."""
        room = self.rollout.max_length()
        return math.inf if room is None else room - sampling.max_new_tokens

    def judge(self, responses: Responses, split: Literal["train", "val", "test"]) -> Judged:
        """Verdicts by each prompt's verifier; failures of verifiers are logged.

        Episodes of several turns got theirs when they ended.

        Raises:
            TrainingStopped: if most calls of a verifier failed.
        """
        played = [[each.verdict for each in group if each.verdict] for group in responses.episodes]
        with self.timer("verify"):
            texts = [() if p else t for p, t in zip(played, responses.texts, strict=True)]
            judged = self.verifiers.verify(responses.prompts, texts)
        verdicts = tuple((*p, *v) for p, v in zip(played, judged, strict=True))
        self.failures.count(responses.prompts, verdicts)
        self._explain_partial_reward(verdicts)
        rewards = torch.tensor(
            [[verdict.reward for verdict in group] for group in verdicts],
            dtype=torch.float32,
            device=responses.ids.device,
        ).view(responses.ids.shape[:2])
        return Judged(
            responses=responses,
            verdicts=verdicts,
            rewards=rewards,
            successes=rewards >= self.success_threshold,
            split=split,
        )

    def _explain_partial_reward(self, verdicts: Sequence[Sequence[Verdict]]) -> None:
        """Print which reward is a success when the first reward between 0 and 1 comes."""
        partial = (v.reward for group in verdicts for v in group if 0 < v.reward < 1)
        if not self._said and (first := next(partial, None)) is not None:
            self._said = True
            rank_zero_info(
                f"the verifier gave a reward between 0 and 1 ({first:g}). A response counts as "
                "right if its reward is at least model.success_threshold, which is "
                f"{self.success_threshold:g}"
            )

    def close(self) -> None:
        """Close the rollout's engine and the processes that judge."""
        self.rollout.close()
        self.verifiers.close()


class _Mixed(Drawing):
    """Questions of which some have several turns, and were played.

    Args:
        behind: the others.
        played: responses to those.
        places: of `behind` and then of `played`, in the batch.
    """

    def __init__(self, behind: Drawing, played: Responses, places: Sequence[int]) -> None:
        self.behind, self._played = behind, played
        self._order = sorted(range(len(places)), key=places.__getitem__)

    @property
    def is_done(self) -> bool:
        return self.behind.is_done

    @property
    def label(self) -> str:
        return self.behind.label

    def responses(self) -> Responses:
        return self.joined(self.behind.responses())

    def joined(self, others: Responses) -> Responses:
        """Join the responses of one turn with the played ones, in the order of the batch."""
        return others.cat([self._played])[self._order]
