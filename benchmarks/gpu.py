"""One SDPO update at Qwen3's own shapes with random weights, on one GPU.

    python benchmarks/gpu.py [--device cuda] [--shapes qwen3-0.6b qwen3-8b-lora] [--repeats 3]

One JSON line a shape: seconds, trained tokens a second, peak memory, and the share of the device's
own matrix-product rate (an 8,192-square product in bf16) that the update reaches; then the ten
kernels that took most of a profiled update. `--device cpu --shapes smoke` shows that it runs.
"""

import argparse
import json
import statistics
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM
from work_order import Order, Ours, gemm_rate, make_model

from scsdpo.policy import CausalLM, FullFineTune, Lora
from scsdpo.policy.adapter import Adapter

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Qwen3 architecture and how it is trained."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    tie_word_embeddings: bool
    head_dim: int = 128
    vocab_size: int = 151936
    adapter: Adapter
    order: Order


_BIOLOGY = Order(questions=8, rollouts=8, tokens=512, vocabulary=8192, hidden=64, layers=1)
SHAPES = {
    "qwen3-0.6b": Shape(
        hidden_size=1024,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        intermediate_size=3072,
        tie_word_embeddings=True,
        adapter=FullFineTune(),
        order=_BIOLOGY,
    ),
    "qwen3-8b-lora": Shape(
        hidden_size=4096,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=12288,
        tie_word_embeddings=False,
        adapter=Lora(),
        order=_BIOLOGY,
    ),
    "smoke": Shape(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=128,
        tie_word_embeddings=False,
        head_dim=64,
        vocab_size=8192,
        adapter=Lora(),
        order=replace(_BIOLOGY, questions=2, rollouts=2, tokens=8),
    ),
}


@contextmanager
def random_weights(device: str):
    """Checkpoints are made where they would be read: on the device, from their config alone."""

    def make(path: str, *, dtype: torch.dtype, attn_implementation: str):
        config = AutoConfig.from_pretrained(path)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attn_implementation
            ).eval()

    kept = AutoModelForCausalLM.from_pretrained
    AutoModelForCausalLM.from_pretrained = make
    try:
        yield
    finally:
        AutoModelForCausalLM.from_pretrained = kept


def load(shape: Shape, shared: Path, folder: Path, device: str) -> CausalLM:
    """The policy, with a small model's tokenizer."""
    make_model(shape.order, shared, folder)
    config = AutoConfig.from_pretrained(folder)
    sizes = {k: v for k, v in vars(shape).items() if k not in ("adapter", "order")}
    sizes["layer_types"] = ["full_attention"] * shape.num_hidden_layers
    type(config).from_dict(config.to_dict() | sizes).save_pretrained(folder)
    policy = CausalLM(str(folder), adapter=shape.adapter)
    with random_weights(device):
        policy.configure_model()
    return policy.to(device)


def run_shape(name: str, shared: Path, folder: Path, repeats: int, device: str) -> None:
    """Measure, then profile."""
    shape = SHAPES[name]
    policy = load(shape, shared, folder, device)
    task = shared / "data" / shape.order.task
    ours = Ours(policy, task, shape.order, repeats + 2)
    batches = [ours.rollouts(step) for step in range(repeats + 2)]
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with torch.autocast(device, torch.bfloat16):
        seconds = statistics.median([ours.update(batch) for batch in batches[:-1]][1:])
        peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else float("nan")
        with FlopCounterMode(display=False) as counter:
            ours.update(batches[-1])
        kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
        with profile(activities=kinds) as profiled:
            ours.update(batches[-1])
    trained = shape.order.questions * shape.order.rollouts * shape.order.tokens
    line = {
        "shape": name,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "update_s": round(seconds, 3),
        "response_tokens_per_s": round(trained / seconds),
        "peak_gib": round(peak, 2),
        "tflops": round(counter.get_total_flops() / seconds / 1e12, 2),
        "share_of_gemm_rate": round(
            counter.get_total_flops() / seconds / gemm_rate(torch.bfloat16, device), 3
        ),
    }
    print(json.dumps(line), flush=True)
    sort = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    print(profiled.key_averages().table(sort_by=sort, row_limit=10), flush=True)


def run_shapes(shared: Path, folder: Path, repeats: int) -> None:
    """Both of Qwen3's shapes on the GPU."""
    for name in ("qwen3-0.6b", "qwen3-8b-lora"):
        run_shape(name, shared, folder / name, repeats, "cuda")
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["qwen3-0.6b", "qwen3-8b-lora"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in args.shapes:
            run_shape(name, args.shared, Path(folder) / name, args.repeats, args.device)


if __name__ == "__main__":
    main()
