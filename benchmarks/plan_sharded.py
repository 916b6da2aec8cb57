"""The arithmetic of shards against torch's `FSDPMemTracker`: Qwen3-8B's trunk on one of 8 ranks.

    python benchmarks/plan_sharded.py [--layers 36] [--tokens 1024] [--ranks 8]

Nothing is computed: tensors are fake and so is the process group. Two forwards and backwards of the
decoder, layer by layer in shards; the second finds gradients. Optimizer states are 1/N of what one
process has and not tracked; head and chunks of logits are arithmetic. One JSON line a case.
"""

import argparse
import json
import sys
from dataclasses import replace

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

from scsdpo.planning import Architecture, Counted, read_model_config, skeleton
from scsdpo.planning.memory import casts_bytes, ending_bytes, gathered_bytes, stored_bytes
from scsdpo.planning.setup import (
    FLOAT32,
    Devices,
    Lengths,
    OptimizerBytes,
    Sampler,
    Setup,
)

CASES = {
    "float32": (False, False),
    "bf16-mixed": (True, False),
    "bf16-mixed, checkpointing": (True, True),
}


def tracked(config, ranks: int, tokens: int, autocast: bool, checkpointing: bool) -> int:
    """Bytes at the peak on rank 0."""
    mesh = init_device_mesh("cpu", (ranks,))
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="sdpa"
        )
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        trunk = model.get_decoder().train()
        for part in (*trunk.layers, trunk):
            fully_shard(part, mesh=mesh)
        ids = torch.zeros(1, tokens, dtype=torch.long)
        tracker = FSDPMemTracker(trunk)
        with tracker:
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
                    hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state
                hidden.float().square().mean().backward()
                tracker.reset_mod_stats()  # of modules; the peak of all stays
        (peak,) = tracker.get_tracker_snapshot("peak").values()
    return peak["Total"]


def planned(config, ranks: int, tokens: int, autocast: bool, checkpointing: bool) -> dict[str, int]:
    """Bytes of the same parts by arithmetic."""
    shapes = Architecture.of(skeleton(config))
    # The decoder alone: without the head.
    trunk = replace(shapes, tied=True, parameters=shapes.parameters - shapes.table)
    counted = Counted(frozen=0, trained=trunk.parameters, adapted=0, rank_tables=0)
    setup = Setup(
        shapes=trunk,
        counted=counted,
        base=FLOAT32,
        autocast=autocast,
        checkpointing=checkpointing,
        shared_prefixes=True,
        seconds=(),
        optimizer=OptimizerBytes(state=0, temporary=0),
        sampler=Sampler(kind="remote"),
        devices=Devices(ranks=ranks, sharded=True),
        lengths=Lengths(prompt=1, teacher_prompt=1, response=1),
        questions=ranks,
        group=1,
        updates=1,
        in_flight=1,
        max_tokens=tokens,
    )
    again = (
        stored_bytes(replace(setup, checkpointing=False)) // trunk.layers if checkpointing else 0
    )
    shard = FLOAT32 * trunk.parameters // ranks
    full = gathered_bytes(setup) + casts_bytes(setup) + tokens * (stored_bytes(setup) + again)
    return {
        "weights and gradients": 2 * shard,
        "gathered": gathered_bytes(setup),
        "casts": casts_bytes(setup),
        "activations": tokens * (stored_bytes(setup) + again),
        "at the end of the backward": ending_bytes(setup),
        "peak": 2 * shard + max(full, ending_bytes(setup)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tolerance", type=float, help="fail if further off, e.g. 0.15")
    given = parser.parse_args()
    wrong = []
    dist.init_process_group("fake", rank=0, world_size=given.ranks, store=FakeStore())
    config = read_model_config("Qwen/Qwen3-8B")
    config.num_hidden_layers = given.layers
    config.layer_types = config.layer_types[: given.layers]
    for name, (autocast, checkpointing) in CASES.items():
        parts = planned(config, given.ranks, given.tokens, autocast, checkpointing)
        found = tracked(config, given.ranks, given.tokens, autocast, checkpointing)
        line = {
            "case": name,
            "layers": given.layers,
            "planned_gib": round(parts["peak"] / 2**30, 3),
            "tracked_gib": round(found / 2**30, 3),
            "planned_over_tracked": round(parts["peak"] / found, 3),
            "parts_gib": {part: round(size / 2**30, 3) for part, size in parts.items()},
        }
        print(json.dumps(line), flush=True)
        if given.tolerance and abs(parts["peak"] / found - 1) > given.tolerance:
            wrong.append(name)
    dist.destroy_process_group()
    if wrong:
        sys.exit(f"further off than {given.tolerance}: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
