"""A job that SLURM takes back is requeued, and goes on by itself."""

import pytest
from stopping import last, same_end, send, wait_for

JOB = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NAME": "study",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_JOB_NUM_NODES": "1",
}


@pytest.mark.parametrize(("signum", "requeued"), [(10, True), (15, False)])
def test_the_checkpoint_is_the_one_that_lightnings_requeue_finds(
    signum, requeued, commands, undisturbed, tmp_path
):
    """SLURM requeues a preempted job by itself, and not one whose time is over."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(f"#!/bin/sh\necho $@ > {tmp_path}/requeued\n")
    (tools / "scontrol").chmod(0o755)
    job = {"environment": JOB | {"PATH": f"{tools}:/usr/bin:/bin"}}
    process = commands.begin(tmp_path, **job)
    wait_for(tmp_path, "sampling", times=6)
    send(process, signum)
    assert commands.end() == 143, (tmp_path / "err").read_text()
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 17\n"
    assert (tmp_path / "runs" / "hpc_ckpt_1.ckpt").resolve() == last(tmp_path).resolve()
    assert commands.run(tmp_path, **job) == 0, (tmp_path / "err").read_text()
    same_end(tmp_path, undisturbed)
