"""Rollouts in process: the transformers model itself, on CPU or GPU."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from scsdpo.errors import ConfigurationError
from scsdpo.policy import CausalLM
from scsdpo.rollout._base import Rollout
from scsdpo.rollout.flight import Flight, Group
from scsdpo.rollout.shared_prefix import PrefixCache, shared_prefix_attention
from scsdpo.rollout.tape import Tape
from scsdpo.rollout.weights import digest
from scsdpo.types import Prompt, Rollouts, Sampling

_ATTENTION = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class HFRollout(Rollout):
    """Samples with the policy's own transformers model.

    Each distinct prompt runs once, and the responses to it attend to that one copy of its keys
    and values. Finished responses leave every few steps and waiting prompts take their place, so
    memory is bounded whatever the batch; logits exist at the last position only. Which token is
    drawn depends on (seed, prompt key, number in the group, position) and, to the rounding of
    batched matrix products, on nothing else.

    It needs whole weights on every device (one device or DDP, not FSDP), and layers of full or
    sliding-window softmax attention.

    Args:
        max_tokens: room for keys and values, in tokens, counted as if every response ran to
            `max_new_tokens`; at least one group is always in flight. Must be >= 1.
        max_rows: most responses in flight, for the logits are [max_rows, V] (a larger group runs
            alone). Must be >= 1.

    Raises:
        ValueError: if an argument is out of range; from `sample`, if a prompt was not rendered.
        ConfigurationError: from `sample`, if the weights are sharded or a layer is of a kind
            that it cannot sample from.
    """

    max_tokens: int = 131072
    max_rows: int = 512

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_rows"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"`HFRollout({name}=...)` must be >= 1, got {value}")

    def sample(self, policy: CausalLM, prompts: Sequence[Prompt], sampling: Sampling) -> Rollouts:
        groups = _groups(prompts, sampling.n)
        with policy.sampling_mode() as model, shared_prefix_attention(model):
            _refuse_model(model)
            tape = Tape(prompts, sampling, policy.chat, model.device)
            Flight(model, tape, self._cache(groups, sampling.max_new_tokens)).run(groups)
            return tape.rollouts(digest(policy))

    def rows(self, responses: int) -> int:
        return max(min(self.max_rows, responses), 1)

    def with_rows(self, rows: int) -> Rollout:
        return replace(self, max_rows=min(self.max_rows, rows))

    def _cache(self, groups: Sequence[Group], new_tokens: int) -> PrefixCache:
        """As many slots as the budget allows and the batch needs."""
        longest = max(len(group.ids) for group in groups)
        rows = max(len(group.rows) for group in groups)
        in_budget = min(self.max_tokens // (longest + rows * new_tokens), self.max_rows // rows)
        in_flight = max(min(in_budget, len(groups)), 1)
        return PrefixCache(
            prompts=in_flight,
            prompt_tokens=longest,
            rows=in_flight * rows,
            new_tokens=new_tokens,
        )


def _groups(prompts: Sequence[Prompt], n: int) -> list[Group]:
    """Long prompts first: neighbours are padded little, and what cannot fit fails at once."""
    groups: dict[tuple[int, ...], Group] = {}
    for q, prompt in enumerate(prompts):
        if not prompt.ids:
            raise ValueError(f"prompt {prompt.key!r} has no ids; render it with `Chat.render`")
        group = groups.setdefault(prompt.ids, Group(ids=prompt.ids, rows=[]))
        group.rows.extend(range(q * n, (q + 1) * n))
    return sorted(groups.values(), key=lambda group: -len(group.ids))


def _refuse_model(model: PreTrainedModel) -> None:
    if any(isinstance(p, DTensor) for p in model.parameters()):
        raise ConfigurationError(
            "model.rollout: HFRollout samples from whole weights, and these are sharded over "
            "devices: use VLLMRollout with the engine Servers, or one device or DDP"
        )
    kinds = set(model.config.get_text_config().to_dict().get("layer_types") or _ATTENTION)
    if others := sorted(kinds - _ATTENTION):
        raise ConfigurationError(
            f"model.rollout: HFRollout samples from full and sliding-window attention, and "
            f"{type(model).__name__} has layers of {', '.join(others)}: use VLLMRollout"
        )
