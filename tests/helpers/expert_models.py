"""Random small mixtures of experts on disk."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from models import TOKENS, tokenizer

_SIZES = {
    "vocab_size": TOKENS + 5,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "tie_word_embeddings": False,
}

CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen3_moe": Qwen3MoeConfig(
        **_SIZES, num_experts=6, moe_intermediate_size=32, intermediate_size=64, norm_topk_prob=True
    ),
    "olmoe": OlmoeConfig(
        **_SIZES | {"num_key_value_heads": 2}, num_experts=6, intermediate_size=32
    ),
    "mixtral": MixtralConfig(**_SIZES, num_local_experts=6, intermediate_size=32),
    "gpt_oss": GptOssConfig(
        **_SIZES,
        num_local_experts=6,
        intermediate_size=32,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
}


def expert_folder(path: Path, kind: str, *, seed: int = 0) -> Path:
    """A checkpoint as transformers writes it: each expert's matrices apart, where the hub's are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if (parameter.dim() == 1 and "norm" not in name) or "sinks" in name:
                torch.nn.init.normal_(parameter)  # biases and sinks that show
    model.generation_config.eos_token_id = [2, 0]
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path
