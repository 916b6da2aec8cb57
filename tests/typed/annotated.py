"""One of each strategy of the docs, with every annotation: pyright takes it in strict mode."""

# pyright: strict
# pyright: reportUnnecessaryTypeIgnoreComment=true
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import lightning as L
import torch
from torch import Tensor

import scsdpo
from scsdpo import (
    EMA,
    Blend,
    CausalLM,
    External,
    Frozen,
    GroupRelative,
    HFRollout,
    Lora,
    PassRate,
    PolicyOptimizer,
    Records,
    Routed,
    Sampling,
    SelfDistillation,
    TaskDataModule,
    Uniform,
    VLLMRollout,
)
from scsdpo import Nothing as Nothing  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]
from scsdpo.advantage import Advantage, Composed, HasTeacher, Plan, Route, Router, Weighted
from scsdpo.callbacks import RolloutCallback
from scsdpo.data import Source, Stream, make_prompt
from scsdpo.environments import Environment, Observation
from scsdpo.health import Finding, Rule, Series
from scsdpo.loss import Chunk, Credit, DenseCredit, Derivation, Signals, SparseCredit, SumCredit
from scsdpo.policy import Chat
from scsdpo.prompt import Prompt, Verdict
from scsdpo.rollout import Colocated, Rollout
from scsdpo.state import Stateful
from scsdpo.teacher import Context, Contexts, PlainPrompt, PrivilegedInfo, Reprompt
from scsdpo.types import Judged, Responses, TeacherContexts
from scsdpo.verifiers import ExactMatch, Verifier
from scsdpo.weighting import Weighting


@dataclass(frozen=True, kw_only=True)
class MiddleBand(Weighting):
    low: float = 0.2
    high: float = 0.8
    needs_group: bool = True

    def weigh(self, judged: Judged) -> Tensor:
        p = judged.pass_rates[:, None]
        return ((p >= self.low) & (p <= self.high)).double().expand_as(judged.rewards)


class Remembering(Weighting, Stateful):
    needs_group = False

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, float] = {}

    def observe(self, judged: Judged) -> None:
        self.seen |= {key: float(p) for key, p in zip(judged.keys, judged.pass_rates, strict=True)}

    def remembered(self) -> dict[str, Any]:
        return dict(self.seen)

    def remember(self, remembered: Mapping[str, Any]) -> None:
        self.seen = dict(remembered)

    def weigh(self, judged: Judged) -> Tensor:
        known = [[key in self.seen] for key in judged.keys]
        return torch.tensor(known).double().expand_as(judged.rewards)


def surprise_to_go(signals: Signals) -> Tensor:
    surprise = torch.where(signals.mask, -signals.student_logprob, 0.0)
    return surprise.flip(-1).cumsum(-1).flip(-1)


@dataclass(frozen=True, kw_only=True)
class Curiosity(Advantage):
    coefficient: float = 0.01
    needs = frozenset({"student_logprob"})
    derivations = (surprise_to_go,)
    objective_name = "curiosity"

    def plan(self, judged: Judged, available: Tensor) -> Plan:
        return Plan(active=torch.ones_like(available), credit=self.credit)

    def credit(self, chunk: Chunk) -> Credit:
        s, entropy = chunk.student.probs, chunk.student.entropy()
        surprise = torch.where(s > 0, -chunk.student.log_probs, 0.0)
        to_go = chunk.derived(surprise_to_go)
        dense = DenseCredit(
            values=self.coefficient * s * (surprise - entropy[:, None]),
            objective=-self.coefficient * entropy,
        )
        return SumCredit(parts=((to_go, dense), (1 - to_go, SparseCredit.nothing(chunk))))


@dataclass(frozen=True)
class TeacherGap(Advantage):
    needs_teacher = True
    needs_reference = True
    contexts = 2

    def plan(self, judged: Judged, available: Tensor) -> Plan:
        return Plan(
            active=available,
            needs_teacher=available,
            needs_reference=available,
            credit=self.credit,
        )

    def credit(self, chunk: Chunk) -> SparseCredit:
        other = chunk.others[0]().logprob(chunk.ids)
        gap = chunk.teacher().logprob(chunk.ids) - chunk.logprob
        return SparseCredit.at_sampled(chunk, gap + other, objective=-gap)


@dataclass(frozen=True)
class ByProperty(Advantage):
    inner: Advantage

    @property
    def needs_teacher(self) -> bool:
        return self.inner.needs_teacher

    @property
    def derivations(self) -> tuple[Derivation, ...]:
        return self.inner.derivations

    def plan(self, judged: Judged, available: Tensor) -> Plan:
        return self.inner.plan(judged, available)


@dataclass(frozen=True)
class Long(Router):
    tokens: int = 64

    def claims(self, judged: Judged, available: Tensor) -> Tensor:
        return judged.lengths > self.tokens


@dataclass(frozen=True, kw_only=True)
class GoldAnswer(Reprompt):
    def privileged(self, question: int, rollout: int, judged: Judged) -> PrivilegedInfo:
        return PrivilegedInfo(demonstration=f"It is {judged.prompts[question].answer}.")


