"""vLLM in each of two ranks: one engine a rank or one for both, whatever the trainer does."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import fields
from itertools import combinations, product
from pathlib import Path

import pytest
from ranks import CASES, SECONDS, Case

from models import olmo3_folder, qwen3_folder
from precision import allowed_in_a_run
from test_fit import CONFIGS, SHORT, stop_above

HERE = Path(__file__).parent
FACTORS = [field.name for field in fields(Case) if field.name != "seen"]


def test_the_cases_cover_every_pair_of_values():
    values = {name: sorted({getattr(case, name) for case in CASES.values()}) for name in FACTORS}
    assert values["model"] == ["sliding", "tied", "untied"]
    for a, b in combinations(FACTORS, 2):
        met = {(getattr(case, a), getattr(case, b)) for case in CASES.values()}
        assert met == set(product(values[a], values[b])), (a, b)


def torchrun(*arguments, folder):
    """Two processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join(
        [str(HERE), str(HERE.parent / "helpers"), os.environ.get("PYTHONPATH", "")]
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *launcher, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=SECONDS + 60,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of two ranks that went through everything."""
    folder = tmp_path_factory.mktemp("ranks")
    qwen3_folder(folder / "tied")
    qwen3_folder(folder / "untied", tie=False)
    olmo3_folder(folder / "sliding")
    torchrun(HERE / "ranks.py", folder, *CASES, folder=folder)
    return folder


@pytest.fixture(scope="module")
def seen(folder):
    """What each case's ranks saw: name -> one of each rank."""
    return {
        name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(2)]
        for name in CASES
    }


@pytest.fixture(params=CASES)
def case(request, seen):
    return CASES[request.param], seen[request.param]


def test_sampled_log_probs_are_the_trainers_at_every_step(case):
    made, ranks = case
    for rank, saw in enumerate(ranks):
        # Three steps, and the batches of an evaluation, of which rank 0 has one more.
        assert len(saw["excess"]) == 5 - rank
        assert max(saw["excess"]) < 1
        assert max(saw["excess"]) > 0 or (made.empty and rank == 1)


def test_ranks_call_weights_by_the_same_label_and_each_step_by_another(case):
    _, ranks = case
    first, second = (saw["versions"] for saw in ranks)
    assert first[:4] == second[:4]
    assert len(set(first[:3])) == 3 and len(set(first[2:])) == 1


def test_what_one_rank_refuses_or_fails_at_is_an_error_on_both(case):
    made, ranks = case
    first, second = (saw["errors"] for saw in ranks)
    long = "a prompt and its response may take 151 tokens, but vLLM has room for 128: raise "
    if made.refuses:
        for saw in (first, second):
            assert [kind for kind, _ in saw[:2]] == ["ConfigurationError"] * 2
            assert all(long in said for _, said in saw[:2])
        if made.tensor_parallel == 1:
            assert second[2][0] == "ZeroDivisionError"
            assert first[2] == ["RuntimeError", f"rank 1: ZeroDivisionError: {second[2][1]}"]
    if made.tensor_parallel == 2:
        assert first[-1] == second[-1]
        assert first[-1][0] == "TrainingStopped" and "its responses would be wrong" in first[-1][1]
    assert (
        len(first)
        == len(second)
        == 3 * made.refuses + (not made.refuses) * (made.tensor_parallel - 1)
    )


def test_ranks_with_unequal_numbers_of_questions_evaluate_with_one_engine(folder):
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [(line["key"], line["sample"]) for line in lines] == [
        (f"toy/{i}", sample) for i in range(5) for sample in range(2)
    ]


RUNS = {
    "DDP, an engine of both": ("ddp.yaml", 2),
    "shards, an engine each": ("fsdp-2.yaml", 1),
}


@pytest.mark.parametrize(("way", "tensor_parallel"), RUNS.values(), ids=RUNS)
def test_a_whole_run_on_two_ranks(tmp_path, policy, way, tensor_parallel):
    """With validation, whose last batch is of fewer questions than ranks."""
    engine = "--model.rollout.init_args.engine.init_args"
    mean, largest = allowed_in_a_run(policy)
    names = ("tiny.yaml", f"scale/{way}", "rollouts/vllm-colocate.yaml")
    torchrun(
        *("--module", "scsdpo", "fit"),
        *(argument for name in names for argument in ("--config", CONFIGS / name)),
        *SHORT,
        *stop_above(mean),
        *("--trainer.accelerator=cpu", "--trainer.devices=2"),
        *("--trainer.limit_train_batches=3", "--trainer.limit_val_batches=2"),
        *("--data.val.init_args.size=5", "--data.val_questions_per_batch=4"),
        *(f"{engine}.max_model_len=512", f"{engine}.kv_cache_gib=0.25"),
        *(f"{engine}.enforce_eager=true", f"{engine}.tensor_parallel={tensor_parallel}"),
        folder=tmp_path,
    )
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/logprob_gap")]
    assert len(rows) == 3
    assert max(float(row["train/logprob_gap_max"]) for row in rows) < largest
