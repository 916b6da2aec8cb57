"""Two processes give the numbers of one, whatever each of them has to run."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers.models.qwen3 import modeling_qwen3

from batches import METHODS, double_policy, exact_norm, gradient, parts

SCRIPT = Path(__file__).parents[1] / "helpers" / "two_ranks.py"
SHARE = Path(__file__).parents[1] / "helpers" / "rank_gradient.py"


def train(folder, world, out, method, root=None):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    root = folder if root is None else root
    command = [sys.executable, SCRIPT, folder, str(world), out, method, root]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(out, weights_only=False)


def remembered(state):
    """Of a pool the questions in it; of anything else all."""
    return [group[0]["prompts"]["key"] for group in state["groups"]] if "groups" in state else state


@pytest.fixture(scope="module")
def one(qwen3, tmp_path_factory):
    """What one process makes of a method."""
    return cache(lambda method: train(qwen3, 1, tmp_path_factory.mktemp("one") / "out.pt", method))


@pytest.mark.parametrize(
    ("method", "world"),
    [
        *(("sc-sdpo", "2"), ("sc-sdpo", "2s"), ("grpo", "2"), ("memory", "2"), ("qlora", "2")),
        *(("episodes", "2"), ("episodes", "2s"), ("ahead", "2")),
    ],
)
def test_two_processes_train_as_one(one, qwen3, tmp_path, method, world):
    one, steps, logged = one(method)
    two, steps_two, logged_two = train(qwen3, world, tmp_path / "two.pt", method)
    assert steps == steps_two > 3
    for name, value in one.items():
        if name.endswith("remembered"):
            assert remembered(two[name]) == remembered(value), name
            continue
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=name)
    turns = {name for name in logged if "turn" in name}
    assert bool(turns) == (method == "episodes")
    figures = ("train/loss", "train/pass_rate", "train/gradient_norm", "val/mean@2", "val/maj@2")
    for name in (*figures, *turns):
        assert logged_two[name] == pytest.approx(logged[name], rel=1e-3, abs=1e-5), name


def test_every_figure_is_that_of_the_whole_batch_whatever_the_number_of_ranks(qwen3, tmp_path):
    """Seven validation questions are seven questions on 1, 2 and 3 ranks."""
    records = []
    for world in (1, 2, 3):
        folder = tmp_path / f"{world}"
        folder.mkdir()
        train(qwen3, world, folder / "out.pt", "metrics", root=folder)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        records.append([json.loads(line) for line in lines])
    asked = [
        [q["key"] for q in json.loads(file.read_text())["questions"]]
        for file in sorted(tmp_path.glob("*/evaluations/val-3.json"))
    ]
    assert asked == [[f"toy/{i}" for i in range(7)]] * 3  # in order, each once
    one = records[0]
    assert len(one) == 6 and "val/mean@2" in one[2] and one[-1]["train/effective_questions"] > 1
    for many in records[1:]:
        for record, expected in zip(many, one, strict=True):
            assert record.keys() == expected.keys()
            for name in expected.keys() - {"time"}:
                if not name.startswith(("train/seconds", "train/memory")):
                    assert record[name] == pytest.approx(expected[name], rel=1e-4, abs=2e-6), name
    for world in ("2", "3"):
        for folder in ("rollouts", "tokens"):
            assert_same_records(tmp_path / "1" / folder, tmp_path / world / folder)


FLEETING = {"run", "version"}
"""Of a response: the folder's name, and a digest that the last bit of a weight changes."""


def assert_same_records(one, many):
    """The same files with the same responses, chosen and traced alike."""
    files = sorted(path.name for path in one.iterdir())
    assert files == sorted(path.name for path in many.iterdir()) and len(files) >= 1
    for name in files:
        expected, found = (
            [json.loads(line) for line in (folder / name).read_text().splitlines()]
            for folder in (one, many)
        )
        assert len(expected) == len(found) > 0
        for a, b in zip(expected, found, strict=True):
            assert a.keys() == b.keys()
            for key in a.keys() - FLEETING - {"top_ids", "vocabulary"}:
                assert_close(a[key], b[key], key)


def assert_close(a, b, key):
    if isinstance(a, list) and not key.startswith("top_"):
        assert len(a) == len(b), key
        for x, y in zip(a, b, strict=True):
            assert_close(x, y, key)
    elif isinstance(a, float):
        assert b == pytest.approx(a, rel=1e-3, abs=2e-5), key
    elif not key.startswith("top_"):
        assert a == b, key


def step(folder, out, method, split, norm):
    """(loss, gradients, micro-batches by rank) of one step, its questions shared out."""
    shares = split.split("/")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(len(shares))}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", SHARE, folder, out, method, split, norm],
            env={**environment, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(len(shares))
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors[-2000:]
    saved = [torch.load(f"{out}.{rank}") for rank in range(len(shares))]
    return saved[0][0], saved[0][1], [micro for _, _, micro in saved]


@pytest.mark.parametrize(
    ("method", "split", "norm", "tolerance"),
    [
        ("sc-sdpo", "0,3/1,2", "exact", 1e-12),
        ("hybrid+anchor+entropy", "0,1/2,3", "exact", 1e-12),
        ("sc-sdpo", "0,3/1,2", "", 1e-6),
    ],
)
def test_ranks_share_a_step_as_one_rank_does_it_also_with_nothing_to_run(
    qwen3, tmp_path, method, split, norm, tolerance, monkeypatch
):
    """Question 1 has no success and question 2 nothing else: a rank of these runs no forward.

    What is a fork depends on both ranks' entropies.
    """
    if norm == "exact":
        monkeypatch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", exact_norm)
    policy = double_policy(qwen3)
    advantage, settings = METHODS[method]()
    loss, expected, _ = gradient(policy, *parts(policy, advantage, **settings))
    two_loss, gradients, micro = step(qwen3, tmp_path / "two", method, split, norm)
    assert method != "sc-sdpo" or (micro[0] > 0 == micro[1])
    assert two_loss == pytest.approx(loss, rel=tolerance)
    scale = max(grad.abs().max() for grad in expected.values())
    for name, grad in expected.items():
        assert (gradients[name] - grad).abs().max() <= tolerance * scale, name
