"""The plan at the start of a run, and its comparison with the first step."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from scsdpo.advantage import Batch
from scsdpo.callbacks import RolloutCallback
from scsdpo.data import TaskDataModule
from scsdpo.errors import ConfigurationError
from scsdpo.metrics import peak_memory
from scsdpo.planning.advice import advice, fits
from scsdpo.planning.memory import Memory, memory_of
from scsdpo.planning.setup import GIB, LATE_BYTES, Devices, Lengths, Setup, setup_of, sharding
from scsdpo.planning.table import compact, fit_line, gib


class MemoryPlan(RolloutCallback):
    """Prints a run's estimated memory before it loads weights, and the measured one after a batch.

    The estimate assumes the longest prompts and responses that the configuration allows. A run is
    refused if weights, gradients and optimizer states alone do not fit. It only warns if the whole
    estimate does not fit, because responses are mostly shorter.
    """

    def __init__(self) -> None:
        self.planned: Setup | None = None
        self.lengths: Lengths | None = None
        """Mean lengths of the last batch on this rank."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        loaded: Any = pl_module
        if stage != "fit" or loaded.policy.model is not None:
            return
        try:
            self.planned = _planned(trainer, pl_module)
        except ConfigurationError as error:  # the run can do without a plan
            rank_zero_info(f"no plan: {error}")
        except AttributeError as error:  # its config.json has other names for sizes
            rank_zero_info(
                f"no plan: the architecture of {loaded.policy.name_or_path} is not supported "
                f"({error})"
            )
        if self.planned is None:
            return
        memory = memory_of(self.planned)
        _refuse(self.planned, memory)
        for line in compact(self.planned, memory):
            rank_zero_info(line)
        if not fits(self.planned, memory):
            rank_zero_warn(f"plan: {fit_line(self.planned, memory)}")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.planned is not None and torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_batch(self, trainer: L.Trainer, module: L.LightningModule, batch: Batch) -> None:
        if self.planned is not None:
            self.lengths = _lengths(batch)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self.planned is None or self.lengths is None or trainer.global_step == 0:
            return
        setup, self.planned = self.planned, None
        seen = replace(setup, lengths=self.lengths)
        context = setup.devices.process if pl_module.device.type == "cuda" else 0
        took = peak_memory(pl_module.device) + context  # the allocator does not count the context
        rank_zero_info(
            f"plan: the first step took {gib(took)} GiB on rank 0; the plan is "
            f"{gib(memory_of(seen).peak)} GiB for its mean lengths ({seen.lengths.prompt} tokens "
            f"in a prompt, {seen.lengths.response} in a response), and "
            f"{gib(memory_of(setup).peak)} GiB for the longest prompts and responses"
        )


def _planned(trainer: L.Trainer, module: L.LightningModule) -> Setup | None:
    """The run's setup; None without a `TaskDataModule`, which says how large a batch is."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, TaskDataModule):
        return None
    sampling: Any = module.sampling
    prompt, response = data.max_prompt_tokens, int(sampling.max_new_tokens)
    return setup_of(
        module,
        devices=_devices(trainer),
        autocast="mixed" in str(trainer.precision),
        questions=data.questions_per_batch,
        validation=data.val_questions_per_batch,
        lengths=Lengths(prompt=prompt, teacher_prompt=prompt + response, response=response),
    )


def _devices(trainer: L.Trainer) -> Devices:
    device = trainer.strategy.root_device
    sharded = sharding(trainer.strategy)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return Devices(ranks=trainer.world_size, kind="cuda", memory=total, sharded=sharded)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Devices(
        ranks=trainer.world_size,
        kind="cpu",
        memory=total // trainer.num_devices,
        sharded=sharded,
        process=_resident() + LATE_BYTES,
    )


def _refuse(setup: Setup, memory: Memory) -> None:
    if memory.least <= setup.devices.memory:
        return
    found = advice(setup)
    remedy = f": set {found.words}" if found else ": use a smaller model or larger devices"
    raise ConfigurationError(
        f"trainer: weights, gradients and optimizer states alone take {gib(memory.least)} GiB on "
        f"each device, which has {gib(setup.devices.memory)}{remedy}; see `scsdpo plan`"
    )


def _lengths(batch: Batch) -> Lengths:
    prompts = [len(prompt.ids) for prompt in batch.judged.prompts]
    of_teacher = [len(ids) for group in batch.teacher.ids for ids in group if ids]
    prompt = _mean(prompts)
    return Lengths(
        prompt=prompt,
        teacher_prompt=_mean(of_teacher) if of_teacher else prompt,
        response=_mean(batch.judged.lengths.flatten().tolist()),
    )


def _mean(lengths: Sequence[int]) -> int:
    return max(round(sum(lengths) / max(len(lengths), 1)), 1)


def _resident() -> int:
    """Resident bytes of this process; 1 GiB where the kernel does not report them."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return GIB
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
