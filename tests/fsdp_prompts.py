"""One of two ranks: the policy sharded by FSDP2, a step of shared prompts, gradients gathered."""

import sys
from types import MethodType

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from transformers.models.qwen3 import modeling_qwen3

from batches import double_policy, exact_norm
from scsdpo.policy.runner import SharedPrompts
from test_shared_prompts import learn, nested


def shard(model) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for part in (*model.get_decoder().layers, model):
        fully_shard(part, mesh=mesh)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    model.inside = MethodType(lambda self, work: work(self), model)
    register_fsdp_forward_method(model, "inside")


def main(folder: str, out: str, store: str, rank: str, checkpointed: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
    modeling_qwen3.Qwen3RMSNorm.forward = exact_norm
    policy = double_policy(folder, gradient_checkpointing=checkpointed == "checkpointed")
    model = policy.language_model
    shard(model)
    rows, found = nested(), {}
    for budget in (60, 10**6):
        policy.zero_grad()
        runner = SharedPrompts(model.inside, rows, list(range(len(rows.prompts))), budget)
        learn(runner, rows)
        found[budget] = {
            name: parameter.grad.full_tensor() / 2
            for name, parameter in policy.named_parameters()
            if parameter.grad is not None
        }
    if dist.get_rank() == 0:
        torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
