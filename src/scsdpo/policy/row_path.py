"""How the rows of a model may run: packed with shared prompts, padded, or one at a time."""

import sys
from dataclasses import dataclass
from enum import Enum
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from scsdpo.policy.mixers import HYBRIDS
from scsdpo.private.transformers import has_attention_interface, has_sdpa, is_stateful


class RowPath(Enum):
    """How rows run. The first way is the fastest; the last is right for every causal model."""

    SHARED = "packed, prompts shared"
    """Rows lie end to end in one forward, and every common start of prompts runs once."""
    PADDED = "rows apart, padded"
    """Each row of a batch holds a prompt and its response, padded on the right."""
    ALONE = "rows apart, one at a time"
    """Each row runs in a forward of its own, as in plain transformers."""


SHARED_LAYERS = frozenset({"full_attention", "sliding_attention"})
"""Layer types (`config.layer_types`) that mix tokens by softmax attention only."""
SINKS = frozenset(
    {
        "GptOssForCausalLM",
        "GraniteMoeSWAForCausalLM",
        "GraniteSWAForCausalLM",
        "MiMoV2FlashForCausalLM",
    }
)
"""Models with attention sinks. transformers has no sdpa for them; our layouts handle sinks."""
LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Types of rotary embeddings whose frequencies depend on the longest row of a forward."""
_UNLIMITED = sys.maxsize


@dataclass(frozen=True, kw_only=True)
class KnownPath:
    """How rows of an architecture run, as far as it is known before the weights are loaded."""

    path: RowPath
    """How rows of up to `longest` tokens run."""
    sampled: RowPath
    """How `HFRollout` draws: from shared prompts, with transformers' own cache, or without one."""
    reason: str
    """Why `path` is not `SHARED`; empty if it is."""
    implementation: str
    """`attn_implementation` with which transformers must load the model."""
    longest: int
    """Longest row, in tokens, whose rotary frequencies do not depend on its length. The last token
    of a response does not count, because it does not run. Longer rows run alone."""

    @property
    def is_length_dependent(self) -> bool:
        """True if long rows run in another way than short ones."""
        return self.longest < _UNLIMITED

    def of(self, tokens: int) -> RowPath:
        """How rows run if the longest of them has this many tokens."""
        return RowPath.ALONE if tokens > self.longest else self.path

    def of_sampler(self, tokens: int) -> RowPath:
        """How `HFRollout` draws if the longest prompt with its response has this many tokens."""
        return RowPath.ALONE if tokens > self.longest else self.sampled


def known_path(config: PreTrainedConfig, asked: str) -> KnownPath:
    """Find out how rows of a model run, from its configuration.

    Args:
        config: the checkpoint's.
        asked: `model.policy.attn_implementation`.

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
    """The class that `AutoModelForCausalLM` loads for `config`.

    Raises:
        ValueError: if transformers has no such class.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"transformers has no causal language model for model_type {config.model_type}: "
            "choose an architecture that has one (docs/models.md)"
        )
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return found[0] if isinstance(found, tuple) else found


def longest_independent(config: PreTrainedConfig) -> int:
    """Most tokens that a row may have without a change of its rotary frequencies."""
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
        # Gemma's value "vision" concerns images only.
        if value is not None and value != "vision" and bool(value) != causal:
            raise ValueError(
                f"{kind.__name__} is not causal with this configuration ({name}={value}): a token "
                "attends to later tokens. Choose a causal decoder (docs/models.md)"
            )


def _implementation(
    kind: type[PreTrainedModel], settings: dict[str, Any], asked: str
) -> tuple[str, str]:
    """(`attn_implementation` to load, why prompts cannot be shared with it or '')."""
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
    """Why prompts cannot be shared; '' if no reason is known."""
    if kind.__name__ in HYBRIDS:
        return ""
    others = sorted(set(settings.get("layer_types") or ()) - SHARED_LAYERS)
    if others:
        return f"layers of type {', '.join(map(str, others))} mix tokens without softmax attention"
    if settings.get("alibi"):
        return "attention scores have position biases (alibi)"
    if not has_attention_interface(kind):
        return f"{kind.__name__} does not attend through transformers' attention interface"
    if is_stateful(kind):
        return f"{kind.__name__} keeps a recurrent state"
    return ""
