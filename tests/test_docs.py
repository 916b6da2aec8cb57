"""The code in README and docs runs as printed."""

import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def test_every_file_that_the_docs_name_exists():
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)
        for target in re.findall(
            r"(?:configs|benchmarks|tests)/[\w/-]+\.(?:yaml|py)", page.read_text()
        ):
            assert (ROOT / target).exists(), (page.name, target)


def test_the_strategies_of_extending_train_from_the_command_line(tmp_path, monkeypatch, qwen3):
    from scsdpo.__main__ import main

    (tmp_path / "mine.py").write_text("\n".join(blocks("docs/extending.md", "python")))
    (text,) = [text for text in blocks("docs/extending.md", "yaml") if "mine.Contains" in text]
    data = yaml.safe_load(text)
    for split in ("train", "val"):
        (tmp_path / f"{split}.jsonl").write_text(
            "\n".join(f'{{"prompt": "{split} {i}?", "answer": "{i}"}}' for i in range(4))
        )
    config = {
        "model": {
            "policy": {"name_or_path": str(qwen3)},
            "teacher": {"class_path": "EMA", "init_args": {"context": "mine.GoldAnswer"}},
            "weighting": {"class_path": "mine.MiddleBand", "init_args": {"low": 0.0, "high": 1.0}},
            "advantage": {
                "class_path": "Blend",
                "init_args": {
                    "parts": [
                        {"advantage": "SelfDistillation", "weight": 1.0},
                        {"advantage": "mine.Curiosity", "weight": 1.0},
                    ]
                },
            },
            "sampling": {"n": 2, "max_new_tokens": 4},
            "val_sampling": {"n": 2, "max_new_tokens": 4},
        },
        "trainer": {"max_epochs": 1, "enable_progress_bar": False, "accelerator": "cpu"},
        "data": data["data"] | {"questions_per_batch": 2},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["scsdpo", "fit", "--config", "config.yaml"])
    assert main() in (0, None)


def test_the_tutorial_makes_a_task_of_20_lines_of_python_and_6_of_yaml(tmp_path, monkeypatch):
    from scsdpo.__main__ import main

    for language, suffix, most in (("python", "py", 20), ("yaml", "yaml", 6)):
        head = f"# sums.{suffix}\n"
        (text,) = [b for b in blocks("docs/extending.md", language) if b.startswith(head)]
        assert len([line for line in text.removeprefix(head).splitlines() if line]) <= most
        (tmp_path / f"sums.{suffix}").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    short = ["--trainer.limit_train_batches=2", "--trainer.enable_progress_bar=false"]
    short += ["--data.val.size=4", "--model.val_sampling.n=2", "--trainer.accelerator=cpu"]
    configs = ["--config", str(ROOT / "configs" / "tiny.yaml"), "--config", "sums.yaml"]
    monkeypatch.setattr(sys, "argv", ["scsdpo", "fit", *configs, *short])
    assert main() in (0, None)
    (result,) = tmp_path.glob("runs/tiny/*/before_after.json")
    assert "mean@2" in result.read_text()


@pytest.mark.parametrize("name", ["README.md"])
def test_python_of_the_readme_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(name, "python")
    code = code.replace("L.Trainer(", 'L.Trainer(accelerator="cpu", enable_progress_bar=False, ')
    exec(compile(code.replace("max_steps=10", "max_steps=1"), name, "exec"), {})


def test_python_of_runs_md_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/pass_rate": 0.5}\n')
    record, figure, batch = blocks("docs/runs.md", "python")
    scope = {}
    for code in (record, figure, batch):
        exec(compile(code, "docs/runs.md", "exec"), scope)
    assert scope["pass_rates"] == [(1, 0.5)]
    assert scope["trace"].credit.shape == scope["batch"].rollouts.mask.shape
    assert "nan" in capsys.readouterr().out


def test_every_figure_of_a_run_is_in_the_table_of_runs_md(qwen3, tmp_path):
    from runs import data, module, trainer

    table = (ROOT / "docs/runs.md").read_text()
    run = trainer(tmp_path)
    run.fit(module(qwen3), data())
    for name in run.callback_metrics:
        if name.startswith("train/"):
            *_, last = name.removeprefix("train/").split("/")
            spelled = last.replace("logprob_gap_max", "_max")
            assert f"`{spelled}`" in table or f"/{spelled}`" in table, name
