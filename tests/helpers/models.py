"""Random small checkpoints on the spot: a model, a byte-level tokenizer, a ChatML template."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Lfm2Config,
    Lfm2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Padding (and a second end of sequence), start of a turn, end of a turn: ids 0, 1, 2."""
TOKENS = 256 + len(SPECIALS)
"""Size of the tokenizer: the specials, then one token a byte."""


def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIALS))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
        # BOS-free like Qwen3; a long enough limit that nothing warns.
        model_max_length=4096,
    )


def qwen3_folder(
    path: Path,
    *,
    tie: bool = True,
    vocab: int = TOKENS + 5,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Qwen3, 2 layers of full attention; `vocab` may exceed the tokenizer, as in real ones."""
    config = Qwen3Config(
        hidden_size=64, intermediate_size=128, head_dim=64, **_common(tie=tie, vocab=vocab)
    )
    return _save(path, Qwen3ForCausalLM, config, dtype=dtype, seed=seed)


def qwen3_8b_folder(path: Path) -> Path:
    """Qwen3-8B's layout, its width scaled down: 36 layers, 4 heads to a key, 128 each, untied."""
    config = Qwen3Config(
        **_common(tie=False, vocab=TOKENS + 5)
        | {"num_hidden_layers": 36, "num_attention_heads": 4, "initializer_range": 0.02},
        hidden_size=256,
        intermediate_size=768,
        head_dim=128,
    )
    return _save(path, Qwen3ForCausalLM, config, dtype=torch.float32, seed=0)


def larger_folder(path: Path, *, tie: bool = False, vocab: int = TOKENS + 5) -> Path:
    """Qwen3 of another size than `qwen3_folder`'s in every way: a teacher for it."""
    config = Qwen3Config(
        **_common(tie=tie, vocab=vocab)
        | {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
        hidden_size=96,
        intermediate_size=80,
        head_dim=32,
    )
    return _save(path, Qwen3ForCausalLM, config, dtype=torch.float32, seed=5)


def olmo3_folder(
    path: Path,
    *,
    window: int = 8,
    tie: bool = False,
    vocab: int = TOKENS + 5,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """OLMo-3, a sliding layer of `window` tokens and a full one."""
    config = Olmo3Config(
        hidden_size=128,
        intermediate_size=128,
        sliding_window=window,
        layer_types=["sliding_attention", "full_attention"],
        **_common(tie=tie, vocab=vocab),
    )
    return _save(path, Olmo3ForCausalLM, config, dtype=dtype, seed=seed)


_DELTA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "head_dim": 16,
    "partial_rotary_factor": 0.5,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    # The norm of a few values makes rounding errors large where weights are.
    "initializer_range": 0.06,
}
"""Gated delta net: two value heads to each key head, keys and values of different sizes."""


def qwen3_5_folder(path: Path, *, seed: int = 0) -> Path:
    """Qwen3.5, text only: linear attention around a layer of full attention."""
    config = Qwen3_5TextConfig(
        **_common(tie=True, vocab=TOKENS + 5) | _DELTA | {"num_hidden_layers": 4}
    )
    return _save(path, Qwen3_5ForCausalLM, config, dtype=torch.float32, seed=seed)


def qwen3_next_folder(path: Path, *, seed: int = 0) -> Path:
    """Qwen3-Next: as Qwen3.5, projections by key head, experts in every other layer."""
    config = Qwen3NextConfig(
        **_common(tie=False, vocab=TOKENS + 5) | _DELTA | {"num_hidden_layers": 4},
        decoder_sparse_step=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return _save(path, Qwen3NextForCausalLM, config, dtype=torch.float32, seed=seed)


def lfm2_folder(path: Path, *, seed: int = 0) -> Path:
    """LFM2: short convolutions around a layer of full attention."""
    config = Lfm2Config(
        hidden_size=32,
        intermediate_size=48,
        conv_L_cache=3,
        conv_bias=True,
        layer_types=["conv", "conv", "full_attention", "conv"],
        **_common(tie=True, vocab=TOKENS + 5) | {"num_hidden_layers": 4},
    )
    return _save(path, Lfm2ForCausalLM, config, dtype=torch.float32, seed=seed)


def _common(*, tie: bool, vocab: int) -> dict:
    return {
        "vocab_size": vocab,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": tie,
        # Far from uniform, so that wrong logits show.
        "initializer_range": 0.2,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "bos_token_id": None,
    }


def _save(
    path: Path,
    kind: type[PreTrainedModel],
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    seed: int,
) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config).to(dtype)
    model.generation_config.eos_token_id = [2, 0]  # as Qwen3: end of turn, end of text
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path
