"""Tokens per second of HFRollout beside transformers' `generate`, on the same prompts.

    python benchmarks/rollout.py MODEL_DIR TASK.json [--prompts 8] [--samples 16]
        [--new-tokens 256] [--repeats 3] [--seed 0] [--clock wall|cpu] [--max-tokens 131072]
        [--orders natural fixed straggler] [--systems generate HFRollout]

MODEL_DIR: any checkpoint with a chat template. TASK.json: one JSON object a line with `prompt` and
perhaps `system`. The systems take turns, after one short warm-up each. Three work orders: `natural`
(responses end where the policy ends them, at most `new-tokens`), `fixed` (end-of-sequence does not
stop anything, every response has `new-tokens`) and `straggler` (lengths are imposed: geometric with
a mean of an eighth of `new-tokens`, but for one response a question, which has `new-tokens`). One
JSON line a system and work order, with medians; then the ratios, and the share of the speed of
light: the time of the policy's linear layers alone, each prompt token once, and at every step
exactly the responses not yet ended.

Set OMP_NUM_THREADS to the cores that are really yours. On a machine shared with others, use one
thread and `--clock cpu` (seconds of this process): waiting for a core is then not counted.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from scsdpo.policy import CausalLM
from scsdpo.rollout import HFRollout
from scsdpo.rollout.hf.response_buffer import ResponseBuffer
from scsdpo.types import Prompt, Sampling, Verdict
from scsdpo.verifiers import Verifier

Clock = Callable[[], float]
ORDERS = ("natural", "fixed", "straggler")
SYSTEMS = ("generate", "HFRollout")
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


def straggler_lengths(questions: int, sampling: Sampling) -> Tensor:
    """[Q G]: geometric with a mean of an eighth of the cap; one response a group has the cap."""
    generator = torch.Generator().manual_seed(sampling.seed)
    cap = sampling.max_new_tokens
    shape = (questions, sampling.n)
    lengths = torch.empty(shape).geometric_(min(8 / cap, 0.5), generator=generator).long()
    longest = torch.randint(sampling.n, (questions, 1), generator=generator)
    return lengths.clamp(max=cap).scatter(1, longest, cap).flatten()


class _Imposed(LogitsProcessor):
    """Lets each row end where it should and nowhere else."""

    def __init__(self, lengths: Tensor, width: int, end: int) -> None:
        self.lengths, self.width, self.end = lengths, width, end

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        last = self.lengths.to(scores.device) <= ids.shape[1] - self.width + 1
        scores[:, self.end] = -torch.inf
        scores[last] = -torch.inf
        scores[last, self.end] = 0
        return scores


@contextmanager
def imposed_lengths(lengths: Tensor) -> Iterator[None]:
    """HFRollout's responses have these lengths [Q G], whatever is drawn."""
    plain = ResponseBuffer.draw

    def draw(self: ResponseBuffer, logits: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        ids = plain(self, logits, rows, places)
        last = lengths.to(rows.device)[rows] == places + 1
        other = (self.ends[0] + 1).expand_as(ids)
        ids = torch.where(last, self.ends[0], torch.where(self.is_end(ids), other, ids))
        self.ids[rows, places] = ids
        return ids

    with patch.object(ResponseBuffer, "draw", draw):
        yield


def run_rollout(
    policy: CausalLM,
    prompts: list[Prompt],
    sampling: Sampling,
    *,
    rollout: HFRollout,
    stragglers: bool,
) -> Tensor:
    """Lengths [Q G] of the responses."""
    lengths = straggler_lengths(len(prompts), sampling)
    with imposed_lengths(lengths) if stragglers else nullcontext():
        return rollout.sample(policy, prompts, sampling).lengths.flatten()


def run_generate(
    policy: CausalLM, prompts: list[Prompt], sampling: Sampling, *, stragglers: bool
) -> Tensor:
    """Lengths [Q G] of the responses."""
    width = max(len(p.ids) for p in prompts)
    ids = torch.tensor([[policy.chat.pad_id] * (width - len(p.ids)) + list(p.ids) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in prompts])
    ends = [i for i in policy.chat.eos_ids if i < policy.language_model.config.vocab_size]
    lengths = straggler_lengths(len(prompts), sampling)
    imposed = [_Imposed(lengths, width, ends[0])] if stragglers else []
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
            logits_processor=imposed,
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
    parser.add_argument("--max-tokens", type=int, default=HFRollout.max_tokens)
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=ORDERS)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    args = parser.parse_args()
    clock = CLOCKS[args.clock]

    policy = CausalLM(str(args.model))
    policy.configure_model()
    if torch.cuda.is_available():
        policy.cuda()
    prompts = read_prompts(policy, args.task, args.prompts)
    sampling = Sampling(n=args.samples, max_new_tokens=args.new_tokens, seed=args.seed)
    rollout = HFRollout(max_tokens=args.max_tokens)
    natural, never = policy.chat, (policy.language_model.config.vocab_size,)
    for order in args.orders:
        policy.chat = replace(natural, eos_ids=never) if order == "fixed" else natural
        stragglers = order == "straggler"
        runs_of = {
            "generate": partial(run_generate, stragglers=stragglers),
            "HFRollout": partial(run_rollout, rollout=rollout, stragglers=stragglers),
        }
        systems = {name: runs_of[name] for name in args.systems}
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
        if len(rates) == len(SYSTEMS):
            ratio = rates["HFRollout"] / rates["generate"]
            print(json.dumps({"order": order, "HFRollout/generate": round(ratio, 2)}), flush=True)


if __name__ == "__main__":
    main()
