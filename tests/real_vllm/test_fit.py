"""Whole runs of `scsdpo fit` on the tiny task, with the shipped configurations of vLLM."""

import contextlib
import csv
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from precision import allowed_in_a_run
from scsdpo.__main__ import main
from scsdpo.rollout.servers.server import Unreachable

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SHORT = (
    "--trainer.limit_train_batches=6",
    "--trainer.num_sanity_val_steps=1",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
    "--trainer.logger.save_dir=.",
    "--data.questions_per_batch=8",
    "--data.val_questions_per_batch=16",
    "--model.val_sampling.n=2",
    "--model.optimizer.lr=1e-3",  # far enough a step that old weights would show
)
ENGINE = "--model.rollout.init_args.engine.init_args"
IN_PROCESS = (
    f"{ENGINE}.max_model_len=512",
    f"{ENGINE}.kv_cache_gib=0.5",
    f"{ENGINE}.enforce_eager=true",
)


@pytest.fixture
def limit(policy):
    """Mean gap in nats that is allowed in a run of the tiny policy."""
    mean, _ = allowed_in_a_run(policy)
    return mean


def stop_above(limit):
    return f"--model.gap.warn={limit}", f"--model.gap.stop={limit}"


@pytest.fixture
def fit(monkeypatch, tmp_path, limit):
    monkeypatch.chdir(tmp_path)

    def run(rollout, *args):
        files = ["--config", CONFIGS / "tiny.yaml", "--config", CONFIGS / "rollouts" / rollout]
        monkeypatch.setattr(
            sys, "argv", ["scsdpo", "fit", *map(str, (*files, *SHORT, *stop_above(limit), *args))]
        )
        return main()

    return run


def logged_gaps(folder):
    (path,) = folder.rglob("metrics.csv")
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/logprob_gap")]
    return [float(row["train/logprob_gap"]) for row in rows]


def test_a_run_with_vllm_in_process(fit, tmp_path, limit):
    assert fit("vllm-colocate.yaml", *IN_PROCESS) == 0
    gaps = logged_gaps(tmp_path)
    assert len(gaps) == 6 and max(gaps) < limit


def test_a_lora_run_whose_adapter_goes_over_alone(fit, tmp_path, limit):
    code = fit(
        "vllm-colocate.yaml",
        *IN_PROCESS,
        f"{ENGINE}.adapter=alone",
        "--model.policy.adapter=Lora",
        "--model.optimizer.lr=1e-2",
    )
    assert code == 0
    gaps = logged_gaps(tmp_path)
    assert len(gaps) == 6 and max(gaps) < limit


def urls(servers):
    listed = ", ".join(server.url for server in servers)
    return f"{ENGINE}.urls=[{listed}]"


def test_a_run_with_servers_over_http(fit, tmp_path, limit, two_servers):
    first = [server.version for server in two_servers]
    assert fit("vllm-server.yaml", urls(two_servers)) == 0
    gaps = logged_gaps(tmp_path)
    assert len(gaps) == 6 and max(gaps) < limit
    last = [server.version for server in two_servers]
    assert last[0] == last[1] != first[0]


TWO_RANKS = {
    "ddp": ("--trainer.devices=2", "--trainer.strategy=ddp"),
    "shards": ("--config", CONFIGS / "scale/fsdp-2.yaml"),
}


