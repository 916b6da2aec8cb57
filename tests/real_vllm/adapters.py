"""LoRA policies whose adapters vLLM holds beside their base."""

from policies import gaps, move, short_and_long

from scsdpo.types import Sampling

SAMPLING = Sampling(n=4, max_new_tokens=24, seed=3)
PARITY = 2e-5
"""Nats; float32 on both sides."""


def largest_gap(rollout, policy):
    rollouts = rollout.sample(policy, short_and_long(policy), SAMPLING)
    assert int(rollouts.mask.sum()) > 100
    return max(gap.max() for gap in gaps(policy, rollouts))


def check_steps(rollout, policy, steps):
    """vLLM has the policy's weights at each of some steps; closes the rollout."""
    try:
        for step in range(steps):
            assert largest_gap(rollout, policy) < PARITY
            move(policy, step, 0.01)
    finally:
        rollout.close()
