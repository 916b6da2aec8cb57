"""Mixtures of experts: the routers' logits, and the load-balancing loss."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scsdpo.policy.decoder import decoder_of, logit_scale
from scsdpo.private.transformers import recorders


def routers(model: PreTrainedModel) -> list[nn.Module]:
    """The routers, one module for each layer with experts, in order; [] without experts."""
    for part in model.modules():
        recorder = recorders(part)
        if isinstance(part, PreTrainedModel) and "router_logits" in recorder:
            kind = recorder["router_logits"].target_class
            return [module for module in part.modules() if isinstance(module, kind)]
    return []


@contextmanager
def recorded_logits(chosen: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Record the logits [tokens, E] of the routers `chosen`, in the order in which they run."""
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
    """Final hidden states of the decoder, ready for the head, each with its routers' logits.

    Shapes:
        [B, s, D + layers E]. The logits of the routers `chosen` stand behind the hidden state of
        their token, so that an index of states selects both.
    """
    with recorded_logits(chosen) as seen:
        hidden: Tensor = decoder_of(model)(**inputs).last_hidden_state
    if (scale := logit_scale(model)) != 1:
        hidden = hidden * scale
    if not chosen:
        return hidden
    logits = [each.view(*hidden.shape[:2], -1).to(hidden.dtype) for each in seen]
    return torch.cat([hidden, *logits], dim=-1)


def split_states(states: Tensor, layers: int, hidden: int) -> tuple[Tensor, Tensor]:
    """[n, D + layers E] -> hidden states [n, D] and routers' logits [n, layers, E]."""
    if not layers:
        return states, states.new_zeros((len(states), 0, 0))
    logits = states[:, hidden:]
    return states[:, :hidden], logits.unflatten(-1, (layers, logits.shape[-1] // layers))


def per_token(model: PreTrainedModel) -> int:
    """k, the number of experts that a token is sent to in a layer."""
    return int(model.config.get_text_config().num_experts_per_tok)


def balance_loss(logits: Tensor, lengths: Sequence[int], k: int) -> Tensor:
    """Load-balancing loss of each response, summed: L_r = mean over layers of sum_e f_e P_e.

    f_e = E / (k T) sum_t 1[e is among the k of token t], without a gradient, and P_e = 1 / T sum_t
    softmax(logits_t)_e. Sums run over the T sampled tokens of one response, each at the place that
    predicts it. L_r is 1 if all experts get equally many tokens, and E / k if all tokens go to the
    same k. It is a mean over the tokens of one response, so it depends neither on micro-batches,
    padding and packing nor on other rows.

    Args:
        logits: the routers' logits at the tokens of whole responses.
        lengths: T of each response, in order.
        k: experts for each token.

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
    """[n] bool: the sampler sent the token to other experts than the trainer, in some layer.

    Args:
        logits: [n, layers, E] of the trainer's routers.
        chosen: [n, layers, k] experts that the sampler chose; the order within k does not matter.
    """
    own = logits.topk(chosen.shape[-1]).indices.sort().values
    return (own != chosen.long().sort().values).flatten(1).any(-1)
