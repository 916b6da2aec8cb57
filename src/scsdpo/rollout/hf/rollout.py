"""Rollouts in process: the transformers model itself, on CPU or GPU."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from scsdpo.policy import CausalLM
from scsdpo.policy.row_path import RowPath
from scsdpo.rollout._base import Rollout
from scsdpo.rollout.dialogue import Dialogue, DialogueRollout
from scsdpo.rollout.hf.continuous_batching import ContinuousBatcher
from scsdpo.rollout.hf.kv_cache import KVCache
from scsdpo.rollout.hf.merged import merged_adapters
from scsdpo.rollout.hf.own_cache import OwnCache
from scsdpo.rollout.hf.response_buffer import ResponseBuffer
from scsdpo.rollout.hf.scheduler import Group, Scheduler
from scsdpo.rollout.hf.shared_prefix import shared_prefix_attention
from scsdpo.rollout.weights.hashing import digest
from scsdpo.types import Prompt, Responses, Sampling


@dataclass(frozen=True)
class HFRollout(DialogueRollout):
    """Samples with the policy's own transformers model.

    Each distinct prompt runs once, and the responses to it attend to that one copy of its keys
    and values. Memory follows the tokens that are held, not `max_new_tokens`: finished responses
    leave every few steps and waiting ones take their place, as many as are expected to fit; where
    they do not after all, the youngest give way and are drawn again later. Logits exist at the
    last position only. Which token is drawn depends on (seed, prompt key, number in the group,
    position) and, to the rounding of batched matrix products, on nothing else.

    In an episode of several turns a response keeps its keys and values while its environment
    answers and others are drawn; then the answer runs behind them, at once (token by token
    where layers keep states of another kind).

    That needs layers of full or sliding-window softmax attention, or the linear attention and short
    convolutions of Qwen3.5, Qwen3-Next and LFM2. Sliding layers keep their window only; linear
    attention and convolutions keep, beside `max_tokens`, a state for each prompt and each response
    in flight, whatever its length: (k - 1) C elements, and H d e in float32, a layer, where k is
    the width of the convolution and C its channels, and H the heads of d keys and e values. Other
    architectures (docs/models.md) draw with transformers' own cache, rows with prompts
    of one length together, each prompt run once a response. Sharded weights are gathered once, to a
    copy that every rank has while it samples. LoRA
    factors are merged into a copy of the weights that they adapt (`merged`), while sampling; of a
    base in 4 bits the copy is plain.

    Args:
        max_tokens: room for keys and values, in tokens, padding and room to grow included; a
            single response and its prompt may exceed it. Must be >= 1.
        max_rows: most responses in flight, for the logits are [max_rows, V]. Must be >= 1.
        merged: sample from a copy of the weights that LoRA adapts, its factors merged into them,
            where half of the free memory holds it. `false`: nothing is copied, and factors run
            beside their layers, slower.
        note_experts: keep to which experts each token was sent, 2 layers k bytes a token, so that
            `train/experts_differ` shows the share that the trainer sends to others. A model
            without experts, and one that draws with transformers' own cache, has none to note.

    Raises:
        ValueError: if an argument is out of range; from `sample`, if a prompt was not rendered.
        ConfigurationError: from `sample`, if a layer attends by itself, which the self-check finds
            before.
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
            return buffer.responses(digest(model))

    def _share(self, model: PreTrainedModel, groups: list[Group], buffer: ResponseBuffer) -> None:
        most = buffer.sampling.max_new_tokens
        scheduler = Scheduler(
            groups, max_tokens=self.max_tokens, max_rows=self.max_rows, max_new_tokens=most
        )
        # The last token of a response is never read back.
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
    """Long prompts first: neighbours are padded little, and what cannot fit fails at once."""
    groups: dict[tuple[int, ...], Group] = {}
    for q, prompt in enumerate(prompts):
        if not prompt.ids:
            raise ValueError(f"prompt {prompt.key!r} has no ids; render it with `Chat.render`")
        group = groups.setdefault(prompt.ids, Group(ids=prompt.ids, rows=[]))
        group.rows.extend(range(q * n, (q + 1) * n))
    return sorted(groups.values(), key=lambda group: -len(group.ids))
