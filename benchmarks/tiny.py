"""Gain of `make train`: mean@16 on held-out lab questions, before and after, per seed.

    python benchmarks/tiny.py [--seeds 0 1 2] [--config configs/methods/grpo.yaml ...]

Each seed is one run of `scsdpo fit --config configs/tiny.yaml`, in a process of its own, one after
the other; `--config` files are laid over it. Prints one JSON line a seed and a summary: the rise of
mean@16 in points (mean and worst over seeds), and seconds per run, start-up and both validations
included.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def train(seed: int, overlays: list[str], out: Path) -> dict[str, float]:
    """One run; its before and after, as `BeforeAfter` wrote them."""
    configs = [f"--config={path}" for path in (ROOT / "configs" / "tiny.yaml", *overlays)]
    seeds = [f"--{key}={seed}" for key in ("seed_everything", "data.seed", "model.sampling.seed")]
    start = time.perf_counter()
    subprocess.run(
        [
            sys.executable,
            "-m",
            "scsdpo",
            "fit",
            *configs,
            *seeds,
            "--trainer.enable_progress_bar=false",
            f"--trainer.logger.init_args.save_dir={out}",
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (file,) = out.rglob("before_after.json")
    result = json.loads(file.read_text())
    before, after = result["before"]["mean@16"], result["after"]["mean@16"]
    return {
        "seed": seed,
        "before": round(100 * before, 1),
        "after": round(100 * after, 1),
        "rise": round(100 * (after - before), 1),
        "maj_before": round(100 * result["before"]["maj@16"], 1),
        "maj_after": round(100 * result["after"]["maj@16"], 1),
        "steps": result["steps"],
        "seconds": round(time.perf_counter() - start),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--config", action="append", default=[])
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as out:
            rows.append(train(seed, args.config, Path(out)))
        print(json.dumps(rows[-1]), flush=True)
    rises = [row["rise"] for row in rows]
    print(
        json.dumps(
            {
                "mean_rise": round(sum(rises) / len(rises), 1),
                "worst_rise": min(rises),
                "mean_seconds": round(sum(row["seconds"] for row in rows) / len(rows)),
            }
        )
    )


if __name__ == "__main__":
    main()
