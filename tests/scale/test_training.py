"""Two and four ranks, weights whole or in shards, train as one process does: `make test-scale`."""

import json
import os

import pytest
import torch
from world import CONFIGURATIONS

from conftest import HERE, ranks

KINDS = ["fsdp-2", "ddp-2", "fsdp-4", "ddp-4"]
SHARE = KINDS[:1]
"""What CI runs: SCALE=share."""


CHOSEN = SHARE if os.environ.get("SCALE") == "share" else KINDS


@pytest.fixture(scope="session")
def world(folders, tmp_path_factory):
    """The folder of a kind of world, in which every configuration was trained."""
    done = {}

    def trained(kind):
        if kind not in done:
            done[kind] = tmp_path_factory.mktemp(kind)
            ranks([HERE / "world.py"], int(kind[-1]), folders, done[kind], kind, *CONFIGURATIONS)
        return done[kind]

    return trained


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("kind", CHOSEN)
def test_ranks_train_as_one(world, kind, name):
    one, many = world("one-1") / name, world(kind) / name
    # AdamW divides by small numbers. An embedding's B begins near 1, so that its A moves 30 times
    # as far as the other weights do.
    # Of a base in bf16 all forwards agree to the bit, and gradients to that rounding.
    tolerance = 1e-5 if "adamw" in name else 3e-5 if "ends" in name or "bf16 base" in name else 1e-6
    expected, weights = torch.load(one / "weights.pt"), torch.load(many / "weights.pt")
    assert weights.keys() == expected.keys()
    for key, value in expected.items():
        assert (weights[key] - value).abs().max() <= tolerance, key
    records, wanted = figures(many), figures(one)
    assert len(records) == len(wanted)
    assert any("val/mean@2" in record for record in wanted)
    for record, of_one in zip(records, wanted, strict=True):
        assert record.keys() == of_one.keys()
        for key, value in of_one.items():
            # Gaps are the rounding of two forwards and nothing else: of a base in bf16, hundredths.
            rounding = 2e-2 if "bf16 base" in name else 1e-5
            least = rounding if "logprob_gap" in key else tolerance
            assert record[key] == pytest.approx(value, rel=10 * tolerance, abs=least), key


def figures(folder):
    """All that was logged but times and memory."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {
            k: v
            for k, v in json.loads(line).items()
            if k not in ("time", "train/memory") and "/seconds" not in k
        }
        for line in lines
    ]


def evaluated(folders, out, kind):
    ranks([HERE / "evaluation.py"], int(kind[-1]), folders, out, kind)
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    told = sorted(lines, key=lambda line: (line["key"], line["response"]))
    return json.loads((out / "figures.json").read_text()), [drop(line, "seconds") for line in told]


def drop(record, name):
    return {key: value for key, value in record.items() if name not in key}


@pytest.fixture(scope="session")
def of_one(folders, tmp_path_factory):
    return evaluated(folders, tmp_path_factory.mktemp("one"), "one-1")


@pytest.mark.parametrize("kind", CHOSEN)
def test_ranks_validate_test_and_predict_as_one(folders, tmp_path, kind, of_one):
    figures, told = evaluated(folders, tmp_path, kind)
    assert len(told) == 15
    assert told == of_one[1]
    assert len(figures) == 2
    for mine, wanted in zip(figures, of_one[0], strict=True):
        assert mine == pytest.approx(wanted)
