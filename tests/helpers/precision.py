"""Numbers that depend on the machine: rounding errors and times.

Float32 kernels differ by processor and by the shape of a batch: a gap of 1e-5 nats between two
engines is kept on some processors and missed by half on others. Tests therefore measure the
policy's own rounding error where they run, and allow a stated multiple of it.
"""

import copy
import time

import torch

from scsdpo.lab import LabTasks
from scsdpo.rollout import HFRollout
from scsdpo.types import Prompt, Sampling

FACTOR = 8.0
"""Allowed gap over the policy's own rounding error. Another engine has an error of its own, whose
largest value over hundreds of tokens can be several times ours."""
FLOOR = 2.0**-20
"""Nats; two units in the last place of a float32 log-probability between 4 and 8 nats. A policy
whose own error is smaller by chance does not bind another engine to it."""
CEILING = 5e-4
"""Nats; a larger tolerance could hide old weights, which are 1e-3 nats off and more in tests."""


def log_probs(policy, rollouts, dtype=torch.float64):
    """log S of the sampled tokens, one unpadded sequence after the other; a tensor per prompt."""
    with policy.sampling_mode() as model:
        model = copy.deepcopy(model).to(dtype)
        found = []
        for q, prompt in enumerate(rollouts.prompts):
            rows = []
            for ids, mask in zip(rollouts.ids[q], rollouts.sampled[q], strict=True):
                response = ids[mask]
                sequence = torch.tensor([[*prompt.ids, *response.tolist()]])
                z = model(sequence, use_cache=False).logits[0, len(prompt.ids) - 1 : -1].double()
                log_s = (z / rollouts.temperature).log_softmax(-1)
                rows.append(log_s.gather(-1, response[:, None])[:, 0])
            found.append(torch.cat(rows))
    return found


def rounding(policy, rollouts):
    """[N] errors in nats of the policy's own float32 log-probs at the sampled tokens."""
    exact, own = (log_probs(policy, rollouts, dtype) for dtype in (torch.float64, torch.float32))
    return (torch.cat(exact) - torch.cat(own)).abs()


def allowed(policy, rollouts) -> float:
    """Largest allowed gap in nats: FACTOR times the policy's largest own error."""
    limit = FACTOR * float(rounding(policy, rollouts).max().clamp(min=FLOOR))
    assert limit < CEILING, limit
    return limit


def allowed_in_a_run(policy) -> tuple[float, float]:
    """Mean and largest allowed gap in a short run; twice as large, since training moves weights."""
    asked = [LabTasks("val", size=8)[i] for i in range(8)]
    prompts = [
        Prompt(key=p.key, messages=(), verifier=None, answer="", ids=policy.chat.render(p.messages))
        for p in asked
    ]
    rollouts = HFRollout().sample(policy, prompts, Sampling(n=4, max_new_tokens=48, seed=3))
    mean = FACTOR * float(rounding(policy, rollouts).mean().clamp(min=FLOOR))
    return 2 * mean, 2 * allowed(policy, rollouts)


def within(seconds, work, tries=5):
    """The result of `work`, which takes less than `seconds` in one of some tries.

    The machine may be busy with something else in the others.
    """
    for _ in range(tries):
        begin = time.perf_counter()
        result = work()
        took = time.perf_counter() - begin
        if took < seconds:
            return result
    raise AssertionError(f"{took:.3f} s at the last of {tries} tries; {seconds} are allowed")
