"""A small configuration of every causal language model of transformers, with every layer kind."""

from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from models import TOKENS, tokenizer

NAMES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

_SIZES = {
    **{"vocab_size": TOKENS + 5, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1},
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 2),
    **{"num_key_value_heads": 1, "head_dim": 16, "encoder_layers": 1, "encoder_attention_heads": 2},
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 256),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **{"num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 8},
    **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "n_group": 1, "topk_group": 1},
    **{"index_topk": 4, "index_n_heads": 2, "index_head_dim": 16},
    **{"mamba_d_state": 8, "mamba_expand": 2, "mamba_n_heads": 4, "mamba_d_head": 16},
    **{"mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_chunk_size": 8, "state_size": 8},
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8},
    **{"linear_value_head_dim": 8, "linear_conv_kernel_dim": 4, "conv_kernel": 4},
    **{"initializer_range": 0.2, "init_std": 0.2, "layerdrop": 0.0, "decoder_layerdrop": 0.0},
    **dict.fromkeys(
        ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "attention_dropout"), 0.0
    ),
    **dict.fromkeys(("activation_dropout", "hidden_dropout", "classifier_dropout"), 0.0),
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
    **{"sliding_window": 8, "is_decoder": True, "tie_word_embeddings": False},
    **{"vocab_size_per_layer_input": TOKENS + 5, "hidden_size_per_layer_input": 16},
}
"""What a configuration takes of it, by the names that it knows."""

_TWO_HEADS = {"num_key_value_heads": 2}
_LATENT = {**_TWO_HEADS, "head_dim": 8}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
OVERRIDES: dict[str, dict] = {
    **{key: {"v_head_dim": 16} for key in ("deepseek_v2", "minicpm3", "kimi_linear")},
    **dict.fromkeys(("axk1", "deepseek_v3", "youtu"), _LATENT),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa", "glm4_moe_lite", "axk2"), _TWO_HEADS),
    **dict.fromkeys(("diffllama", "hy_v4"), _TWO_HEADS),
    "longcat_flash": {
        **_LATENT,
        "num_layers": 2,
        "ffn_hidden_size": 32,
        "expert_ffn_hidden_size": 16,
        "zero_expert_num": 2,
        "moe_topk": 2,
    },
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {**_LINEAR, "logits_scaling": 2.0},
    **{key: {"logits_scaling": 2.0} for key in ("granite", "granitemoe", "granite_swa")},
    **{key: {"logits_scaling": 2.0} for key in ("granitemoe_swa", "granitemoeshared")},
    "hyperclovax": {"logits_scaling": 2.0},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_dt_rank": 4,
    },
    "codegen": {
        "n_embd": 64,
        "hidden_size": 64,
        "n_head": 4,
        "num_attention_heads": 4,
        "rotary_dim": 8,
    },
    "gptj": {"rotary_dim": 8},
    "dbrx": {
        "attn_config": {"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "falcon_h1": {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 2,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    **{key: {"layer_types": ["conv", "full_attention"]} for key in ("lfm2", "lfm2_moe")},
    "mamba2": {"num_heads": 4, "n_groups": 1, "chunk_size": 8, "expand": 2},
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 4},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "use_mamba_kernels": False,
        "num_key_value_heads": 2,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "zaya": {"num_experts_per_tok": 1},
    "xlstm": {"num_heads": 2, "qk_dim_factor": 0.5, "chunk_size": 8},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8},
    "roc_bert": {"enable_pronunciation": False, "enable_shape": False},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "num_hidden_layers": 4,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
        "laurel_rank": 8,
    },
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 28,
    "patch_size": 14,
}
TEXT_OF = {
    "gemma3": "gemma3_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "llama4": "llama4_text",
    "qwen4_exp": "qwen4_exp_text",
}
"""Models of text and pictures, and their text part."""


SKIPPED = {
    "blt": "bytes in patches of an entropy model; its defaults do not fit a test",
    "cohere_compass_text": "an embedding model",
    "emu3": "tokens of pictures; no text-only configuration",
    "gemma3n": "its picture tower needs the package timm; its text model is gemma3n_text",
    "gemma4": "pictures and sound; its text model is gemma4_text",
    "gemma4_assistant": "drafts for another model",
    "gemma4_unified": "pictures and sound; its text model is gemma4_unified_text",
    "gemma4_unified_assistant": "drafts for another model",
    "git": "captions of pictures",
    "got_ocr2": "reads pictures",
    "mllama": "pictures; its text layers attend to them",
    "musicgen": "decodes sound for an encoder",
    "musicgen_melody": "decodes sound for an encoder",
    "phi4_multimodal": "pictures and sound; its text layers are those of phi3",
    "reformer": "works on one fixed length of tokens",
}
"""What does not run here, and why."""


def config_of(name: str) -> PreTrainedConfig:
    kind = CONFIG_MAPPING[name]
    if name in TEXT_OF:
        text = config_of(TEXT_OF[name]).to_dict()
        return kind(text_config=text, vision_config=_VISION, pad_token_id=0, eos_token_id=2)
    known = kind().to_dict()
    names = {*known, *getattr(kind, "attribute_map", {})}
    given = {k: v for k, v in _SIZES.items() if k in names}
    if known.get("layer_types"):
        kinds = list(dict.fromkeys(known["layer_types"]))
        given["layer_types"] = kinds if len(kinds) > 1 else kinds * 2
        given["num_hidden_layers"] = len(given["layer_types"])
    return kind(**given | OVERRIDES.get(name, {}))


def model_folder(path: Path, name: str) -> Path:
    """A random checkpoint, biases and norms included, so that all of them show."""
    config = config_of(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1 and key.endswith(("bias", "sinks")):
                torch.nn.init.normal_(parameter, std=0.1)
    model.generation_config.eos_token_id = [2, 0]
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path
