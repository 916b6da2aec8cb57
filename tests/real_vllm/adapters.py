"""LoRA policies whose adapters vLLM holds beside their base."""

import torch
from policies import gaps, short_and_long

from scsdpo.policy import CausalLM, Lora
from scsdpo.types import Sampling

SAMPLING = Sampling(n=4, max_new_tokens=24, seed=3)
PARITY = 2e-5
"""Nats; float32 on both sides."""


def make(folder, **settings):
    """With factors that change the model."""
    adapter = Lora(**{"r": 4, "lora_dropout": 0.5, "seed": 0} | settings)
    policy = CausalLM(str(folder), adapter=adapter)
    policy.configure_model()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.005, generator=generator)
    return policy


def largest_gap(rollout, policy):
    rollouts = rollout.sample(policy, short_and_long(policy), SAMPLING)
    assert int(rollouts.mask.sum()) > 100
    return max(gap.max() for gap in gaps(policy, rollouts))
