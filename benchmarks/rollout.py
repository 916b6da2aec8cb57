"""Tokens per second of HFRollout beside transformers' `generate`, on the same prompts.

    python benchmarks/rollout.py MODEL_DIR TASK.json [--prompts 8] [--samples 16]
        [--new-tokens 256] [--repeats 3] [--seed 0] [--clock wall|cpu] [--orders natural fixed]

MODEL_DIR: any checkpoint with a chat template. TASK.json: one JSON object a line with `prompt` and
perhaps `system`. The systems take turns, after one short warm-up each. Two work orders: `natural`
(responses end where the policy ends them, at most `new-tokens`) and `fixed` (end-of-sequence does
not stop anything, every response has `new-tokens`). One JSON line a system and work order, with
medians; then the ratios, and the share of the speed of light: the time of the policy's linear
layers alone, each prompt token once, and at every step exactly the responses not yet ended.

Set OMP_NUM_THREADS to the cores that are really yours. On a machine shared with others, use one
thread and `--clock cpu` (seconds of this process): waiting for a core is then not counted.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from scsdpo.policy import CausalLM
from scsdpo.rollout import HFRollout
from scsdpo.types import Prompt, Sampling, Verdict
from scsdpo.verifiers import Verifier

Clock = Callable[[], float]
ORDERS = ("natural", "fixed")
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


class _Unverified(Verifier):
    """Stands where a prompt needs a verifier; nothing is verified here."""

    def verify(self, prompt: Prompt, response: str) -> Verdict:
        raise NotImplementedError


def read_prompts(policy: CausalLM, task: Path, count: int) -> list[Prompt]:
    prompts = []
    for number, line in enumerate(task.read_text().splitlines()[:count]):
        row = json.loads(line)
        turns = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        messages = (*turns, {"role": "user", "content": row["prompt"]})
        ids = policy.chat.render(messages)
        prompts.append(
            Prompt(key=str(number), messages=messages, verifier=_Unverified(), answer="", ids=ids)
        )
    return prompts


def run_rollout(policy: CausalLM, prompts: list[Prompt], sampling: Sampling) -> Tensor:
    """Lengths [Q G] of the responses."""
    return HFRollout().sample(policy, prompts, sampling).lengths.flatten()


def run_generate(policy: CausalLM, prompts: list[Prompt], sampling: Sampling) -> Tensor:
    """Lengths [Q G] of the responses."""
    width = max(len(p.ids) for p in prompts)
    ids = torch.tensor([[policy.chat.pad_id] * (width - len(p.ids)) + list(p.ids) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in prompts])
    ends = [i for i in policy.chat.eos_ids if i < policy.language_model.config.vocab_size]
    torch.manual_seed(sampling.seed)
    with policy.sampling_mode() as model:
        out = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            do_sample=True,
            temperature=sampling.temperature,
            top_k=0,
            top_p=1.0,
            num_return_sequences=sampling.n,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=ends or None,
            pad_token_id=policy.chat.pad_id,
        )[:, width:]
    ended = torch.isin(out, torch.tensor(policy.chat.eos_ids, device=out.device))
    return (ended.cumsum(-1) - ended.long() == 0).sum(-1)


def linear_seconds(policy: CausalLM, rows: int, clock: Clock) -> float:
    """One pass of `rows` tokens through every linear layer, head included, and nothing else."""
    layers = [m for m in policy.language_model.modules() if isinstance(m, nn.Linear)]
    inputs = {m: m.weight.new_ones(rows, m.in_features) for m in layers}
    times = []
    with torch.no_grad():
        for _ in range(4):
            start = clock()
            for layer, x in inputs.items():
                layer(x)
            if x.is_cuda:
                torch.cuda.synchronize()
            times.append(clock() - start)
    return min(times[1:])


def light_seconds(policy: CausalLM, prompts: list[Prompt], lengths: Tensor, clock: Clock) -> float:
    """The speed of light for these prompts and response lengths, in seconds."""
    most = len(lengths)
    grid = sorted({2**k for k in range(most.bit_length()) if 2**k < most} | {most})
    seconds = {rows: linear_seconds(policy, rows, clock) for rows in grid}

    def interpolated(rows: int) -> float:
        above = min(r for r in grid if r >= rows)
        below = max((r for r in grid if r <= rows), default=above)
        if above == below:
            return seconds[above]
        share = (rows - below) / (above - below)
        return seconds[below] + share * (seconds[above] - seconds[below])

    alive = [int((lengths > t).sum()) for t in range(int(lengths.max()))]
    prompt_tokens = sum(len(p.ids) for p in prompts)
    return prompt_tokens / most * seconds[most] + sum(map(interpolated, alive))


def measure(
    systems: dict[str, Callable[..., Tensor]],
    policy: CausalLM,
    prompts: list[Prompt],
    sampling: Sampling,
    *,
    repeats: int,
    clock: Clock,
) -> dict[str, list[tuple[float, Tensor]]]:
    """(seconds, lengths) of each repeat of each system; systems alternate."""
    runs: dict[str, list[tuple[float, Tensor]]] = {name: [] for name in systems}
    for system in systems.values():
        system(policy, prompts, replace(sampling, max_new_tokens=4))
    for repeat in range(repeats):
        for name, system in systems.items():
            start = clock()
            lengths = system(policy, prompts, sampling.at(repeat))
            runs[name].append((clock() - start, lengths))
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("task", type=Path)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=ORDERS)
    args = parser.parse_args()
    clock = CLOCKS[args.clock]

    policy = CausalLM(str(args.model))
    policy.configure_model()
    if torch.cuda.is_available():
        policy.cuda()
    prompts = read_prompts(policy, args.task, args.prompts)
    sampling = Sampling(n=args.samples, max_new_tokens=args.new_tokens, seed=args.seed)
    systems = {"generate": run_generate, "HFRollout": run_rollout}
    natural, never = policy.chat, (policy.language_model.config.vocab_size,)
    chats = {"natural": natural, "fixed": replace(natural, eos_ids=never)}
    for order in args.orders:
        policy.chat = chats[order]
        rates = {}
        measured = measure(systems, policy, prompts, sampling, repeats=args.repeats, clock=clock)
        for name, runs in measured.items():
            rates[name] = statistics.median(int(n.sum()) / seconds for seconds, n in runs)
            light = [light_seconds(policy, prompts, n, clock) / seconds for seconds, n in runs]
            line = {
                "order": order,
                "system": name,
                "tokens_per_second": round(rates[name], 1),
                "seconds": round(statistics.median(seconds for seconds, _ in runs), 3),
                "mean_length": round(statistics.mean(n.double().mean().item() for _, n in runs), 1),
                "share_of_light": round(statistics.median(light), 3),
            }
            print(json.dumps(line), flush=True)
        ratio = rates["HFRollout"] / rates["generate"]
        print(json.dumps({"order": order, "HFRollout/generate": round(ratio, 2)}), flush=True)


if __name__ == "__main__":
    main()
