"""Mixtures of experts: where tokens are sent, and a loss that spreads them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scsdpo.policy.decoder import decoder_of, logit_scale
from scsdpo.private.transformers import recorders


def routers(model: PreTrainedModel) -> list[nn.Module]:
    """What chooses the experts, a module a layer, in order; none: the model has no experts."""
    for part in model.modules():
        recorder = recorders(part)
        if isinstance(part, PreTrainedModel) and "router_logits" in recorder:
            kind = recorder["router_logits"].target_class
            return [module for module in part.modules() if isinstance(module, kind)]
    return []


@contextmanager
def recorded(chosen: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Logits [tokens, E] of each of the routers `chosen`, in the order in which they run."""
    seen: list[Tensor] = []

    def note(module: nn.Module, given: Any, made: Any) -> None:
        seen.append(made[0])

    hooks = [router.register_forward_hook(note) for router in chosen]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def final_states(model: PreTrainedModel, chosen: Sequence[nn.Module], **inputs: Any) -> Tensor:
    """Final hidden states of the decoder, of which the head alone makes logits; behind each, the
    logits of the routers `chosen`.

    Shapes:
        [B, s, D + layers E], so that whatever picks states picks their logits too.
    """
    with recorded(chosen) as seen:
        hidden: Tensor = decoder_of(model)(**inputs).last_hidden_state
    if (scale := logit_scale(model)) != 1:
        hidden = hidden * scale
    if not chosen:
        return hidden
    logits = [each.view(*hidden.shape[:2], -1).to(hidden.dtype) for each in seen]
    return torch.cat([hidden, *logits], dim=-1)


def split(states: Tensor, layers: int, hidden: int) -> tuple[Tensor, Tensor]:
    """[n, D + layers E] -> hidden states [n, D] and routers' logits [n, layers, E]."""
    if not layers:
        return states, states.new_zeros((len(states), 0, 0))
    logits = states[:, hidden:]
    return states[:, :hidden], logits.unflatten(-1, (layers, logits.shape[-1] // layers))


def per_token(model: PreTrainedModel) -> int:
    """k, the experts that a token is sent to in a layer."""
    return int(model.config.get_text_config().num_experts_per_tok)


def balance_loss(logits: Tensor, lengths: Sequence[int], k: int) -> Tensor:
    """Load balance of each response, summed: L_r = mean over layers of sum_e f_e P_e.

    f_e = E / (k T) sum_t 1[e is among the k of token t], without a gradient, and P_e = 1 / T sum_t
    softmax(logits_t)_e, over the T sampled tokens of one response, each at the place that predicts
    it. 1 if every expert gets as much as any other; E / k if all tokens go to the same k. It is a
    mean over a response's own tokens: neither micro-batches nor padding, packing or other rows
    enter it.

    Args:
        logits: of the routers, at the tokens of whole responses.
        lengths: T of each response, in order.
        k: experts a token.

    Shapes:
        logits [n, layers, E], lengths of sum n -> scalar.

    Source:
        DeepSeek-AI 2024, arXiv:2412.19437, eq. (17) to (20), the complementary sequence-wise loss.
        Differs: softmax for P, as in Fedus et al. 2021, arXiv:2101.03961, eq. (4) to (6), where f
        and P are means over a batch.
    """
    _, layers, experts = logits.shape
    counts = torch.tensor(list(lengths), dtype=torch.long, device=logits.device)
    rows = torch.repeat_interleave(torch.arange(len(counts), device=logits.device), counts)
    wide = torch.promote_types(logits.dtype, torch.float32)
    probs = torch.softmax(logits, -1, dtype=wide)
    sent = torch.zeros_like(probs).scatter_(-1, logits.topk(k).indices, 1.0)
    empty = probs.new_zeros((len(counts), layers, experts))
    per = counts.clamp(min=1)[:, None, None]
    share = empty.index_add(0, rows, sent) * experts / (k * per)
    mean = empty.index_add(0, rows, probs) / per
    return (share.detach() * mean).sum(-1).mean(-1).sum()


def differ(logits: Tensor, chosen: Tensor) -> Tensor:
    """[n]: whether a token was sent to other experts by the sampler, in any layer.

    Args:
        logits: [n, layers, E] of the trainer's routers.
        chosen: [n, layers, k] of the sampler; the order within k does not matter.
    """
    own = logits.topk(chosen.shape[-1]).indices.sort().values
    return (own != chosen.long().sort().values).flatten(1).any(-1)
