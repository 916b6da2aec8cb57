"""One rank's share of a step in float64: `rank_gradient.py FOLDER OUT METHOD SPLIT NORM`.

SPLIT gives each rank its questions, "0,1,3/2". Saves the gradients, summed over ranks. A program of
its own: the ranks are processes. With NORM `exact` RMSNorm stays in float64.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.models.qwen3 import modeling_qwen3

from batches import METHODS, G, double_policy, exact_norm, gradient, parts
from scsdpo.distributed import sum_gradients


def main() -> None:
    folder, out, method, split, norm = sys.argv[1:]
    if norm == "exact":
        modeling_qwen3.Qwen3RMSNorm.forward = exact_norm
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{out}.meet", rank=rank, world_size=world)
    chosen = [int(q) for q in split.split("/")[rank].split(",") if q]
    policy = double_policy(Path(folder))
    advantage, settings = METHODS[method]()
    batch, update = parts(policy, advantage, chosen=chosen, **settings)
    loss, _, micro_batches = gradient(policy, batch, update, list(range(len(chosen) * G)), 80)
    sum_gradients(policy.parameters())
    total = torch.tensor(loss, dtype=torch.float64)
    dist.all_reduce(total)
    gradients = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    torch.save((float(total), gradients, micro_batches), f"{out}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
