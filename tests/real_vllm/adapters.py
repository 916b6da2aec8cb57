"""LoRA policies whose adapters vLLM holds beside their base."""

from policies import check_parity, move, short_and_long

from scsdpo.types import Sampling

SAMPLING = Sampling(n=4, max_new_tokens=24, seed=3)


def check_sample(rollout, policy):
    rollouts = rollout.sample(policy, short_and_long(policy), SAMPLING)
    assert int(rollouts.sampled.sum()) > 100
    check_parity(policy, rollouts)


def check_steps(rollout, policy, steps):
    """vLLM has the policy's weights at each of some steps; closes the rollout."""
    try:
        for step in range(steps):
            check_sample(rollout, policy)
            move(policy, step, 0.01)
    finally:
        rollout.close()
