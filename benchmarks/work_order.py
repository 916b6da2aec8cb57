"""Work orders: what one SDPO update is made of, and our side of running it.

A work order fixes questions x rollouts x tokens, model and task; `../shared/bench` holds the model
maker and TRL's side. Ours is a batch of random responses with the order's shapes (natural lengths:
geometric, as the calibrated end-of-sequence rate gives), judged by the same coin, through the
public `PolicyOptimizer.prepare` and `Update.losses`.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from scsdpo.advantage import SelfDistillation
from scsdpo.policy import CausalLM
from scsdpo.policy.tree import prefix_tree
from scsdpo.teacher import EMA
from scsdpo.training import Batch, PolicyOptimizer
from scsdpo.types import Prompt, Responses, Sampling, Verdict
from scsdpo.verifiers import Verification, Verifier


@dataclass(frozen=True, kw_only=True)
class Order:
    """A unit of work: what one optimizer step is made of."""

    task: str = "sciknoweval/biology/train.json"
    questions: int = 8
    rollouts: int = 8
    tokens: int = 128
    natural: bool = False
    mean: int = 62
    """Of natural lengths, in tokens, before they are cut to `tokens`."""
    vocabulary: int = 8192
    hidden: int = 256
    layers: int = 4
    trained_on: str = ""
    """Sub-folder of the data that the tokenizer is trained on; empty: all of it."""
    prompt_tokens: int = 0
    """Prompts are cut or repeated to this length; 0: as they are."""
    budget: int = 0
    """Of our side, in tokens; 0: what the policy makes of the free memory."""


ORDERS = {
    "A": Order(),
    "A2": Order(tokens=256, natural=True),
    # Tool prompts have about 1,500 tokens for a tokenizer that saw none of them.
    "B": Order(task="tooluse/test_a.json", questions=4, tokens=64, trained_on="sciknoweval"),
    "C": Order(questions=4, rollouts=4, vocabulary=151936, hidden=128, layers=2),
    # More rollouts to a long prompt than fit a micro-batch.
    "E": Order(
        task="tooluse/test_a.json", questions=3, rollouts=16, tokens=160, trained_on="sciknoweval"
    ),
}


def make_model(order: Order, shared: Path, out: Path) -> Path:
    """The order's random model, by the shared maker."""
    sizes = {"vocab": order.vocabulary, "hidden": order.hidden, "layers": order.layers}
    flags = [f"--{name}={size}" for name, size in sizes.items()]
    flags += ["--eos-rate=0.016"] if order.natural else []
    flags += [f"--data={shared / 'data' / order.trained_on}"]
    maker = [sys.executable, str(shared / "bench" / "make_model.py"), str(out), *flags]
    subprocess.run(maker, check=True, capture_output=True)
    return out


@dataclass(frozen=True)
class Coin(Verifier):
    """About half of all responses pass."""

    def verify(self, prompt: Prompt, response: str) -> Verdict:
        return Verdict(reward=float(zlib.crc32(response.encode()) % 2))


