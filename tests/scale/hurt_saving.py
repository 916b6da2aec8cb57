"""Save after each step, with a disk that refuses, and a kill amid a write.

`hurt_saving.py FOLDERS OUT BACKGROUND` is one of two ranks. Rank 1 cannot write its shards after
step 2, and is killed amid the write after step 4.
"""

import os
import signal
import sys
from pathlib import Path

from torch.distributed.checkpoint import FileSystemWriter

from runs import Toys, data, module, trainer
from scsdpo.checkpoints import Checkpoint, FullySharded


def main():
    folders, out, background = map(Path, sys.argv[1:])
    model = module(folders / "tied")
    described = {"init_args": {"name_or_path": str(folders / "tied")}}
    model.save_hyperparameters({"policy": described}, logger=False)
    write_data, writes = FileSystemWriter.write_data, []

    def refused(self, plan, planner):
        writes.append(plan)
        if len(writes) == 2 and model.global_rank == 1:
            raise OSError("No space left on device")
        done = write_data(self, plan, planner)
        if len(writes) == 4 and model.global_rank == 1:
            for file in Path(self.path).glob("__1_*"):
                os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    FileSystemWriter.write_data = refused
    saver = Checkpoint(0, dirpath=out / "checkpoints", save_last=True, save_top_k=0)
    fit = trainer(
        out,
        devices=2,
        strategy=FullySharded(background=str(background) == "True"),
        max_steps=6,
        max_epochs=-1,
        enable_checkpointing=True,
        callbacks=[saver],
    )
    fit.fit(model, data(Toys(40)))


if __name__ == "__main__":
    main()
