"""Fixtures of tests that train on several ranks: policies, and worlds that are started once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from expert_models import expert_folder
from models import larger_folder, lfm2_folder, olmo3_folder, qwen3_5_folder, qwen3_folder

HERE = Path(__file__).parent
TESTS = HERE.parent


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("policies")
    qwen3_folder(root / "tied")
    qwen3_folder(root / "untied", tie=False)
    olmo3_folder(root / "olmo3")
    larger_folder(root / "larger")
    qwen3_5_folder(root / "qwen3_5")
    lfm2_folder(root / "lfm2")
    expert_folder(root / "experts", "qwen3_moe")
    expert_folder(root / "gpt_oss", "gpt_oss")
    return root


def ranks(program, world, *arguments, cwd=None, seconds=1200):
    """Run a program of this folder, or a module, as so many processes, and wait for them."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    path = os.pathsep.join(
        [str(TESTS / "helpers"), str(TESTS / "policy"), os.environ.get("PYTHONPATH", "")]
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-W", "ignore", *launcher, *program, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, done.stderr[-4000:]
