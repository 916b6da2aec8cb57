"""Rollouts in this process, by the transformers model itself, on CPU or GPU."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from scsdpo.policy import CausalLM
from scsdpo.policy.adapter import STUDENT, merged_layer
from scsdpo.policy.budget import free_bytes
from scsdpo.policy.quantization import is_quantized, plain_dtype, plain_elements
from scsdpo.policy.row_path import RowPath
from scsdpo.rollout._base import Rollout
from scsdpo.rollout.dialogue import Dialogue, DialogueRollout
from scsdpo.rollout.hf.continuous_batching import ContinuousBatcher
from scsdpo.rollout.hf.kv_cache import KVCache
from scsdpo.rollout.hf.own_cache import OwnCache
from scsdpo.rollout.hf.response_buffer import ResponseBuffer
from scsdpo.rollout.hf.scheduler import Group, Scheduler
from scsdpo.rollout.hf.shared_prefix import shared_prefix_attention
from scsdpo.rollout.weights.hashing import weights_digest
from scsdpo.types import Prompt, Responses, Sampling


@dataclass(frozen=True)
class HFRollout(DialogueRollout):
    """Samples with the policy's own transformers model, by continuous batching.

    Each distinct prompt runs once, and all responses to it attend to one copy of its keys and
    values. Memory follows the tokens that are held, not `max_new_tokens`. Finished responses leave
    every few steps, and as many waiting ones start as are expected to fit. If they do not fit after
    all, the youngest are preempted and drawn again later. Logits are computed at the last position
    only. The choice of a token depends on (seed, prompt key, number in the group, position) and, up
    to rounding of batched matrix products, on nothing else.

    In an episode of several turns a response keeps its keys and values while its environment
    answers. The tokens of the answer then run in one forward (one by one if the model has layers of
    linear attention or convolution).

    The model's layers must be full or sliding-window softmax attention, or the linear attention and
    short convolutions of Qwen3.5, Qwen3-Next and LFM2. Sliding layers keep their window only.
    Linear attention and convolutions keep one state for each prompt and each response in flight,
    whatever its length, in addition to `max_tokens`: in each layer (k - 1) C elements for a
    convolution of width k with C channels, and H d e elements in float32 for H heads with keys of
    size d and values of size e. Other architectures (docs/models.md) draw with transformers' own
    cache: prompts of equal length run together, each once for every response.

    Sharded weights are gathered into a copy on every rank while it samples. LoRA factors are merged
    into a copy of the weights that they adapt (`merged`); for a base in 4 bits this copy is
    dequantised.

    Args:
        max_tokens: room for keys and values in tokens, with padding and spare room; a single
            response with its prompt may exceed it. Must be >= 1.
        max_rows: most responses in flight, because the logits are [max_rows, V]. Must be >= 1.
        merged: sample from a copy of the weights that LoRA adapts, with the factors merged into it,
            if it fits in half of the free memory. `false`: no copy; factors run beside their
            layers, which is slower.
        note_experts: record the experts that each token was sent to, 2 * layers * k bytes for each
            token. `train/experts_differ` then shows the share of tokens that the trainer sends to
            others. It has no effect on models without experts or with transformers' own cache.

    Raises:
        ValueError: if an argument is out of range; from `sample`, if a prompt was not rendered.
        ConfigurationError: from `sample`, if a layer supports no layout; the self-check finds it
            earlier.
    """

    max_tokens: int = 131072
    max_rows: int = 512
    merged: bool = True
    note_experts: bool = False

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_rows"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"`HFRollout({name}=...)` must be >= 1, got {value}")

    def draw(self, policy: CausalLM, dialogue: Dialogue, sampling: Sampling) -> Responses:
        groups = _groups(dialogue.prompts, sampling.n)
        longest = max(len(group.ids) for group in groups) + sampling.max_new_tokens - 1
        path = policy.known.of_sampler(longest)
        with policy.sampling_mode() as model:
            buffer = ResponseBuffer(dialogue, sampling, policy.chat, model.device)
            with merged_adapters(model) if self.merged else nullcontext():
                if path is RowPath.SHARED:
                    self._share(model, groups, buffer)
                else:
                    OwnCache(
                        model,
                        buffer,
                        max_tokens=self.max_tokens,
                        max_rows=self.max_rows,
                        reads_back=path is not RowPath.ALONE,
                    ).run(groups)
            return buffer.responses(weights_digest(model))

    def _share(self, model: PreTrainedModel, groups: list[Group], buffer: ResponseBuffer) -> None:
        most = buffer.sampling.max_new_tokens
        scheduler = Scheduler(
            groups, max_tokens=self.max_tokens, max_rows=self.max_rows, max_new_tokens=most
        )
        # The last token of a response never runs, so its keys and values are never held.
        cache = KVCache(max_tokens=self.max_tokens, longest=most - 1)
        with shared_prefix_attention(model):
            ContinuousBatcher(
                model, buffer, scheduler, cache, notes_experts=self.note_experts
            ).run()

    def hold_weights(
        self, policy: CausalLM, *, barrier: bool = True
    ) -> AbstractContextManager[object]:
        return policy.held_whole()

    def rows_in_flight(self, responses: int) -> int:
        return max(min(self.max_rows, responses), 1)

    def with_max_rows(self, rows: int) -> Rollout:
        return replace(self, max_rows=min(self.max_rows, rows))


def _groups(prompts: Sequence[Prompt], n: int) -> list[Group]:
    """The distinct prompts, longest first, so that neighbours need little padding.

    A prompt that does not fit in memory then also fails at once.
    """
    groups: dict[tuple[int, ...], Group] = {}
    for q, prompt in enumerate(prompts):
        if not prompt.ids:
            raise ValueError(f"prompt {prompt.key!r} has no ids: render it with `Chat.render`")
        group = groups.setdefault(prompt.ids, Group(ids=prompt.ids, rows=[]))
        group.rows.extend(range(q * n, (q + 1) * n))
    return sorted(groups.values(), key=lambda group: -len(group.ids))


@contextmanager
def merged_adapters(model: PreTrainedModel) -> Iterator[None]:
    """Replace the LoRA layers of `model` by linear layers with W + scale B A.

    One matrix product then takes the place of three. W + scale B A is summed in float32 and rounded
    to W's dtype (for W in 4 bits: the dtype of its products). The policy's own weights do not
    change. The copy takes the memory of the adapted weights, dequantised. Adapted layers stay, with
    equal numbers but slower, if the copy needs more than half of the free memory, and if a layer is
    not a linear layer with plain LoRA factors (DoRA).
    """
    adapted = []
    for parent in model.modules():
        for name, layer in parent.named_children():
            if not isinstance(layer, LoraLayer):
                continue
            base = layer.get_base_layer()
            linear = type(base) is nn.Linear or is_quantized(base)
            if linear and STUDENT in layer.lora_A and STUDENT not in layer.lora_variant:
                adapted.append((parent, name, layer, base.weight))
    size = sum(plain_elements(w) * plain_dtype(w).itemsize for _, _, _, w in adapted)
    if 2 * size > free_bytes(model.device):
        adapted = []
    for parent, name, layer, weight in adapted:
        setattr(parent, name, merged_layer(layer).to(plain_dtype(weight)))
    try:
        yield
    finally:
        for parent, name, layer, _ in adapted:
            setattr(parent, name, layer)
