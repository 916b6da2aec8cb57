"""Drawing tokens by inverse transform: one uniform number each, looked up in the cumulative sum."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scsdpo.seeds import resolved
from scsdpo.types import Prompt, Sampling, stable_hash

_CANDIDATES = 1024
"""Number of most likely tokens that are tried as a top-p set before the vocabulary is sorted."""

_BLOCK = 128
"""Vocabulary entries of a block; sums of blocks are searched first."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Draw:
    """One token for each of n positions."""

    ids: Tensor
    """[n] int64."""
    sampling_logprobs: Tensor
    """[n], nats: under the distribution drawn from, after min-p, top-k and top-p."""
    policy_logprobs: Tensor
    """[n], nats: under softmax(logits), without cuts."""


def uniforms(prompts: Sequence[Prompt], sampling: Sampling) -> Tensor:
    """[Q G, max_new_tokens] float64 in [0, 1): the random numbers of every token.

    A row depends only on the seed, the prompt's key and the response's number in its group. A
    larger `max_new_tokens` only appends to it. torch's global generator is not used.
    """
    generator = torch.Generator()
    rows = torch.empty(len(prompts) * sampling.n, sampling.max_new_tokens, dtype=torch.float64)
    for row, (prompt, i) in zip(
        rows, ((p, i) for p in prompts for i in range(sampling.n)), strict=True
    ):
        number = prompt.copy * sampling.n + i
        generator.manual_seed(stable_hash(resolved(sampling.seed), prompt.key, number))
        row.uniform_(generator=generator)
    return rows


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Draw:
    """Draw from softmax(logits) cut to `sampling.min_p`, then top-k, then top-p.

    Args:
        logits: [n, V] float32 or float64, already divided by the temperature.
        uniform: [n] float64 in [0, 1).
        sampling: gives min_p, top_k and top_p.
    """
    if not sampling.cuts:
        probs = logits.softmax(-1)
        ids = _search(probs, uniform)
        logprobs = probs.gather(-1, ids).log()[:, 0]
        return Draw(ids=ids[:, 0], sampling_logprobs=logprobs, policy_logprobs=logprobs)
    likely = logits
    if sampling.min_p:
        least = logits.amax(-1, keepdim=True) + math.log(sampling.min_p)
        likely = logits.masked_fill(logits < least, -torch.inf)
    kept, vocabulary = _cut(likely, sampling)
    probs = kept.softmax(-1)
    place = _search(probs, uniform)
    ids = place if vocabulary is None else vocabulary.gather(-1, place)
    return Draw(
        ids=ids[:, 0],
        sampling_logprobs=probs.gather(-1, place).log()[:, 0],
        policy_logprobs=logits.gather(-1, ids)[:, 0] - logits.logsumexp(-1),
    )


def _cut(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """(logits [n, k] of the top-k, most likely first, -inf beyond top-p; their ids [n, k]).

    If neither cuts, it is (`logits` [n, V], None).
    """
    if sampling.top_p == 1:
        if sampling.top_k == 0:
            return logits, None
        return logits.topk(min(sampling.top_k, logits.shape[-1]))
    if sampling.top_k == 0:
        kept, ids, share = _top_p_candidates(logits, sampling.top_p)
    else:
        kept, ids = logits.topk(min(sampling.top_k, logits.shape[-1]))
        share = kept.softmax(-1)
    mass_before = share.cumsum(-1) - share
    # The first token always stays: no mass comes before it.
    return kept.masked_fill(mass_before >= sampling.top_p, -torch.inf), ids


def _top_p_candidates(logits: Tensor, top_p: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, ids and probabilities [n, k] of the k most likely tokens, whose mass exceeds `top_p`.

    Distributions of a trained policy are peaked, so few candidates suffice. The whole vocabulary is
    sorted only if they do not.
    """
    total = logits.logsumexp(-1, keepdim=True)
    if logits.shape[-1] > _CANDIDATES:
        kept, ids = logits.topk(_CANDIDATES)
        share = (kept - total).exp()
        if bool((share.sum(-1) > top_p).all()):
            return kept, ids, share
    kept, ids = logits.sort(descending=True)
    return kept, ids, (kept - total).exp()


def _search(probs: Tensor, uniform: Tensor) -> Tensor:
    """[n, 1]: the first place where the cumulative sum exceeds `uniform` times the total.

    Sums of blocks are searched first, then one block, because a float64 sum over the vocabulary
    takes longer than the softmax. A place of probability 0 is never returned: the sum does not grow
    there, and each target stays below the total of the searched range.
    """
    n, vocabulary = probs.shape
    if vocabulary % _BLOCK:
        probs = nn.functional.pad(probs, (0, _BLOCK - vocabulary % _BLOCK))
    blocks = probs.view(n, -1, _BLOCK)
    sums = blocks.sum(-1).double()
    before = sums.cumsum(-1)
    total = before[:, -1:]
    target = torch.minimum(uniform[:, None] * total, _below(total))
    block = torch.searchsorted(before, target, right=True).clamp_(max=before.shape[-1] - 1)
    within = blocks.gather(1, block[..., None].expand(-1, -1, _BLOCK))[:, 0].cumsum(
        -1, dtype=torch.float64
    )
    target = target - (before - sums).gather(-1, block)
    # The block's float32 sum and the float64 sum of its places differ by rounding, so the target
    # is scaled to the same share of the block.
    target = target / sums.gather(-1, block) * within[:, -1:]
    target = torch.minimum(target, _below(within[:, -1:])).clamp(min=0)
    place = block * _BLOCK + torch.searchsorted(within, target, right=True)
    return place.clamp_(max=vocabulary - 1)


def _below(total: Tensor) -> Tensor:
    """The next smaller floating-point number."""
    return total.nextafter(torch.zeros_like(total))
