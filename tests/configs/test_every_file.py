# ruff: noqa: F811 - a fixture that is imported
"""Every shipped file over every other, and a step of every method: `make test-configs`."""

import os
import re
import sys

import pytest
import yaml

from scsdpo.cli.config_types import arguments
from scsdpo.cli.parser import Parser
from scsdpo.training import PolicyOptimizer
from shared import SHARED, needs_shared
from test_configs import (
    AXES,
    CONFIGS,
    METHODS,
    ROLLOUTS,
    printed,
    scsdpo,  # noqa: F401 - a fixture
    small,
)


# PACED wants a file of rates first: test_offline.py.
@pytest.mark.parametrize(
    "method", [m for m in METHODS if m.stem != "sdpo-paced"], ids=lambda p: p.stem
)
def test_every_method_trains_on_the_tiny_configuration(method, qwen3, scsdpo):
    base = CONFIGS / "tiny.yaml"
    more = ["--data.train.init_args.size=200"]
    if method.stem == "gkd":
        more.append(f"--model.teacher.name_or_path={qwen3}")  # a model of the policy's tokenizer
    assert scsdpo("fit", "--config", base, "--config", method, *small(qwen3), *more) in (0, None)


@pytest.mark.parametrize("axis", AXES)
def test_a_method_over_any_other_leaves_nothing_of_it(axis):
    """Same-named init_args carry over when a class is swapped: a method file states them all.

    Axis by axis, for they do not meet: every value that some method gives to it, over every other.
    """
    parser = Parser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument(f"--{axis}", type=arguments(PolicyOptimizer)[axis])
    stated = [yaml.safe_load(method.read_text())["model"][axis] for method in METHODS]
    values = list(dict.fromkeys(yaml.safe_dump({axis: value}) for value in stated))

    def parsed(*layers):
        layered = [f"--config={layer}" for layer in layers]
        config = parser.parse_args(layered, defaults=False).as_dict()
        return without_empty(config[axis])

    def without_empty(value):
        if isinstance(value, dict):
            kept = {k: v for k, v in value.items() if (k, v) != ("init_args", {})}
            return {k: without_empty(v) for k, v in kept.items()}
        return [without_empty(v) for v in value] if isinstance(value, list) else value

    for above in values:
        alone = parsed(above)
        for below in values:
            assert parsed(below, above) == alone, (below, above)


@pytest.mark.parametrize("base", ["tiny", "qwen3", "qwen3-lora", "olmo3"])
def test_a_rollout_over_any_other_leaves_nothing_of_it(base, scsdpo, capsys):
    base_args = ("--config", CONFIGS / f"{base}.yaml")
    alone = {r: printed(scsdpo, capsys, *base_args, "--config", r)["model"] for r in ROLLOUTS}
    assert len(ROLLOUTS) == 4
    for below in ROLLOUTS:
        for above in ROLLOUTS:
            args = (*base_args, "--config", below, "--config", above)
            assert printed(scsdpo, capsys, *args)["model"] == alone[above], (below, above)


@needs_shared
def test_qwen3_runs_unchanged_on_real_biology_with_a_local_model(tmp_path, scsdpo):
    """The command of the configuration's header, a small random Qwen3 in place of the 8B."""
    import subprocess

    model = tmp_path / "model"
    maker = [sys.executable, SHARED / "bench" / "make_model.py", model, "--vocab", "1024"]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    subprocess.run(
        [*map(str, maker), "--hidden", "64", "--layers", "1", "--eos-rate", "0.2"],
        check=True,
        env=environment,
        capture_output=True,
    )
    biology = SHARED / "data" / "sciknoweval" / "biology"
    code = scsdpo(
        "fit",
        "--config",
        CONFIGS / "qwen3.yaml",
        f"--model.policy.name_or_path={model}",
        f"--data.train.source={biology}",
        f"--data.val.source={biology}",
        "--trainer.limit_train_batches=3",
        "--trainer.max_epochs=1",
        "--trainer.val_check_interval=3",
        "--trainer.enable_progress_bar=false",
    )
    assert code in (0, None)
    assert list(tmp_path.glob("runs/qwen3/*/checkpoints/*.ckpt"))


@pytest.mark.parametrize(
    ("base", "devices", "memory"),
    [("qwen3-lora", 1, 80), ("qwen3-qlora-24gb", 1, 24), ("qwen3", 8, 80), ("olmo3", 8, 80)],
)
def test_the_seconds_that_a_file_gives_to_decoding_are_those_of_plan(
    base, devices, memory, scsdpo, capsys
):
    text = (CONFIGS / f"{base}.yaml").read_text()
    head = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    seconds = r"([\d.]+) \(([\d.]+)\) of (?:a batch's )?([\d.]+) \(([\d.]+)\)"
    said = [re.search(f"{name} (?:samples )?for {seconds}", head) for name in ("HFRollout", "vLLM")]
    assert said[0] and (said[1] or "there is no room" in head)
    more = float(re.search(r"takes ([\d.]+) GiB more", head)[1])
    words = [f"--config={CONFIGS / base}.yaml", f"--gpus={devices}", f"--memory={memory}"]
    words += ["--prompt-tokens=200", "--teacher-tokens=600"]
    if devices > 1:
        words.append(f"--config={CONFIGS / 'scale' / 'fsdp-8.yaml'}")
    vllm = f"--config={CONFIGS / 'rollouts' / 'vllm-colocate.yaml'}"
    for given, rollout in zip(said, ([], [vllm]), strict=True):
        found = []
        for tokens in (300, 2048):
            capsys.readouterr()
            assert scsdpo("plan", *words, *rollout, f"--response-tokens={tokens}") in (0, None)
            out = capsys.readouterr().out
            assert ("Does not fit" in out) == (given is None)
            found.append([_last(out, row) for row in ("sampling", "step")])
        (sampling, step), (of_long, step_of_long) = found
        if given:
            assert [float(x) for x in given.groups()] == [sampling, of_long, step, step_of_long]
    assert _last(out, "vLLM, awake", column=1) == pytest.approx(more, abs=0.051)


def _last(out, row, column=-1):
    """A number of the table's row of that name."""
    line = [line for line in out.splitlines() if re.match(rf"\W*{row}\b.*\d", line)][-1]
    return float([part for part in re.split(r"\s{2,}|│", line) if part.strip()][column])
