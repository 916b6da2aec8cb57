"""Kernels, attention calls and shapes of an update, counted on CPU as a GPU would run it.

    python benchmarks/counts.py [--questions 8] [--rollouts 8] [--tokens 512] [--mean 300]

A model with Qwen3's layers and few channels runs one SDPO update under bf16 autocast, once with one
layer and once with two: the difference is a layer's. FlashAttention's two operators are emulated
(`flash_on_cpu.py`), and everything that is not a view counts as a kernel. Counts do not depend on
channels, heads or vocabulary; chunks of logits have as many tokens as those of 151,936 entries on a
GPU of 141 GiB. A decoding step of `HFRollout` is counted in the same way, with CPU's products.
Prints one JSON line.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from flash_on_cpu import emulated_flash
from torch.utils._python_dispatch import TorchDispatchMode
from work_order import Order, Ours, load_prompts, make_model

from scsdpo.loss import kernel
from scsdpo.policy import CausalLM, segment_attention
from scsdpo.policy.partial_attention import Blocks, Flash, PartialAttention, Runs
from scsdpo.rollout import HFRollout
from scsdpo.types import Sampling

ROOT = Path(__file__).resolve().parents[1]
LARGE_VOCABULARY, GPU_BYTES = 151936, 141 * 2**30
WITHOUT_KERNEL = {
    f"aten::{name}"
    for name in (
        "_unsafe_view",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "lift_fresh",
        "promote_types",
    )
}


@dataclass(kw_only=True)
class Counted:
    """Counts of one update."""

    kernels: int = 0
    micro_batches: int = 0
    calls: Counter[str]
    """Calls of FlashAttention, by direction."""
    shapes: set[tuple[int, ...]]
    """Shapes of the calls' queries and keys."""


class _Count(TorchDispatchMode):
    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.name().split(".")[0]
        returns = func._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not view and name not in WITHOUT_KERNEL:
            self.counted.kernels += 1
        if "_flash_attention" in name:
            query, key = args[1:3] if name.endswith("backward") else args[:2]
            self.counted.calls[name.rpartition("_")[2]] += 1
            self.counted.shapes.add((len(query), len(key)))
        return func(*args, **(kwargs or {}))


@contextmanager
def as_on_a_gpu(vocabulary: int) -> Iterator[None]:
    """Attention of segments runs in FlashAttention wherever a GPU's would, and chunks of logits
    have as many rows as there.
    """
    rows = kernel.chunk_rows(LARGE_VOCABULARY, "cuda", GPU_BYTES)
    block = kernel.BLOCK_BYTES["cuda"] // (4 * LARGE_VOCABULARY)
    with (
        emulated_flash(),
        patch.object(segment_attention, "kernel", _as_flash),
        patch.dict(kernel.CHUNK_BYTES, cpu=4 * vocabulary * rows),
        patch.dict(kernel.BLOCK_BYTES, cpu=4 * vocabulary * block),
    ):
        yield


def _as_flash(query: torch.Tensor, runs: Runs) -> PartialAttention:
    return Flash() if runs.causal or runs.window is None else Blocks()


def count(policy: CausalLM, task: Path, order: Order) -> Counted:
    """One update of `order` without the optimizer's step."""
    ours = Ours(policy, task, order, 1)
    rollouts = ours.rollouts(0)
    counted = Counted(calls=Counter(), shapes=set())
    with as_on_a_gpu(policy.vocabulary), _autocast(), _Count(counted):
        for loss in ours.losses(rollouts):
            loss.backward()
            counted.micro_batches += 1
    return counted


def count_decoding(policy: CausalLM, task: Path, order: Order) -> float:
    """Kernels of a decoding step of `HFRollout`, a mean of 8 steps behind the first two."""
    prompts = load_prompts(policy, task, order, order.questions)

    def kernels(tokens: int) -> int:
        counted = Counted(calls=Counter(), shapes=set())
        with _autocast(), _Count(counted):
            HFRollout().sample(policy, prompts, Sampling(n=order.rollouts, max_new_tokens=tokens))
        return counted.kernels

    return (kernels(10) - kernels(2)) / 8


def _autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)  # as Lightning


def without_layers(policy: CausalLM, layers: int) -> CausalLM:
    """The policy with its first `layers` only."""
    decoder = policy.language_model.get_decoder()
    decoder.layers = decoder.layers[:layers]
    decoder.config.num_hidden_layers = layers
    return policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--mean", type=int, default=0, help="mean length; 0: all of --tokens")
    parser.add_argument("--budget", type=int, default=40_000)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    args = parser.parse_args()
    order = Order(
        questions=args.questions,
        rollouts=args.rollouts,
        tokens=args.tokens,
        natural=args.mean > 0,
        mean=max(args.mean, 1),
        vocabulary=8192,
        hidden=64,
        layers=2,
        budget=args.budget,
    )
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(order, args.shared, Path(folder))
        counts, steps = [], []
        for layers in (1, 2):
            policy = CausalLM(str(model))
            policy.configure_model()
            task = args.shared / "data" / order.task
            counts.append(count(without_layers(policy, layers), task, order))
            steps.append(count_decoding(policy, task, order))
    one, two = counts
    line = {
        "micro_batches": one.micro_batches,
        "kernels_a_layer": two.kernels - one.kernels,
        "kernels_beside": 2 * one.kernels - two.kernels,
        "attention_calls_a_layer": dict(one.calls),
        "attention_shapes": len(one.shapes),
        "decoding_kernels_a_layer": round(steps[1] - steps[0]),
        "decoding_kernels_beside": round(2 * steps[0] - steps[1]),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
