"""The update of a hybrid model: packed rows with shared prompts beside rows apart.

    python benchmarks/hybrids.py [--rounds 3] [--budget 1024] [--questions 4] [--rollouts 8]
        [--prompt 500] [--response 128] [--hidden 1024] [--layers 8]

Random Qwen3.5 weights, three layers of four with linear attention, a small vocabulary (so that the
loss weighs little), one forward and backward of all rows. Both ways run in processes of their own,
alternating, with the same number of threads. Prints one JSON line a run, then the medians over the
rounds of the ratios apart / packed: of seconds, of the processor's seconds (which another's work on
the machine changes less), and of the peak memory above the loaded model and its gradients. Then the
same of the bytes that tensors hold at the peak, with one question: without what the host's
allocator loses between tables of many sizes.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from scsdpo.policy import Rows
from scsdpo.policy.attention import use_layouts
from scsdpo.policy.budget import peak_bytes
from scsdpo.policy.runner import Runner, SeparateRows, SharedPrompts


def model_of(args: argparse.Namespace) -> Qwen3_5ForCausalLM:
    """Qwen3.5-0.8B's layout, `args.hidden` wide."""
    heads = max(args.hidden // 128, 1)
    config = Qwen3_5TextConfig(
        vocab_size=4096,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 4, 1),
        head_dim=128,
        linear_num_key_heads=heads,
        linear_num_value_heads=heads,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen3_5ForCausalLM._from_config(config, attn_implementation="sdpa")
    use_layouts(model)
    return model


def rows_of(args: argparse.Namespace) -> Rows:
    """Every response after the prompt of its question."""
    prompts = torch.randint(1, 4096, (args.questions, args.prompt)).tolist()
    ids = torch.randint(1, 4096, (args.questions * args.rollouts, args.response))
    every = torch.ones_like(ids).bool()
    return Rows(
        prompts=[tuple(prompt) for prompt in prompts for _ in range(args.rollouts)],
        ids=ids,
        present=every,
        sampled=every,
        pad_id=0,
    )


def update(model: Qwen3_5ForCausalLM, runner: Runner, rows: Rows) -> float:
    """The loss of all rows, with its gradient."""
    total = 0.0
    for micro in runner.micro_batches():
        targets = rows.ids[micro][rows.sampled[micro]]

        def loss(hidden, head, targets=targets):
            return torch.nn.functional.cross_entropy(head(hidden), targets, reduction="sum")

        value = runner.run(micro, loss)
        value.backward()
        runner.done(micro)
        total += value.item()
    return total / rows.ids.numel()


def one(args: argparse.Namespace) -> dict:
    """An update one way, after one of a single row that warms up."""
    model, rows = model_of(args), rows_of(args)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    kind = {"packed": SharedPrompts, "apart": SeparateRows}[args.one]
    if args.held:
        runner = kind(lambda work: work(model), rows, range(args.rollouts), args.budget)
        held = peak_bytes(lambda: update(model, runner, rows), model.device)
        return {"way": args.one, "held_mib": held / 2**20}
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for chosen in ([0], list(range(len(rows.ids)))):
        runner = kind(lambda work: work(model), rows, chosen, args.budget)
        start, busy = time.perf_counter(), time.process_time()
        value = update(model, runner, rows)
        seconds, cpu = time.perf_counter() - start, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base
    figures = {"seconds": seconds, "cpu_seconds": cpu, "mib": peak // 1024}
    return {"way": args.one, **figures, "loss": value}


def both(*words: str) -> dict[str, dict]:
    """Results of `one` each way, in separate processes."""
    runs = {}
    for way in ("packed", "apart"):
        command = [sys.executable, "-W", "ignore", *sys.argv, *words, "--one", way]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        runs[way] = json.loads(done.stdout.splitlines()[-1])
        print(json.dumps(runs[way]), flush=True)
    return runs


def ratios(rounds: list[dict[str, dict]], *figures: str) -> None:
    """Print the medians of apart / packed."""
    found = {
        f"{figure}_ratio": statistics.median(
            runs["apart"][figure] / runs["packed"][figure] for runs in rounds
        )
        for figure in figures
    }
    print(json.dumps({name: round(value, 2) for name, value in found.items()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=int, default=1024, help="tokens of a micro-batch")
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=500)
    parser.add_argument("--response", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--one", choices=["packed", "apart"], help=argparse.SUPPRESS)
    parser.add_argument("--held", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args)))
        return
    ratios([both() for _ in range(args.rounds)], "seconds", "cpu_seconds", "mib")
    ratios([both("--held", "--questions", "1")], "held_mib")


if __name__ == "__main__":
    main()
