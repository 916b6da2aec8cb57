"""SLURM: the checkpoint where a requeued job looks for it."""

import os
import signal
import subprocess
from pathlib import Path

import lightning as L
from lightning.fabric.plugins.environments import SLURMEnvironment

from scsdpo.checkpoints.saying import say
from scsdpo.private.lightning import cluster_environment, requeue_path


def hand_over(trainer: L.Trainer, path: Path, signum: int) -> None:
    """Name a checkpoint as Lightning's requeue finds it, and let the job be requeued.

    Lightning resumes from `hpc_ckpt_N.ckpt` in `trainer.default_root_dir`, if no other is named.
    A preempted job (SIGTERM) is requeued by SLURM itself, one whose time is over is not.
    """
    environment = cluster_environment(trainer)
    if not isinstance(environment, SLURMEnvironment) or not trainer.is_global_zero:
        return
    name = Path(requeue_path(trainer, trainer.default_root_dir))
    try:
        name.symlink_to(os.path.relpath(path, name.parent))
    except OSError as error:
        say(f"{name} could not be made: {error.strerror}; go on with --ckpt_path {path}")
    requeue = environment.requeue_signal or signal.SIGUSR1
    if environment.auto_requeue and signum == requeue:
        subprocess.run(["scontrol", "requeue", job_id()], check=False)


def job_id() -> str:
    """Of this job, or of this task of an array."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]
