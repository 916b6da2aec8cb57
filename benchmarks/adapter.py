"""LoRA over a bfloat16 base in vLLM: merged into the weights, or alone beside them.

    OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 .venv-vllm/bin/python benchmarks/adapter.py

Runs on CPU, in the environment of `make test-vllm`, on the tiny policy. A line for each size of
B A, as a share of its weight (rms over rms); the first is the base by itself. `kept`: the share of
weights that come out changed when merged. Of each way: `error`, |what arrives of the change - the
change| / |the change|; `distance`, mean |log-prob| distance in nats of vLLM's sampled tokens from
the same policy in float32.
"""

import argparse
import os

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from scsdpo.policy import CausalLM, Lora
from scsdpo.rollout import Colocated, VLLMRollout
from scsdpo.rollout.weights.stream import share_kept
from scsdpo.types import Prompt, Responses, Sampling

SIZES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def sized(policy: CausalLM, size: float) -> None:
    """Draw B so that B A is `size` of W in each layer, the same at every size."""
    generator = torch.Generator().manual_seed(0)
    for layer in adapted(policy):
        b = layer.lora_B["default"].weight
        with torch.no_grad():
            b.normal_(generator=generator)
            rms = layer.get_delta_weight("default").square().mean().sqrt()
            b.mul_(size * layer.get_base_layer().weight.float().square().mean().sqrt() / rms)


def adapted(policy: CausalLM) -> list[LoraLayer]:
    return [m for m in policy.language_model.modules() if isinstance(m, LoraLayer)]


@torch.no_grad()
def error(policy: CausalLM, adapter: str) -> float:
    """|what arrives of the change - the change| / |the change|, of all layers together."""
    lost = whole = 0.0
    for layer in adapted(policy):
        weight, delta = layer.get_base_layer().weight.float(), layer.get_delta_weight("default")
        if adapter == "merged":
            arrived = (weight + delta).bfloat16().float() - weight
        else:
            b = (layer.lora_B["default"].weight * layer.scaling["default"]).bfloat16().float()
            arrived = b @ layer.lora_A["default"].weight.bfloat16().float()
        lost += float((arrived - delta).square().sum())
        whole += float(delta.square().sum())
    return (lost / whole) ** 0.5 if whole else 0.0


def distance(policy: CausalLM, rollouts: Responses) -> float:
    """Mean over sampled tokens of |float32 log-prob - vLLM's|."""
    found: list[Tensor] = []
    exact = CausalLM(policy.name_or_path, dtype="float32", adapter=policy.adapter)
    exact.configure_model()
    for own, other in zip(exact.parameters(), policy.parameters(), strict=True):
        own.data.copy_(other.data)
    for q, prompt in enumerate(rollouts.prompts):
        for ids, mask, said in zip(
            rollouts.ids[q], rollouts.sampled[q], rollouts.policy_logprobs[q], strict=True
        ):
            sequence = torch.tensor([[*prompt.ids, *ids[mask].tolist()]])
            with exact.sampling_mode() as model:
                z = model(sequence).logits[0, len(prompt.ids) - 1 : -1].log_softmax(-1)
            found.append((z.gather(-1, ids[mask][:, None])[:, 0] - said[mask]).abs())
    return float(torch.cat(found).mean())


def measure(adapter: str, sizes: tuple[float, ...], responses: int) -> list[tuple[float, ...]]:
    """(share kept, error, distance) at each size."""
    policy = CausalLM("tiny", dtype="bfloat16", adapter=Lora(r=8, seed=0))
    policy.configure_model()
    ids = policy.chat.render(({"role": "user", "content": "What is 2 + 2?"},))
    prompt = Prompt(key="0", messages=(), verifier=None, answer="", ids=ids)
    engine = Colocated(
        dtype="bfloat16", max_model_len=512, kv_cache_gib=0.25, enforce_eager=True, adapter=adapter
    )
    rollout, found = VLLMRollout(engine), []
    for size in sizes:
        sized(policy, size)
        sampling = Sampling(n=responses, max_new_tokens=64, seed=0)
        rollouts = rollout.sample(policy, [prompt], sampling)
        kept = share_kept(adapted(policy), torch.bfloat16) or 0.0
        found.append((kept, error(policy, adapter), distance(policy, rollouts)))
    rollout.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--responses", type=int, default=128)
    responses = parser.parse_args().responses
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    merged = measure("merged", (0.0, *SIZES), responses)
    alone = measure("alone", (0.0, *SIZES), responses)
    print("| B A over W | kept | merged: error | distance | alone: error | distance |")
    print("|---|---|---|---|---|---|")
    for size, one, other in zip((0.0, *SIZES), merged, alone, strict=True):
        print(
            f"| {size:g} | {one[0]:.0%} | {one[1]:.1%} | {one[2]:.4f} | {other[1]:.1%} | "
            f"{other[2]:.4f} |"
        )


if __name__ == "__main__":
    main()
