"""Policies that vLLM can hold, prompts for them, and the trainer's view of what was sampled."""

import torch

from models import olmo3_folder, qwen3_folder
from precision import allowed, log_probs
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
    """|log S in float64 - the sampler's| at the sampled tokens, in nats, a tensor per prompt."""
    return [
        (exact - said[mask].double()).abs()
        for exact, said, mask in zip(
            log_probs(policy, rollouts), rollouts.policy_logprobs, rollouts.sampled, strict=True
        )
    ]


def excess(policy, rollouts) -> float:
    """Largest gap over what this machine's rounding allows; below 1 for equal weights."""
    if not rollouts.prompts:  # this rank was asked nothing
        return 0.0
    return max(float(gap.max()) for gap in gaps(policy, rollouts)) / allowed(policy, rollouts)


def check_parity(policy, rollouts):
    assert excess(policy, rollouts) < 1


def move(policy, seed, size=0.02):
    """As an optimizer step does, to what is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(size * noise)
