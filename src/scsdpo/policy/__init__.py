"""Policy: the language model that is trained, its tokenizer, and what of it is trained."""

from scsdpo.policy.adapter import Adapter, FullFineTune, Lora
from scsdpo.policy.causal_lm import CausalLM
from scsdpo.policy.chat import Chat
from scsdpo.policy.location import SHIPPED, TINY_FOLDER, TINY_TOOLS_FOLDER
from scsdpo.policy.other_model import OtherModel
from scsdpo.policy.quantization import NF4, Quantization, Unquantized
from scsdpo.policy.rows import Rows
from scsdpo.policy.runner import Runner
from scsdpo.policy.stored import Stored
from scsdpo.policy.weights import Weights

__all__ = [
    "NF4",
    "SHIPPED",
    "TINY_FOLDER",
    "TINY_TOOLS_FOLDER",
    "Adapter",
    "CausalLM",
    "Chat",
    "FullFineTune",
    "Lora",
    "OtherModel",
    "Quantization",
    "Rows",
    "Runner",
    "Stored",
    "Unquantized",
    "Weights",
]
