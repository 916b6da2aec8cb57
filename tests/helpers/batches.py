"""A batch of judged rollouts, methods to learn from it with, and the gradient of a step."""

import torch

from scsdpo.advantage import (
    Batch,
    Blend,
    Full,
    GroupMean,
    GroupRelative,
    PriorAtForks,
    ReferenceAnchor,
    SelfDistillation,
    SequenceLevel,
    TopK,
    Unscaled,
    Weighted,
)
from scsdpo.loss import NoImportance, TokenImportance
from scsdpo.policy import CausalLM
from scsdpo.reduction import SequenceMean, TokenMean
from scsdpo.teacher import EMA, Frozen, NoTeacher, PlainPrompt, contexts_of
from scsdpo.training import Update
from scsdpo.types import Judged, Prompt, Responses, Verdict
from scsdpo.verifiers import ExactMatch
from scsdpo.weighting import PassRate, TeacherEntropy, Uniform, UniformTokens

Q, G = 4, 3


def exact_norm(self, hidden):
    """RMSNorm in the model's own dtype: transformers casts to float32 even in a float64 model."""
    variance = hidden.pow(2).mean(-1, keepdim=True)
    return self.weight * hidden * torch.rsqrt(variance + self.variance_epsilon)


def double_policy(folder, **kwargs):
    torch.manual_seed(0)
    policy = CausalLM(str(folder), **kwargs)
    policy.configure_model()
    return policy.double()


def judged(policy, seed=0):
    """Random responses of lengths 0..9 to four questions with 2, 0, 3 and 1 successes."""
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for q in range(Q):
        messages = ({"role": "user", "content": "x" * (3 + 7 * q) + "?"},)
        ids = policy.chat.render(messages)
        prompts.append(
            Prompt(key=str(q), messages=messages, verifier=ExactMatch(), answer="", ids=ids)
        )
    lengths = torch.randint(0, 10, (Q, G), generator=generator)
    lengths[0, 0] = 9
    mask = torch.arange(9) < lengths[..., None]
    ids = torch.randint(3, 250, mask.shape, generator=generator) * mask
    noise = -torch.rand(mask.shape, generator=generator) * 5
    responses = Responses.of_one_turn(
        prompts=tuple(prompts),
        ids=ids,
        sampled=mask,
        sampling_logprobs=noise,
        policy_logprobs=noise,
        ended=mask.any(-1),
        texts=tuple(tuple(f"text {q} {g}" for g in range(G)) for q in range(Q)),
        temperature=0.8,
    )
    rewards = (torch.arange(G) < torch.tensor([2, 0, 3, 1])[:, None]).float()
    verdicts = tuple(tuple(Verdict(reward=r) for r in row) for row in rewards.tolist())
    return Judged(responses=responses, verdicts=verdicts, rewards=rewards, successes=rewards > 0.5)


def parts(
    policy, advantage, *, teacher=None, reference=None, weighting=None, chosen=range(Q), **update
):
    """Batch and update of some strategies on the `chosen` questions, teachers configured."""
    teacher = NoTeacher() if teacher is None else teacher
    reference = NoTeacher() if reference is None else reference
    teacher.configure(policy, "teacher")
    reference.configure(policy, "reference")
    some = judged(policy)[list(chosen)]
    contexts = contexts_of(teacher, reference, policy.chat, some)
    batch = Batch.of(
        some,
        advantage.planned(some, teacher.available(contexts)),
        (weighting or Uniform()).weights(some),
        contexts,
        (len(some.rewards),),
    )
    settings = {
        "token_weighting": UniformTokens(),
        "reduction": SequenceMean(),
        "importance": NoImportance(),
    } | update
    needs = settings["token_weighting"].needs | advantage.needs | settings["importance"].needs
    return batch, Update(teacher=teacher, reference=reference, needs=needs, **settings)


ALL = list(range(Q * G))


def gradient(policy, batch, update, rows=ALL, budget=10**6):
    """(loss, {name: gradient}, micro-batches) of one optimizer step."""
    policy.zero_grad()
    loss, count = 0.0, 0
    for output, _ in update.losses(policy, batch, rows, budget):
        output.loss.backward()
        loss, count = loss + output.loss.item(), count + 1
    return loss, {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}, count


METHODS = {
    "sc-sdpo": lambda: (
        SelfDistillation(support=TopK(k=20)),
        {"teacher": EMA(), "weighting": PassRate(), "importance": TokenImportance()},
    ),
    "grpo": lambda: (GroupRelative(baseline=GroupMean(), scale=Unscaled()), {}),
    "hybrid+anchor+entropy": lambda: (
        Blend(
            parts=(
                Weighted(advantage=GroupRelative(level=SequenceLevel()), weight=0.9),
                Weighted(
                    advantage=SelfDistillation(support=Full(), target=PriorAtForks(fork_share=0.3)),
                    weight=0.1,
                    weighting=PassRate(),
                ),
                Weighted(advantage=ReferenceAnchor(), weight=0.01),
            )
        ),
        {
            "teacher": EMA(),
            "reference": Frozen(context=PlainPrompt()),
            "token_weighting": TeacherEntropy(),
            "reduction": TokenMean(over="active"),
        },
    ),
}
