"""Gradients in float64 of rows that two ranks share: `prompts.py FOLDERS OUT`."""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers.models.olmo3 import modeling_olmo3
from transformers.models.qwen3 import modeling_qwen3

from batches import exact_norm
from scsdpo.policy import CausalLM
from test_shared_prompts import learn, nested

EVERY = list(range(len(nested().prompts)))
SPLITS = {"one row": EVERY[3:4], "all": EVERY}
"""Rows of rank 0; rank 1 has the others."""
POLICIES = {
    "tied": ("tied", {}, 1e-12),
    "untied, checkpointed": ("untied", {"gradient_checkpointing": True}, 1e-12),
    "window": ("olmo3", {}, 1e-12),
    # Its softmax is in float32, and rows are padded otherwise.
    "eager": ("tied", {"attn_implementation": "eager"}, 1e-7),
    # Norms and decays are in float32.
    "linear attention": ("qwen3_5", {}, 1e-5),
    "linear attention, checkpointed": ("qwen3_5", {"gradient_checkpointing": True}, 1e-5),
    "convolution": ("lfm2", {}, 1e-5),
    "sinks": ("gpt_oss", {}, 1e-5),
}
"""Folder, settings, and how near gradients are, relative to the largest."""
BUDGETS = (20, 10**6)
"""A few rows at a time, all."""


def main(folders: str, out: str) -> None:
    dist.init_process_group("gloo")
    modeling_qwen3.Qwen3RMSNorm.forward = modeling_olmo3.Olmo3RMSNorm.forward = exact_norm
    mesh, rows, found = init_device_mesh("cpu", (2,)), nested(), {}
    for name, (folder, settings, _) in POLICIES.items():
        policy = CausalLM(f"{folders}/{folder}", dtype="float64", **settings)
        policy.configure_model(to_shard=True)
        policy.fill_shards(mesh, [])
        policy.language_model.set_experts_implementation("eager")  # grouped ones know no float64
        for split, first in SPLITS.items():
            mine = first if dist.get_rank() == 0 else [r for r in EVERY if r not in first]
            for budget in BUDGETS:
                policy.zero_grad()
                learn(policy.runner(rows, mine, budget), rows)
                found[name, split, budget] = {
                    key: parameter.grad.full_tensor()
                    for key, parameter in policy.named_parameters()
                    if parameter.grad is not None
                }
    if dist.get_rank() == 0:
        torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
