"""What a warmed-up policy and its in-context teacher can do, by sampling."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from scsdpo.data.rendered import rendered
from scsdpo.lab.tasks import LabTasks
from scsdpo.policy import CausalLM
from scsdpo.rollout import HFRollout
from scsdpo.teacher.templates import Templates
from scsdpo.types import Prompt, Responses, Sampling, Verdict
from scsdpo.verifiers import verify_all

MAX_NEW_TOKENS = 64
"""Enough for every right response to a lab question, end-of-sequence included."""
TRAIN_SAMPLING = Sampling(n=4, temperature=1.0, max_new_tokens=MAX_NEW_TOKENS)
VAL_SAMPLING = Sampling(n=16, temperature=0.6, top_p=0.95, max_new_tokens=MAX_NEW_TOKENS)


def respond(
    policy: CausalLM, prompts: Sequence[Prompt], sampling: Sampling
) -> tuple[Responses, tuple[tuple[Verdict, ...], ...]]:
    """Responses and verdicts [Q][n]; prompts are rendered where they were not yet."""
    asked = [p if p.ids else rendered(p, policy.chat) for p in prompts]
    responses = HFRollout().sample(policy, asked, sampling)
    return responses, verify_all(asked, responses.texts)


def level_and_shape(prompt: Prompt) -> tuple[str, ...]:
    """The strata of a question of `LabTasks`."""
    return prompt.category, prompt.key.split("/")[2]


def accuracy(
    prompts: Sequence[Prompt],
    verdicts: Sequence[Sequence[Verdict]],
    *,
    strata: Callable[[Prompt], Sequence[str]] = level_and_shape,
) -> dict[str, float]:
    """Mean reward: over `all`, and of each stratum."""
    found: dict[str, list[float]] = {"all": []}
    for prompt, group in zip(prompts, verdicts, strict=True):
        for name in ("all", *strata(prompt)):
            found.setdefault(name, []).extend(verdict.reward for verdict in group)
    return {name: _mean(rewards) for name, rewards in sorted(found.items())}


def well_formed(responses: Responses, verdicts: Sequence[Sequence[Verdict]]) -> float:
    """Share of responses that ended by themselves and hold an answer, right or wrong."""
    ended = responses.ended.flatten().tolist()
    held = [verdict.answer is not None for group in verdicts for verdict in group]
    return _mean([float(a and b) for a, b in zip(ended, held, strict=True)])


def measure(policy: CausalLM, *, questions: int = 400, seed: int = 0) -> dict[str, object]:
    """The figures of a pretraining record, on held-out questions.

    `bare` and `bare_sharp`: the policy by itself, at the temperatures of training and validation.
    `teacher`: shown the gold response; `teacher_by_sibling`: shown a right response of its own,
    where one of the four bare ones was right. Both at temperature 1.
    """
    tasks = LabTasks("val", seed=seed)
    prompts = [tasks[i] for i in range(questions)]
    policy.configure_model()
    _, sharp = respond(policy, prompts, VAL_SAMPLING)
    rollouts, bare = respond(policy, prompts, TRAIN_SAMPLING)
    gold = [tasks.question(i).response(wording=i % 2) for i in range(questions)]
    siblings = [
        next((t for t, v in zip(texts, group, strict=True) if v.reward == 1), "")
        for texts, group in zip(rollouts.texts, bare, strict=True)
    ]
    return {
        "questions": questions,
        "bare": accuracy(prompts, bare),
        "bare_sharp": accuracy(prompts, sharp),
        "well_formed": well_formed(rollouts, bare),
        "teacher": _shown(policy, prompts, gold),
        "teacher_by_sibling": _shown(policy, prompts, siblings),
    }


def _shown(
    policy: CausalLM, prompts: Sequence[Prompt], demonstrations: Sequence[str]
) -> dict[str, float]:
    """Accuracy of the policy shown `demonstrations`; prompts with an empty one are left out."""
    told = [
        replace(p, messages=tuple(Templates().fill(p.messages, demonstration=text)))
        for p, text in zip(prompts, demonstrations, strict=True)
        if text
    ]
    return accuracy(told, respond(policy, told, replace(TRAIN_SAMPLING, n=1))[1])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