def load_prompts(policy: CausalLM, task: Path, order: Order, count: int) -> list[Prompt]:
    """Real questions, rendered."""
    prompts = []
    rows = [json.loads(line) for line in task.read_text().splitlines()]
    for i in range(count):
        row = rows[i % len(rows)]
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        messages = (*system, {"role": "user", "content": row["prompt"]})
        if order.prompt_tokens:
            words = policy.chat.encode(row["prompt"])
            words = (words * (order.prompt_tokens // len(words) + 1))[: order.prompt_tokens]
            messages = ({"role": "user", "content": policy.chat.decode(words)},)
        prompt = Prompt(key=str(i), messages=messages, verifier=Coin(), answer="")
        prompts.append(replace(prompt, ids=policy.chat.render(messages)))
    return prompts


def random_rollouts(policy: CausalLM, prompts: list[Prompt], order: Order, seed: int) -> Responses:
    """Responses of random ids with the order's lengths."""
    generator = torch.Generator().manual_seed(seed)
    shape = (order.questions, order.rollouts)
    lengths = torch.full(shape, order.tokens)
    if order.natural:
        lengths = (
            torch.empty(shape)
            .geometric_(1 / order.mean, generator=generator)
            .clamp(max=order.tokens)
        )
    mask = torch.arange(int(lengths.max())) < lengths[..., None]
    ids = torch.randint(3, len(policy.chat.tokenizer), mask.shape, generator=generator) * mask
    noise = torch.full(mask.shape, -5.0)
    texts = tuple(
        tuple(policy.chat.decode(row[keep]) for row, keep in zip(group, kept, strict=True))
        for group, kept in zip(ids, mask, strict=True)
    )
    return Responses.of_one_turn(
        prompts=tuple(prompts),
        ids=ids,
        sampled=mask,
        sampling_logprobs=noise,
        policy_logprobs=noise,
        ended=mask.any(-1),
        texts=texts,
        temperature=1.0,
    ).to(policy.language_model.device)


class Ours:
    """SDPO by this library on one work order: top-100 + tail JSD against an EMA teacher.

    Args:
        policy: with its weights loaded, on its device.
        task: the file of questions.
        order: the work.
        steps: for how many steps questions are loaded.
    """

    def __init__(self, policy: CausalLM, task: Path, order: Order, steps: int) -> None:
        self.policy, self.order = policy, order
        self.module = PolicyOptimizer(
            policy,
            SelfDistillation(),
            teacher=EMA(),
            sampling=Sampling(n=order.rollouts, max_new_tokens=order.tokens),
            verification=Verification(workers=0),  # a coin is no work to hand out
        )
        self.module.configure_model()
        self.module.to(policy.language_model.device)
        self.parameters = [p for p in policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)
        self.prompts = load_prompts(policy, task, order, order.questions * steps)

    def rollouts(self, step: int) -> Responses:
        """The batch of one step."""
        first = step * self.order.questions
        chosen = self.prompts[first : first + self.order.questions]
        return random_rollouts(self.policy, chosen, self.order, step)

    def batch(self, rollouts: Responses) -> Batch:
        """Judged, and ready to be learned from."""
        return self.module.prepare(self.module.judge(rollouts))

    def losses(self, rollouts: Responses) -> Iterator[torch.Tensor]:
        """The loss of each micro-batch; backward each before the next."""
        rows = list(range(self.order.questions * self.order.rollouts))
        budget = self.order.budget or self.policy.token_budget()
        update, batch = self.module.steps.update, self.batch(rollouts)
        for output, _ in update.losses(self.policy, batch, rows, budget):
            yield output.loss

    def update(self, rollouts: Responses) -> float:
        """Seconds of one whole update."""
        start = now()
        for loss in self.losses(rollouts):
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.module.teacher.after_step(self.policy)
        return now() - start


def run_ours(order: Order, model: Path, task: Path, repeats: int) -> dict:
    """Time `repeats` updates in this process after one of warm-up; seconds are medians."""
    policy = CausalLM(str(model))
    policy.configure_model()
    ours = Ours(policy, task, order, repeats + 1)
    baseline = resident_mib()
    batches = [ours.rollouts(step) for step in range(repeats + 1)]
    seconds = [ours.update(batch) for batch in batches][1:]
    above = peak_mib() - baseline
    states = 3 * 4 * sum(p.numel() for p in ours.parameters) / 2**20  # gradient, AdamW's moments
    flops = statistics.mean(minimal_flops(policy, ours.batch(batch)) for batch in batches[1:])
    products = flops / gemm_rate(torch.float32, "cpu")
    return {
        "system": "scsdpo",
        "update_s": round(statistics.median(seconds), 3),
        "peak_rss_mib": round(peak_mib()),
        "above_model_mib": round(above),
        "above_model_and_optimizer_mib": round(above - states),
        "prompt_tokens": round(statistics.mean(len(p.ids) for p in ours.prompts)),
        "share_of_products": round(products / statistics.median(seconds), 2),
    }


def minimal_flops(policy: CausalLM, batch: Batch, *, as_trained: bool = False) -> float:
    """Of an update's matrix products if each distinct token runs once: forward and backward for the
    student, forward for the teacher. A product with a weight that is trained has two in the
    backward, one with a frozen weight has one; a factor of LoRA counts as nothing.

    Args:
        policy: whose shapes, and which weights are trained.
        batch: rows without credit are not run.
        as_trained: count frozen weights as if they were trained, 6 N a token.
    """
    layers = policy.language_model.get_decoder().layers
    head = policy.language_model.get_output_embeddings()
    student = forward_flops(policy, batch, batch.student_prompts(), batch.active)
    whole = as_trained or all(p.requires_grad for p in layers.parameters())
    total = (3 if whole else 2) * student.layers + 3 * student.attention
    total += (3 if as_trained or head.weight.requires_grad else 2) * student.head
    if "teacher" in batch.contexts:
        prompts = [ids for group in batch.teacher.ids for ids in group]
        taught = batch.active & batch.plan.needs_teacher.flatten()
        total += sum(forward_flops(policy, batch, prompts, taught))
    return total


class Flops(NamedTuple):
    """Of a forward, by what the products are with."""

    layers: float
    """Weights of the layers."""
    attention: float
    """Keys and values."""
    head: float


def forward_flops(
    policy: CausalLM, batch: Batch, prompts: list[tuple[int, ...]], rows: torch.Tensor
) -> Flops:
    """Of the chosen rows: linear layers, attention to what is seen, and the head on responses."""
    model, chosen = policy.language_model, rows.nonzero()[:, 0].tolist()
    config, layers = model.config, model.get_decoder().layers
    roots, _ = prefix_tree([prompts[row] for row in chosen], longest=2**30)
    lengths = batch.sampled.sum(-1).tolist()
    # (tokens, position of the first); a response's last token predicts nothing and is not run.
    runs = [(len(s.ids), s.position) for root in roots for s in root.walk()]
    runs += [(lengths[row] - 1, len(prompts[row])) for row in chosen]
    seen = sum(n * start + n * (n + 1) / 2 for n, start in runs)
    # A weight in 4 bits is packed: its shape says nothing.
    weights = sum(
        part.in_features * part.out_features
        for name, part in layers.named_modules()
        if isinstance(part, torch.nn.Linear) and "lora_" not in name
    )
    width = config.num_attention_heads * config.head_dim * len(layers)
    head = policy.vocabulary * config.hidden_size * sum(lengths[row] for row in chosen)
    return Flops(2 * weights * sum(n for n, _ in runs), 4 * width * seen, 2 * head)


def gemm_rate(dtype: torch.dtype, device: str) -> float:
    """Floating point operations a second of a large square product: the machine's own rate."""
    size = 2048 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    times = []
    for _ in range(6):
        start = now()
        a @ a
        times.append(now() - start)
    return 2 * size**3 / statistics.median(times[1:])


def now() -> float:
    """Seconds, with everything queued on the GPU done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_mib() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident_mib() -> float:
    """Resident memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
