"""One SDPO update, side by side with TRL's SDPOTrainer on the same work orders.

    python benchmarks/step.py [--orders A A2 B C] [--trl PYTHON] [--repeats 3] [--rounds 1]
    python benchmarks/step.py --growth
    python benchmarks/step.py --gpu

Both systems run in processes of their own, alternating, with the same number of threads. Prints
one JSON line a run and, per order, the ratios TRL / ours of update seconds (medians) and of peak
memory above the resident model and libraries. `share_of_products` is the part of our update's time
that its matrix products would take at the machine's own rate (a 2,048-square product). `--growth`
prints how our update's time and memory grow with rollouts a question, prompt length, vocabulary and
tokens. `--gpu` runs Qwen3-0.6B's and Qwen3-8B's shapes (`benchmarks/gpu.py`), if there is a GPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from work_order import ORDERS, Order, make_model, run_ours

ROOT = Path(__file__).resolve().parents[1]


def child(python: str, *args: str) -> dict:
    """The last JSON line that a process of its own prints."""
    command = [python, "-W", "ignore", *args]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def ours(order: Order, model: Path, args: argparse.Namespace) -> dict:
    """Our side of the order, in a process of its own."""
    task = args.shared / "data" / order.task
    settings = (json.dumps(asdict(order)), str(model), str(task), str(args.repeats))
    return child(sys.executable, __file__, "--one", *settings)


def trl(order: Order, model: Path, args: argparse.Namespace) -> dict:
    """TRL's side of the order."""
    flags = [
        *(f"--questions={order.questions}", f"--rollouts={order.rollouts}"),
        *(f"--new-tokens={order.tokens}", f"--steps={args.repeats}"),
        *(["--natural"] if order.natural else []),
    ]
    script, task = args.shared / "bench" / "trl_sdpo.py", args.shared / "data" / order.task
    return child(args.trl, str(script), str(model), str(task), *flags)


def compare(name: str, args: argparse.Namespace, folder: Path) -> None:
    """Alternate the two systems, then print the ratios of the medians."""
    order = ORDERS[name]
    model = make_model(order, args.shared, folder / name)
    runs: dict[str, list[dict]] = {"scsdpo": [], "trl": []}
    for _ in range(args.rounds):
        own, peer = ours(order, model, args), trl(order, model, args)
        # Ours minus its resident model and libraries; TRL's libraries weigh about the same.
        base = own["peak_rss_mib"] - own["above_model_mib"]
        peer["above_model_mib"] = peer["peak_rss_mib"] - base
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
    sweeps = {
        "rollouts": [2, 4, 8, 16, 32],
        "prompt_tokens": [128, 512, 1024, 2048, 4096],
        "vocabulary": [8192, 32768, 151936],
        "tokens": [32, 64, 128, 256],
    }
    for size, values in sweeps.items():
        for value in values:
            # The longer the responses, the larger the vocabulary that would multiply them.
            large = {"vocabulary": 151936} if size == "tokens" else {}
            settings = {"questions": 4, "rollouts": 4, "tokens": 64, **large, size: value}
            order = Order(**settings)
            model = make_model(order, args.shared, folder / f"{size}{value}")
            print(json.dumps({size: value, **ours(order, model, args)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--orders", nargs="+", default=list(ORDERS), choices=list(ORDERS))
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--trl", default=sys.executable, help="a Python that has trl 1.16")
    parser.add_argument("--repeats", type=int, default=3, help="steps a run")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each system, alternating")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        settings, model, task, repeats = args.one
        order = Order(**json.loads(settings))
        print(json.dumps(run_ours(order, Path(model), Path(task), int(repeats))))
        return
    if not torch.cuda.is_available():
        print("no GPU: CPU part only", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        if args.gpu and torch.cuda.is_available():
            from gpu import run_shapes

            run_shapes(args.shared, Path(folder), args.repeats)
        elif args.growth:
            growth(args, Path(folder))
        else:
            for name in args.orders:
                compare(name, args, Path(folder))


if __name__ == "__main__":
    main()
