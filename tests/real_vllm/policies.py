"""Policies that vLLM can hold, prompts for them, and the trainer's view of what was sampled."""

import copy

import torch

from models import olmo3_folder, qwen3_folder
from scsdpo.policy import CausalLM, Lora
from scsdpo.types import Prompt

LONG = 300
"""Tokens of the long prompt: more than two blocks of the CPU build's prefix cache (128 each)."""


def lora_policy(folder, **settings):
    """LoRA with factors that change the model."""
    adapter = Lora(**{"r": 4, "lora_dropout": 0.5, "seed": 0} | settings)
    policy = CausalLM(str(folder), adapter=adapter)
    policy.configure_model()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.005, generator=generator)
    return policy


def load(folder):
    policy = CausalLM(str(folder))
    policy.configure_model()
    return policy


MAKERS = {
    "tied": lambda path: load(qwen3_folder(path)),
    "untied": lambda path: load(qwen3_folder(path, tie=False)),
    "sliding": lambda path: load(olmo3_folder(path)),
    "lora": lambda path: lora_policy(qwen3_folder(path)),
}


def prompt(policy, text, key=None):
    ids = policy.chat.render(({"role": "user", "content": text},))
    return Prompt(key=key or text, messages=(), verifier=None, answer="", ids=ids)


def short_and_long(policy):
    """Two short prompts, and one that fills whole blocks of the prefix cache."""
    long = prompt(policy, "A" * LONG)
    assert len(long.ids) > LONG
    return [prompt(policy, "Why?"), prompt(policy, "Is water wet?"), long]


def gaps(policy, rollouts):
    """|log S of a plain forward - the sampler's| at the sampled tokens, a tensor per prompt.

    The forward is in the policy's dtype and in float64, and the nearer of the two counts: two
    float32 forwards on one side of the exact value and on the other are 1.05e-5 nats apart on some
    processors, where on others no two are 1e-5.
    """
    found = []
    for q, start in enumerate(rollouts.prompts):
        rows = []
        for ids, mask, said in zip(
            rollouts.ids[q], rollouts.mask[q], rollouts.policy_logprobs[q], strict=True
        ):
            response = ids[mask]
            sequence = torch.tensor([[*start.ids, *response.tolist()]])
            with policy.sampling_mode() as model:
                both = [
                    each(sequence, use_cache=False).logits[0, len(start.ids) - 1 : -1].double()
                    for each in (model, copy.deepcopy(model).double())
                ]
            distances = [
                (z / rollouts.temperature).log_softmax(-1).gather(-1, response[:, None])[:, 0]
                - said[mask]
                for z in both
            ]
            rows.append(torch.stack(distances).abs().amin(0))
        found.append(torch.cat(rows))
    return found


def move(policy, seed, size=0.02):
    """As an optimizer step does, to what is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(size * noise)
