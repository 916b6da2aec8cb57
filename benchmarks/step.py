"""One SDPO update, side by side with TRL's SDPOTrainer on the same work orders.

    python benchmarks/step.py [--orders A A2 B C] [--trl PYTHONPATH] [--repeats 3] [--rounds 1]
    python benchmarks/step.py --growth

A work order fixes questions x rollouts x tokens, model and task; `../shared/bench` holds TRL's
side and the model maker. Both systems run in processes of their own, alternating, with the same
number of threads. Prints one JSON line a run and, per order, the ratios TRL / ours of update
seconds (medians) and of peak memory above the resident model and libraries. `--growth` prints how
our update's time and memory grow with rollouts a question, prompt length and vocabulary.

Our side is a rollout batch of random tokens with the order's shapes (natural lengths: geometric, as
the calibrated end-of-sequence rate gives), judged by the same coin, through the public `Update`.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 1


@dataclass(frozen=True, kw_only=True)
class Order:
    """A unit of work: what one optimizer step is made of."""

    task: str = "sciknoweval/biology/train.json"
    questions: int = 8
    rollouts: int = 8
    tokens: int = 128
    natural: bool = False
    vocabulary: int = 8192
    hidden: int = 256
    layers: int = 4


ORDERS = {
    "A": Order(),
    "A2": Order(tokens=256, natural=True),
    "B": Order(task="tooluse/test_a.json", questions=4, tokens=64),
    "C": Order(questions=4, rollouts=4, vocabulary=151936, hidden=128, layers=2),
}


def peak_mib() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident_mib() -> float:
    """Resident memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def ours(order: Order, model: Path, task: Path, repeats: int, prompt_tokens: int = 0) -> dict:
    """Time `repeats` updates in this process; seconds are medians."""
    from scsdpo.advantage import SelfDistillation
    from scsdpo.module import PolicyOptimizer
    from scsdpo.policy import CausalLM
    from scsdpo.teacher import EMA
    from scsdpo.types import Sampling

    policy = CausalLM(str(model))
    module = PolicyOptimizer(
        policy,
        SelfDistillation(),
        teacher=EMA(),
        sampling=Sampling(n=order.rollouts, max_new_tokens=order.tokens),
    )
    module.configure_model()
    parameters = module.trained_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    prompts = load_prompts(policy, task, order.questions * (repeats + WARM_UP), prompt_tokens)
    baseline, seconds = resident_mib(), []
    for step in range(repeats + WARM_UP):
        chosen = prompts[step * order.questions : (step + 1) * order.questions]
        rollouts = random_rollouts(policy, chosen, order, seed=step)
        start = time.perf_counter()
        batch = module.prepare(rollouts, module.judge(rollouts))
        rows = range(order.questions * order.rollouts)
        budget = policy.token_budget()
        for output, _ in module.update.losses(policy, batch, list(rows), budget):
            output.loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        module.teacher.after_step(policy)
        seconds.append(time.perf_counter() - start)
    return {
        "system": "scsdpo",
        "update_s": round(statistics.median(seconds[WARM_UP:]), 3),
        "peak_rss_mib": round(peak_mib()),
        "above_model_mib": round(peak_mib() - baseline),
        "prompt_tokens": round(statistics.mean(len(p.ids) for p in prompts)),
    }


