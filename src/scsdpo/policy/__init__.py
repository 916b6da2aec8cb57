"""Policy: the language model that is trained, its tokenizer, and what of it is trained."""

from scsdpo.policy.adapter import Adapter, FullFineTune, Lora, Weights
from scsdpo.policy.causal_lm import TINY_FOLDER, CausalLM
from scsdpo.policy.chat import Chat
from scsdpo.policy.rows import Rows
from scsdpo.policy.runner import Runner
from scsdpo.policy.stored import Stored

__all__ = [
    "TINY_FOLDER",
    "Adapter",
    "CausalLM",
    "Chat",
    "FullFineTune",
    "Lora",
    "Rows",
    "Runner",
    "Stored",
    "Weights",
]
