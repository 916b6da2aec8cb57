"""In which forwards the rows of a model may run: together with shared prompts, padded, or alone."""

import sys
from dataclasses import dataclass
from enum import Enum
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from scsdpo.policy.mixers import HYBRIDS
from scsdpo.private.transformers import has_attention_interface, has_sdpa, is_stateful


class RowPath(Enum):
    """How rows run. The first is the fastest, the last is right for every causal model."""

    SHARED = "packed, prompts shared"
    """Rows lie end to end in one forward, and every common start of prompts runs once."""
    PADDED = "rows apart, padded"
    """Each row is a line of its own in a batch, its prompt included, padded on the right."""
    ALONE = "rows apart, one at a time"
    """Each row is a forward of its own, as in plain transformers."""


SHARED_LAYERS = frozenset({"full_attention", "sliding_attention"})
"""Kinds of layers whose tokens meet in softmax attention only."""
SINKS = frozenset(
    {
        "GptOssForCausalLM",
        "GraniteMoeSWAForCausalLM",
        "GraniteSWAForCausalLM",
        "MiMoV2FlashForCausalLM",
    }
)
"""Models whose attention is softmax beside a sink, for which transformers has no sdpa and layouts
do."""
LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies depend on the longest row of a forward."""
_UNLIMITED = sys.maxsize


@dataclass(frozen=True, kw_only=True)
class KnownPath:
    """What is known of an architecture before its weights are loaded."""

    path: RowPath
    """For rows of up to `longest` tokens."""
    sampled: RowPath
    """How `HFRollout` draws: from shared prompts, with transformers' own cache, or without one."""
    reason: str
    """Why it is not `SHARED`; empty if it is."""
    implementation: str
    """Attention that transformers is to load."""
    longest: int
    """Tokens of a prompt and its response, but the last, up to which a row's frequencies do not
    depend on its length; longer rows run alone."""

    @property
    def is_length_dependent(self) -> bool:
        """Whether long rows run otherwise than short ones."""
        return self.longest < _UNLIMITED

    def of(self, tokens: int) -> RowPath:
        """How rows run of which the longest has so many tokens."""
        return RowPath.ALONE if tokens > self.longest else self.path

    def of_sampler(self, tokens: int) -> RowPath:
        """How responses are drawn of which the longest, with its prompt, has so many tokens."""
        return RowPath.ALONE if tokens > self.longest else self.sampled


def known_path(config: PreTrainedConfig, asked: str) -> KnownPath:
    """How rows of a model with this configuration run.

    Args:
        config: of the checkpoint.
        asked: `attn_implementation` of the configuration.

    Raises:
        ValueError: if the model is known not to be causal.
    """
    kind, text = causal_class(config), config.get_text_config()
    settings = text.to_dict()
    _refuse_bidirectional(kind, settings)
    implementation, reason = _implementation(kind, settings, asked)
    reason = reason or _reason(kind, settings)
    path = RowPath.PADDED if reason else RowPath.SHARED
    return KnownPath(
        path=path,
        sampled=path,
        reason=reason,
        implementation=implementation,
        longest=longest_independent(text),
    )


def causal_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that `AutoModelForCausalLM` loads.

    Raises:
        ValueError: if there is none.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{config.model_type} has no causal language model in "
            "transformers: choose one that has (docs/models.md)"
        )
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return found[0] if isinstance(found, tuple) else found


def longest_independent(config: PreTrainedConfig) -> int:
    """Most tokens of a row for which rotary frequencies are those of any shorter row."""
    rope = getattr(config, "rope_parameters", None) or {}
    longest = _UNLIMITED
    for each in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if str(each.get("rope_type", each.get("type"))) in LENGTH_DEPENDENT:
            original = each.get("original_max_position_embeddings")
            longest = min(longest, original or config.max_position_embeddings)
    return longest


def _refuse_bidirectional(kind: type[PreTrainedModel], settings: dict[str, Any]) -> None:
    for name, causal in (("is_causal", True), ("use_bidirectional_attention", False)):
        value = settings.get(name)
        # Gemma's "vision" is about pictures alone.
        if value is not None and value != "vision" and bool(value) != causal:
            raise ValueError(
                f"{kind.__name__} is not causal here ({name}={value}): "
                "a token sees those after it. Choose a decoder (docs/models.md)"
            )


def _implementation(
    kind: type[PreTrainedModel], settings: dict[str, Any], asked: str
) -> tuple[str, str]:
    """Attention to load, and why it is another than `asked`."""
    if asked != "sdpa":
        return asked, f"model.policy.attn_implementation is {asked}"
    if settings.get("attn_logit_softcapping"):
        return "eager", "attention scores are soft-capped"
    if kind.__name__ in SINKS:
        return "eager", ""
    if not has_sdpa(kind):
        return "eager", f"{kind.__name__} has no sdpa attention"
    return asked, ""


def _reason(kind: type[PreTrainedModel], settings: dict[str, Any]) -> str:
    """Why prompts cannot be shared; empty if nothing is known against it."""
    if kind.__name__ in HYBRIDS:
        return ""
    others = sorted(set(settings.get("layer_types") or ()) - SHARED_LAYERS)
    if others:
        return f"layers of {', '.join(map(str, others))} mix tokens by other means than attention"
    if settings.get("alibi"):
        return "attention scores have position biases (alibi)"
    if not has_attention_interface(kind):
        return f"{kind.__name__} does not attend through transformers' attention interface"
    if is_stateful(kind):
        return f"{kind.__name__} keeps a recurrent state"
    return ""
