"""Policy: the language model that is trained, its tokenizer, and what of it is trained."""

from scsdpo.policy.adapter import Adapter, FullFineTune, Lora, Weights
from scsdpo.policy.causal_lm import CausalLM
from scsdpo.policy.chat import Chat
from scsdpo.policy.rows import Rows
from scsdpo.policy.trunk import Trunk

__all__ = [
    "Adapter",
    "CausalLM",
    "Chat",
    "FullFineTune",
    "Lora",
    "Rows",
    "Trunk",
    "Weights",
]
