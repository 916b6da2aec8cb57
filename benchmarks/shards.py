"""Memory of sharded weights on a rank, and the error of gradients gathered in bfloat16.

    python benchmarks/shards.py memory [--ranks 1 2 4]      # bytes a rank by part, in MB
    python benchmarks/shards.py gradients [--ranks 2]       # relative distance from float32

Runs on CPU, each number of ranks in processes of its own. `memory`: a random Qwen3 of the size of
SmolLM2-135M and an EMA teacher. By part: bytes of the tensors of a rank; `resident`: what the
process gained by then, read from the kernel (at its peak while loading; and after a step, when
gradients are gone and the allocator has given back what it kept).
`gradients`: a random Qwen3 of Qwen3-8B's layout (36 layers) with a 16th of its width; of the mean
cross-entropy of the ranks' tokens.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from scsdpo.distributed import sum_gradients
from scsdpo.policy import TINY_FOLDER, CausalLM
from scsdpo.policy.sharding import local, reshard
from scsdpo.teacher import EMA

MB = 1e6
SIZES = {
    "memory": Qwen3Config(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
    "gradients": Qwen3Config(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=36,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=128,
        vocab_size=2048,
        tie_word_embeddings=False,
    ),
}


def write(kind: str, folder: Path) -> None:
    """A random policy of that size, with the tokenizer of the tiny one."""
    torch.manual_seed(0)
    Qwen3ForCausalLM(SIZES[kind]).save_pretrained(folder)
    for file in TINY_FOLDER.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    template = TINY_FOLDER / "chat_template.jinja"
    (folder / template.name).write_bytes(template.read_bytes())


def loaded(policy: CausalLM, *teachers: EMA) -> CausalLM:
    """Load weights and teachers, in shards if there are several ranks."""
    ranks = dist.get_world_size()
    policy.configure_model(to_shard=ranks > 1)
    for teacher in teachers:
        teacher.configure(policy, "teacher")
    if ranks > 1:
        mesh = init_device_mesh("cpu", (ranks,))
        policy.fill_shards(mesh, (part for each in teachers for part in each.modules()))
    return policy


def backward(policy: CausalLM, tokens: int) -> None:
    """Backward of the mean cross-entropy over all ranks' tokens; each rank has its own."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(policy.vocabulary, (1, tokens), generator=generator)

    def work(model: nn.Module) -> tuple[Tensor]:
        return (model(input_ids=ids, labels=ids).loss / dist.get_world_size(),)

    policy(work)[0].backward()
    sum_gradients(policy.parameters())


def memory(folder: str) -> dict[str, float]:
    """MB of this rank."""
    start = status("VmRSS")
    policy, teacher = CausalLM(folder), EMA()
    loaded(policy, teacher)
    found = {"resident, peak of loading": status("VmHWM") - start}
    optimizer = torch.optim.AdamW(policy.parameters(), fused=True)
    backward(policy, tokens=16)
    reshard(policy)
    found |= {
        "weights": size(policy.parameters()),
        "teacher": size(teacher.parameters()),
        "gradients": size(p.grad for p in policy.parameters() if p.grad is not None),
    }
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values()]
    found["optimizer"] = size(t for t in states if isinstance(t, Tensor))
    optimizer.zero_grad()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the allocator keeps for later is not needed
    return found | {"resident, after a step": status("VmRSS") - start}


def size(tensors: Iterable[Tensor]) -> float:
    return sum(local(tensor.detach()).nbytes for tensor in tensors) / MB


def status(name: str) -> float:
    """MB of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024 / MB


def gradients(folder: str) -> dict[str, float]:
    """|g - g32| / |g32|, g32 the gradient in float32 throughout."""
    made = {}
    for name, gathered, autocast in (
        ("float32", "auto", False),
        ("bf16-mixed", "auto", True),
        ("bf16-mixed, gathered in bfloat16", "bfloat16", True),
    ):
        policy = loaded(CausalLM(folder, gathered_dtype=gathered))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            backward(policy, tokens=256)
        grads = [p.grad for p in policy.parameters() if p.grad is not None]
        whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in grads]
        made[name] = torch.cat([g.flatten().double() for g in whole])
    exact = made.pop("float32")
    distances = {name: float((g - exact).norm() / exact.norm()) for name, g in made.items()}
    one, other = made.values()
    return distances | {"these two": float((one - other).norm() / one.norm())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=SIZES)
    parser.add_argument("--ranks", type=int, nargs="+")
    parser.add_argument("--folder")
    args = parser.parse_args()
    if args.folder:  # a rank
        dist.init_process_group("gloo")
        found = {"memory": memory, "gradients": gradients}[args.kind](args.folder)
        if dist.get_rank() == 0:
            print(json.dumps({name: float(f"{value:.4g}") for name, value in found.items()}))
        dist.destroy_process_group()
        return
    with tempfile.TemporaryDirectory() as folder:
        write(args.kind, Path(folder))
        for ranks in args.ranks or {"memory": (1, 2, 4), "gradients": (2,)}[args.kind]:
            run = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            command = [sys.executable, "-W", "ignore", *run, __file__, args.kind]
            done = subprocess.run(
                [*command, "--folder", folder],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            print(f"{ranks} ranks: {done.stdout.strip()}", flush=True)


if __name__ == "__main__":
    main()