@pytest.mark.parametrize("strategy", TWO_RANKS.values(), ids=TWO_RANKS)
def test_two_ranks_share_the_servers_and_the_weights_that_rank_0_brings(
    tmp_path, limit, two_servers, strategy
):
    command = [sys.executable, "-W", "ignore", "-m", "scsdpo", "fit"]
    files = ["--config", CONFIGS / "tiny.yaml", "--config", CONFIGS / "rollouts/vllm-server.yaml"]
    ranks = [*strategy, "--trainer.accelerator=cpu"]
    done = subprocess.run(
        [*map(str, (*command, *files, *SHORT, *stop_above(limit), *ranks, urls(two_servers)))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    gaps = logged_gaps(tmp_path)
    assert len(gaps) == 6 and max(gaps) < limit


def test_a_run_goes_on_with_the_other_server_when_one_is_killed(fit, tmp_path, limit, two_servers):
    victim = two_servers[1]
    before = victim.version

    def kill_after_two_updates():
        seen = {before}
        while len(seen) < 4:  # "loading ..." counts as well: the first update is done
            with contextlib.suppress(Unreachable):
                seen.add(victim.version)
        victim.kill()

    watcher = threading.Thread(target=kill_after_two_updates)
    watcher.start()
    try:
        assert fit("vllm-server.yaml", urls(two_servers)) == 0
        watcher.join()
    finally:
        victim.kill()
        victim.start()
        victim.wait()
    gaps = logged_gaps(tmp_path)
    assert len(gaps) == 6 and max(gaps) < limit


def test_the_run_ends_with_one_line_that_names_the_servers_when_all_are_gone(
    fit, two_servers, capsys
):
    victim = two_servers[1]
    victim.kill()
    patience = f"{ENGINE}.patience=3"
    try:
        code = fit("vllm-server.yaml", urls([victim]), patience)
    finally:
        victim.start()
        victim.wait()
    assert code == 3
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("scsdpo: error: no vLLM server could be used for 3")
    assert f"({victim.url}: /collective_rpc: " in last


AHEAD = (
    "--model.ahead.batches=2",
    "--trainer.limit_train_batches=10",
    "--checkpoint.save_last=true",
    "--trainer.limit_val_batches=0",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.default_root_dir=run",
    "--trainer.logger=false",
)


def figures(folder):
    (path,) = folder.rglob("metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["batch"]: line for line in lines if "train/age_batches_max" in line}


@pytest.mark.parametrize("strategy", [(), *TWO_RANKS.values()], ids=["one", *TWO_RANKS])
def test_the_bound_on_age_holds_under_a_slow_a_killed_server_a_stop_and_a_resume(
    tmp_path, limit, two_servers, strategy
):
    """One server is stopped for a while, killed and started again; the run is ended by SIGTERM, and
    goes on with one rank.
    """
    command = [sys.executable, "-W", "ignore", "-m", "scsdpo", "fit"]
    files = ["--config", CONFIGS / "tiny.yaml", "--config", CONFIGS / "rollouts/vllm-server.yaml"]
    own = (*SHORT, *AHEAD, *stop_above(limit), urls(two_servers), "--trainer.accelerator=cpu")
    alone = [*map(str, (*command, *files, *own))]
    words = [*map(str, (*command, *files, *strategy, *own))]
    victim = two_servers[1]

    def wait(run, batch):
        deadline = time.monotonic() + 300
        while not any(tmp_path.rglob("metrics.jsonl")) or max(figures(tmp_path), default=0) < batch:
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)

    with (tmp_path / "output.txt").open("w") as output:
        run = subprocess.Popen(words, cwd=tmp_path, stdout=output, stderr=output)
        try:
            wait(run, 1)
            victim.signal(signal.SIGSTOP)
            wait(run, 2)
            victim.signal(signal.SIGCONT)
            wait(run, 3)
            victim.kill()
            wait(run, 4)
            run.terminate()
            assert run.wait(120) == 143, (tmp_path / "output.txt").read_text()[-3000:]
        finally:
            run.kill()
            victim.kill()
            victim.start()
            victim.wait()
    (last,) = tmp_path.rglob("last.ckpt")
    done = subprocess.run(
        [*alone, f"--ckpt_path={last}"], cwd=tmp_path, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = figures(tmp_path)
    assert sorted(seen) == list(range(1, 11))
    assert all(each["train/age_batches_max"] <= 2 for each in seen.values())
    assert seen[1]["train/logprob_gap"] < limit
    assert seen[10]["train/age_batches"] > 0 and seen[10]["train/logprob_drift"] < 1
