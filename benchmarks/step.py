"""One SDPO update, side by side with TRL's SDPOTrainer on the same work orders.

    python benchmarks/step.py [--orders A A2 B C E] [--order JSON] [--trl PYTHON] [--repeats 3]
    python benchmarks/step.py --growth [rollouts prompt_tokens tokens budget vocabulary]

Both systems run in processes of their own, alternating, with the same number of threads. Prints
one JSON line a run and, per order, the ratios TRL / ours of update seconds (medians) and of peak
memory above the resident model and libraries. `--order` takes one more order, e.g.
'{"questions": 5, "rollouts": 6, "tokens": 200}' (fields of `work_order.Order`).
`share_of_products` is the part of our update's time that its matrix products would take at the
machine's own rate (a 2,048-square product) if each distinct token ran once. `--growth` prints how
our update's time and memory grow along one size at a time. Everything runs on the CPU;
`benchmarks/gpu.py` measures on a GPU.
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

from work_order import ORDERS, Order, make_model, run_ours

ROOT = Path(__file__).resolve().parents[1]
SWEEPS = {
    "rollouts": ({}, [2, 4, 8, 16, 32]),
    "prompt_tokens": ({}, [128, 512, 1024, 2048, 4096]),
    "tokens": ({}, [64, 128, 256, 512, 1024, 2048]),
    "budget": (asdict(ORDERS["E"]), [2048, 4096, 8192, 16384]),
    "vocabulary": ({}, [8192, 32768, 151936]),
}
"""By size that varies: what else is not as in the smallest order, and its values."""


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


def compare(name: str, order: Order, args: argparse.Namespace, folder: Path) -> None:
    """Alternate the two systems, then print the ratios of the medians."""
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
    for size in args.growth or SWEEPS:
        settings, values = SWEEPS[size]
        for value in values:
            order = Order(**{"questions": 4, "rollouts": 4, "tokens": 64, **settings, size: value})
            model = make_model(order, args.shared, folder / f"{size}{value}")
            print(json.dumps({size: value, **ours(order, model, args)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--orders", nargs="*", default=list(ORDERS), choices=list(ORDERS))
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--trl", default=sys.executable, help="a Python that has trl 1.16")
    parser.add_argument("--repeats", type=int, default=3, help="steps a run")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each system, alternating")
    parser.add_argument("--order", type=json.loads, help="fields of one more order")
    parser.add_argument("--growth", nargs="*", choices=list(SWEEPS), help="along which sizes; all")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        settings, model, task, repeats = args.one
        order = Order(**json.loads(settings))
        print(json.dumps(run_ours(order, Path(model), Path(task), int(repeats))))
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.growth is not None:
            growth(args, Path(folder))
        else:
            orders = {name: ORDERS[name] for name in args.orders}
            if args.order:
                orders["given"] = Order(**args.order)
            for name, order in orders.items():
                compare(name, order, args, Path(folder))


if __name__ == "__main__":
    main()
