"""The configuration that the library is for, on two ranks, with a narrow Qwen3-8B."""

import json

import pytest

from conftest import TESTS, ranks
from models import qwen3_8b_folder

CONFIGS = TESTS.parent / "configs"
SMALL = [
    "--model.policy.chat_template_kwargs={}",
    "--model.sampling.max_new_tokens=6",
    "--model.sampling.n=4",
    "--model.val_sampling.max_new_tokens=6",
    "--model.val_sampling.n=2",
    "--data.train=runs.Toys",
    "--data.val=runs.Toys",
    "--data.val.size=5",
    "--data.questions_per_batch=4",
    "--data.val_questions_per_batch=4",
    "--checkpoint.monitor=val/mean@2",
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=3",
    "--trainer.val_check_interval=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.logger=false",
]


@pytest.fixture(scope="session")
def qwen3_8b(tmp_path_factory):
    return qwen3_8b_folder(tmp_path_factory.mktemp("qwen3-8b"))


def test_qwen3_and_fsdp_2_train_and_validate(qwen3_8b, tmp_path):
    configs = [f"--config={CONFIGS}/qwen3.yaml", f"--config={CONFIGS}/scale/fsdp-2.yaml"]
    policy = f"--model.policy.name_or_path={qwen3_8b}"
    ranks(["-m", "scsdpo"], 2, "fit", *configs, *SMALL, policy, cwd=tmp_path)
    (file,) = tmp_path.rglob("metrics.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert records[-1]["step"] == 3
    assert any("val/mean@2" in record for record in records)
