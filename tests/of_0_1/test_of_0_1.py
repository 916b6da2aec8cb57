# ruff: noqa: F811 - a fixture that is imported
"""What version 0.1 wrote works on, or one line says what to write instead."""

import json
from pathlib import Path

import pytest
import torch

from scsdpo.cli.config_errors import _REMOVED
from test_configs import scsdpo  # noqa: F401 - a fixture

OF_0_1 = Path(__file__).parent
CATALOG = Path(__file__).resolve().parents[2] / "src" / "scsdpo" / "cli" / "catalog.json"


@pytest.mark.parametrize("case", ["plain", "pool"])
def test_a_run_of_0_1_goes_on_with_the_batches_that_it_would_have_had(case, scsdpo, tmp_path):
    """`plain` remembers demonstrations and pass rates, and has a teacher that follows; `pool` is
    amid filling its pool, from which it takes a step two batches later.
    """
    given = ("--config", OF_0_1 / f"{case}.yaml", "--ckpt_path", OF_0_1 / f"{case}.ckpt")
    assert scsdpo("fit", *given, "--trainer.max_epochs=2") in (0, None)
    run = tmp_path / "runs" / "tiny" / "version_0"
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = [json.loads(line) for line in (OF_0_1 / f"{case}.jsonl").read_text().splitlines()]
    assert [line["batch"] for line in expected] == [3, 4]
    assert expected[-1]["step"] - expected[0]["step"] == 1
    for theirs, ours in zip(expected, found[-2:], strict=True):
        assert theirs == pytest.approx({name: ours[name] for name in theirs}, rel=1e-4, abs=1e-6)
    before, after = (
        torch.load(path, weights_only=True)["state_dict"]
        for path in (OF_0_1 / f"{case}.ckpt", run / "checkpoints" / "last.ckpt")
    )
    assert before.keys() == after.keys()


def test_every_argument_of_0_1_is_there_or_named_with_what_to_write_instead():
    now = json.loads(CATALOG.read_text())["classes"]
    gone = set()
    for path, names in json.loads((OF_0_1 / "arguments.json").read_text()).items():
        assert path in now, path
        there = now[path]["arguments"]
        gone |= {(path.rpartition(".")[2], name) for name in names if name not in there}
    assert gone == _REMOVED.keys()


@pytest.mark.parametrize(
    "words",
    [
        ["--config", "written.yaml"],
        ["--model.token_weighting=Overlong", "--model.token_weighting.cap=64"],
    ],
)
def test_an_argument_that_is_gone_is_refused_with_what_to_write_instead(words, scsdpo, capsys):
    Path("written.yaml").write_text(
        "model:\n  token_weighting: {class_path: Overlong, init_args: {cap: 64}}\n"
    )
    assert scsdpo("fit", "--config", OF_0_1 / "plain.yaml", *words) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "scsdpo: error: model.token_weighting.cap: Overlong has no such argument any more: "
        "remove it. The class now sees for each response whether it reached its length limit"
    )
