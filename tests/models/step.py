"""One SC-SDPO step on a policy, and the same in plain autograd over plain transformers."""

import copy

import torch

from batches import gradient, parts
from oracle import divergence, supported
from scsdpo.advantage import Divergence, Full, SelfDistillation
from scsdpo.teacher import EMA
from scsdpo.weighting import PassRate

ALPHA = 0.5


def both_gradients(policy):
    """({name: gradient} of the step, {name: gradient} of autograd)."""
    policy.eval()  # no dropout
    plain = copy.deepcopy(policy.language_model)
    plain.set_attn_implementation(policy.known.implementation)
    advantage = SelfDistillation(divergence=Divergence(alpha=ALPHA), support=Full())
    batch, update = parts(policy, advantage, teacher=EMA(), weighting=PassRate())
    _, found, _ = gradient(policy, batch, update)

    scale = batch.weights.flatten() * update.reduction.coefficients(
        batch.sampled.sum(-1), batch.active
    )
    asked, teachers = batch.student_prompts(), batch.contexts["teacher"].ids
    told = [ids for group in teachers for ids in group]
    teacher = copy.deepcopy(plain)
    loss = torch.zeros(())
    for row in batch.active.nonzero()[:, 0].tolist():
        n = int(batch.sampled[row].sum())
        if not n:
            continue
        response = batch.ids[row, :n].tolist()

        def logits(model, prompt, response=response, n=n):
            ids = torch.tensor([[*prompt, *response[:-1]]])
            z = model(input_ids=ids, use_cache=False).logits[0, -n:]
            return z / batch.judged.responses.temperature

        with torch.no_grad():
            target = logits(teacher, told[row])
        pair = supported(logits(plain, asked[row]), target, k=None, tail=False)
        loss = loss + scale[row] * divergence(ALPHA, *pair).sum()
    plain.zero_grad()
    loss.backward()
    return found, {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