@dataclass(frozen=True)
class Question(Context):
    def render(self, chat: Chat, judged: Judged) -> TeacherContexts:
        group = judged.rewards.shape[1]
        return TeacherContexts(ids=tuple((prompt.ids,) * group for prompt in judged.prompts))


@dataclass(frozen=True)
class IsSum(Verifier):
    strip_thinking = False

    def verify(self, prompt: Prompt, response: str) -> Verdict:
        number = (response.split() or [""])[-1]
        right = number == prompt.answer
        return Verdict(reward=float(right), answer=number, feedback="" if right else "Add again.")


class Sums(Stream):
    name = "sums"

    def read(self) -> Iterator[Prompt]:
        rng = Random(0)
        while True:
            a, b = rng.sample(range(100), 2)
            yield make_prompt("sums", question=f"{a} + {b}?", answer=f"{a + b}", verifier=IsSum())


@dataclass(frozen=True)
class Few(Source):
    name: str = "few"

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Prompt:
        return make_prompt(self.name, question="1 + 1?", answer="2", verifier=ExactMatch())


@dataclass(frozen=True, kw_only=True)
class Guessing(Environment):
    tries: int = 5
    replays = False

    def begin(self, prompt: Prompt) -> dict[str, int]:
        return {"tries": 0}

    def step(self, prompt: Prompt, state: dict[str, int], response: str) -> Observation | Verdict:
        state["tries"] += 1
        guess = re.search(r"\d+", response)
        if guess and int(guess[0]) == prompt.row["number"]:
            return Verdict(reward=1.0, answer=guess[0])
        if state["tries"] == self.tries:
            return Verdict(reward=0.0, feedback="All tries are used up.")
        return Observation.said("Say a number.", feedback="There was no number.")


class Nobody(Rollout):
    plays_episodes = False

    def sample(self, policy: CausalLM, prompts: Sequence[Prompt], sampling: Sampling) -> Responses:
        shape = (len(prompts), sampling.n, sampling.max_new_tokens)
        with policy.sampling_mode() as model:
            ids = torch.full(shape, policy.chat.pad_id, device=model.device)
        return Responses.of_one_turn(
            prompts=tuple(prompts),
            ids=ids,
            sampled=ids < 0,
            sampling_logprobs=ids.float(),
            policy_logprobs=ids.float(),
            ended=ids[..., 0] < 0,
            texts=(("",) * sampling.n,) * len(prompts),
            temperature=sampling.temperature,
        )


class Diversity(RolloutCallback):
    def on_rollouts(self, trainer: L.Trainer, module: L.LightningModule, judged: Judged) -> None:
        if judged.split == "train":
            distinct = [len(set(group)) / len(group) for group in judged.texts]
            module.log("train/distinct", sum(distinct) / len(distinct), sync_dist=True)


@dataclass(frozen=True, kw_only=True)
class SlowVerifier(Rule):
    batches: int = 5
    remedy = "raise model.verification.workers"

    def look(self, past: Series) -> Finding | None:
        verify = past.last("seconds/verify", self.batches)
        return None if not verify > 1 else Finding(message=f"{verify}", values={"verify": verify})


def modules() -> Iterator[PolicyOptimizer]:
    composed: Composed = Routed(
        routes=(
            Route(where=HasTeacher(), advantage=SelfDistillation()),
            Route(where=Long(), advantage=ByProperty(TeacherGap())),
        )
    )
    curious = Weighted(advantage=Curiosity(), weight=0.1, weighting=MiddleBand())
    yield PolicyOptimizer(
        policy=CausalLM("tiny", adapter=Lora(r=8)),
        advantage=Blend(parts=(Weighted(advantage=composed), curious)),
        teacher=EMA(rate=0.05, context=GoldAnswer()),
        reference=Frozen(context=PlainPrompt()),
        weighting=PassRate(power=0.5),
        rollout=HFRollout(),
        sampling=Sampling(n=8, max_new_tokens=64),
    )
    yield PolicyOptimizer(
        policy=CausalLM("tiny"),
        advantage=GroupRelative(),
        teacher=External(
            "tiny", context=Contexts(parts={"told": GoldAnswer(), "bare": Question()})
        ),
        weighting=Uniform(),
        rollout=VLLMRollout(Colocated()),
    )
    yield PolicyOptimizer(
        policy=CausalLM("tiny"),
        advantage=TeacherGap(),
        weighting=Remembering(),
        rollout=Nobody(),
    )
    wrong: int = "a checker that takes all fails here"  # pyright: ignore[reportAssignmentType]
    del wrong


def data() -> TaskDataModule:
    train = Records("train.jsonl", verifier=IsSum())
    return TaskDataModule([train, Sums(size=8)], Few(), questions_per_batch=4)


def figures(run: Path) -> list[float]:
    module, loaded = scsdpo.load(run, options=("--data.questions_per_batch=4",))
    prompts: Sequence[Prompt] = next(iter(loaded.train_dataloader()))
    trace = module.trace(prompts)
    gap: Tensor = trace.teacher_logprob[0, 0] - trace.logprob[0, 0]
    L.Trainer(max_steps=10, callbacks=[Diversity()]).fit(module, data())
    return [float(gap.mean()), trace.batch.judged.verdicts[0][0].reward]
