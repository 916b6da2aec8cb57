"""TRL's and verl's words for our keys. Imports nothing heavy."""

from collections.abc import Mapping

_STEPS = "has no counterpart: model.updates_per_rollout is the number of steps a batch"
_TOKENS = "is here model.limits.max_tokens, of tokens in memory at a time"
_KL = "is here the weight of ReferenceKL or ReferenceAnchor, in model.advantage: Blend"
_NO_EPOCHS = "has no counterpart: no rollout is learned from twice"

TRL: Mapping[str, str] = {
    "num_generations": "is here model.sampling.n",
    "num_generations_eval": "is here model.val_sampling.n",
    "max_completion_length": "is here model.sampling.max_new_tokens",
    "generation_batch_size": "is here data.questions_per_batch, which counts questions",
    "steps_per_generation": _STEPS,
    "per_device_train_batch_size": f"{_TOKENS}; data.questions_per_batch is the whole batch",
    "gradient_accumulation_steps": f"{_TOKENS}; data.questions_per_batch is the whole batch",
    "num_iterations": _NO_EPOCHS,
    "num_train_epochs": "is here trainer.max_epochs",
    "learning_rate": "is here model.optimizer.lr",
    "optim": "is here model.optimizer, a class of torch.optim",
    "lr_scheduler_type": "is here model.lr_scheduler, a class of torch.optim.lr_scheduler",
    "warmup_steps": "is here model.lr_scheduler, such as LinearLR",
    "max_grad_norm": "is here model.limits.max_grad_norm",
    "beta": _KL,
    "epsilon": "is here model.advantage.clip_low, of GroupRelative",
    "epsilon_high": "is here model.advantage.clip_high, of GroupRelative",
    "scale_rewards": "is here model.advantage.scale, of GroupRelative",
    "importance_sampling_level": "is here model.advantage.level, of GroupRelative",
    "loss_type": "is here model.reduction: TokenMean, SequenceMean or TokenSum",
    "entropy_coef": "is here EntropyBonus, a part of model.advantage: Blend",
    "mask_truncated_completions": "is here model.token_weighting: Overlong",
    "reward_funcs": "is here the verifier of a source, such as data.train.verifier of Records",
    "use_vllm": "is here model.rollout: VLLMRollout",
    "vllm_gpu_memory_utilization": "is here model.rollout.engine.kv_cache_gib, of Colocated",
    "vllm_tensor_parallel_size": "is here model.rollout.engine.tensor_parallel, of Colocated",
    "peft_config": "is here model.policy.adapter: Lora",
    "bf16": "is here trainer.precision: bf16-mixed",
    "eval_steps": "is here trainer.val_check_interval, in batches",
    "save_steps": "is here checkpoint.every_minutes",
    "resume_from_checkpoint": "is here --ckpt_path last",
    "report_to": "is here trainer.logger",
    "distillation_topk": "is here model.advantage.support: TopK",
}
"""Keys of TRL's `GRPOConfig`, each with our key; docs/words.md has the differences."""

VERL: Mapping[str, str] = {
    "train_batch_size": "is here data.questions_per_batch",
    "max_response_length": "is here model.sampling.max_new_tokens",
    "max_prompt_length": "is here data.max_prompt_tokens",
    "ppo_mini_batch_size": _STEPS,
    "ppo_micro_batch_size_per_gpu": _TOKENS,
    "ppo_max_token_len_per_gpu": _TOKENS,
    "ppo_epochs": _NO_EPOCHS,
    "total_training_steps": "is here trainer.max_steps",
    "total_epochs": "is here trainer.max_epochs",
    "clip_ratio_low": "is here model.advantage.clip_low, of GroupRelative",
    "clip_ratio_high": "is here model.advantage.clip_high, of GroupRelative",
    "loss_agg_mode": "is here model.reduction: TokenMean, SequenceMean or TokenSum",
    "entropy_coeff": "is here EntropyBonus, a part of model.advantage: Blend",
    "use_kl_loss": _KL,
    "kl_loss_coef": _KL,
    "custom_reward_function": "is here the verifier of a source, such as data.train.verifier "
    "of Records",
    "gpu_memory_utilization": "is here model.rollout.engine.kv_cache_gib, of Colocated",
    "tensor_model_parallel_size": "is here model.rollout.engine.tensor_parallel, of Colocated",
    "lora_rank": "is here model.policy.adapter.r, of Lora",
    "test_freq": "is here trainer.val_check_interval, in batches",
    "save_freq": "is here checkpoint.every_minutes",
    "resume_mode": "is here --ckpt_path last",
}
"""Last parts of verl's keys, each with our key."""


def our_key(word: str) -> str:
    """Name our key for one of TRL's or verl's; '' if `word` is of neither."""
    for whose, words in (("TRL", TRL), ("verl", VERL)):
        if word in words:
            return f"no such key; {whose}'s {word} {words[word]} (docs/words.md)"
    return ""