def load_prompts(policy, task: Path, count: int, prompt_tokens: int) -> list:
    """Real questions, rendered; `prompt_tokens` > 0 repeats or cuts them to that length."""
    from dataclasses import replace

    from scsdpo.types import Prompt, Verdict
    from scsdpo.verifiers import Verifier

    class Coin(Verifier):
        def verify(self, prompt: Prompt, response: str) -> Verdict:
            return Verdict(reward=float(zlib.crc32(response.encode()) % 2))

    prompts = []
    rows = [json.loads(line) for line in task.read_text().splitlines()]
    for i in range(count):
        row = rows[i % len(rows)]
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        messages = (*system, {"role": "user", "content": row["prompt"]})
        prompt = Prompt(key=str(i), messages=messages, verifier=Coin(), answer="")
        if prompt_tokens:
            words = policy.chat.encode(row["prompt"])
            words = (words * (prompt_tokens // len(words) + 1))[:prompt_tokens]
            text = {"role": "user", "content": policy.chat.decode(words)}
            prompt = replace(prompt, messages=(text,))
        prompts.append(replace(prompt, ids=policy.chat.render(prompt.messages)))
    return prompts


def random_rollouts(policy, prompts: list, order: Order, *, seed: int):
    """Responses of random ids with the order's lengths."""
    from scsdpo.types import Rollouts

    generator = torch.Generator().manual_seed(seed)
    shape = (order.questions, order.rollouts)
    lengths = torch.full(shape, order.tokens)
    if order.natural:
        lengths = torch.empty(shape).geometric_(1 / 62, generator=generator).clamp(max=order.tokens)
    mask = torch.arange(int(lengths.max())) < lengths[..., None]
    ids = torch.randint(3, len(policy.chat.tokenizer), mask.shape, generator=generator) * mask
    noise = torch.full(mask.shape, -5.0)
    texts = tuple(
        tuple(policy.chat.decode(row[keep]) for row, keep in zip(group, kept, strict=True))
        for group, kept in zip(ids, mask, strict=True)
    )
    return Rollouts(
        prompts=tuple(prompts),
        ids=ids,
        mask=mask,
        sampling_logprobs=noise,
        policy_logprobs=noise,
        finished=mask.any(-1),
        texts=texts,
        temperature=1.0,
    )


def make_model(order: Order, shared: Path, out: Path) -> Path:
    """The order's random model, by the shared maker."""
    sizes = {"vocab": order.vocabulary, "hidden": order.hidden, "layers": order.layers}
    flags = [f"--{name}={size}" for name, size in sizes.items()]
    flags += ["--eos-rate=0.016"] if order.natural else []
    maker = [sys.executable, str(shared / "bench" / "make_model.py"), str(out), *flags]
    subprocess.run(maker, check=True, capture_output=True)
    return out


def child(*args: str, path: str = "") -> dict:
    """The last JSON line that a process of its own prints."""
    environment = os.environ | ({"PYTHONPATH": path} if path else {})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *args], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def trl(order: Order, shared: Path, model: Path, repeats: int, path: str) -> dict:
    """TRL's side of the order."""
    flags = [
        *(f"--questions={order.questions}", f"--rollouts={order.rollouts}"),
        *(f"--new-tokens={order.tokens}", f"--steps={repeats}"),
        *(["--natural"] if order.natural else []),
    ]
    script = shared / "bench" / "trl_sdpo.py"
    return child(str(script), str(model), str(shared / "data" / order.task), *flags, path=path)


def compare(name: str, args: argparse.Namespace, folder: Path) -> None:
    """Alternate the two systems, then print the ratios of the medians."""
    order = ORDERS[name]
    model = make_model(order, args.shared, folder / name)
    runs: dict[str, list[dict]] = {"scsdpo": [], "trl": []}
    for _ in range(args.rounds):
        own = child(__file__, "--one", name, str(model), str(args.shared), str(args.repeats))
        peer = trl(order, args.shared, model, args.repeats, args.trl)
        # Ours minus its resident model and libraries; TRL's libraries weigh about the same.
        own["base_mib"] = own["peak_rss_mib"] - own["above_model_mib"]
        peer["above_model_mib"] = peer["peak_rss_mib"] - own["base_mib"]
        for result in (own, peer):
            runs[result["system"]].append(result)
            print(json.dumps({"order": name, **result}), flush=True)
    middle = {
        key: [statistics.median(run[key] for run in runs[system]) for system in ("trl", "scsdpo")]
        for key in ("update_s", "above_model_mib")
    }
    ratios = {f"{key}_ratio": round(a / b, 2) for key, (a, b) in middle.items()}
    print(json.dumps({"order": name, **ratios}), flush=True)


def growth(args: argparse.Namespace, folder: Path) -> None:
    """Time and memory of our update along one size at a time."""
    task = str(args.shared / "data" / Order.task)
    sweeps = {
        "rollouts": [2, 4, 8, 16, 32],
        "prompt_tokens": [128, 512, 1024, 2048, 4096],
        "vocabulary": [8192, 32768, 151936],
    }
    for size, values in sweeps.items():
        for value in values:
            settings = {"questions": 4, "rollouts": 4, "tokens": 64}
            prompt = value if size == "prompt_tokens" else 0
            if not prompt:
                settings[size] = value
            order = Order(**settings)
            model = make_model(order, args.shared, folder / f"{size}{value}")
            result = child(
                *(__file__, "--one", json.dumps(settings), str(model), task, str(args.repeats)),
                str(prompt),
            )
            print(json.dumps({size: value, **result}), flush=True)


def one(name: str, model: str, data: str, repeats: str, prompt_tokens: str = "0") -> None:
    """Our side in this process; `name` is an order's, or its settings as JSON."""
    order = ORDERS[name] if name in ORDERS else Order(**json.loads(name))
    path = Path(data)
    task = path if path.is_file() else path / "data" / order.task
    print(json.dumps(ours(order, Path(model), task, int(repeats), int(prompt_tokens))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--orders", nargs="+", default=list(ORDERS), choices=list(ORDERS))
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--trl", default="", help="PYTHONPATH of an installed trl")
    parser.add_argument("--repeats", type=int, default=3, help="steps a run")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each system, alternating")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return one(*args.one)
    if not torch.cuda.is_available():
        print("no GPU: CPU part only", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        if args.growth:
            growth(args, Path(folder))
        else:
            for name in args.orders:
                compare(name, args, Path(folder))
    return None


if __name__ == "__main__":
    main()
