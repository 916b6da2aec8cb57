"""Train and go on elsewhere: `resuming.py FOLDERS OUT KIND STEPS [FROM]`.

FROM is the OUT of another world that has stopped; each case goes on from its own last.ckpt there.
"""

import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from world import ADAMW, CONFIGURATIONS, method, strategy

from runs import Toys, data, module, trainer
from scsdpo.checkpoints import Checkpoint
from scsdpo.policy import CausalLM, Stored
from scsdpo.teacher import EMA
from scsdpo.training import Ahead
from scsdpo.types import Sampling
from two_ranks import METHODS

HALF = Stored(dtype="bfloat16", on_host=True)
CASES = {
    "memory": lambda: METHODS["memory"] | {"optimizer": ADAMW},
    "ahead": lambda: method("sc-sdpo", optimizer=ADAMW, ahead=Ahead(batches=2)),
    "ema": lambda: method("sc-sdpo", optimizer=ADAMW),
    "restart": lambda: CONFIGURATIONS["restart"]() | {"optimizer": ADAMW},
    "lora": CONFIGURATIONS["lora adamw"],
    "host": lambda: method("sc-sdpo", optimizer=ADAMW, teacher=EMA(stored=Stored(on_host=True))),
    "half": lambda: method("sc-sdpo", optimizer=ADAMW, teacher=EMA(stored=HALF)),
}


def run(folders, out, kind, steps, source, name):
    settings = CASES[name]()
    policy = {"name_or_path": str(folders / "tied")} | settings.pop("policy", {})
    model = module(None, CausalLM(**policy), sampling=Sampling(n=2, max_new_tokens=6), **settings)
    # What `scsdpo fit` describes, as far as an export needs it.
    described = {"name_or_path": policy["name_or_path"]}
    if "adapter" in policy:
        adapter = {"class_path": "scsdpo.policy.Lora", "init_args": {"r": policy["adapter"].r}}
        described["adapter"] = adapter
    model.save_hyperparameters({"policy": {"init_args": described}}, logger=False)
    saver = Checkpoint(dirpath=out / "checkpoints", save_last=True, save_top_k=0)
    fit = trainer(
        out,
        devices=int(kind[-1]),
        strategy=strategy(kind),
        max_steps=steps,
        max_epochs=-1,
        enable_checkpointing=True,
        callbacks=[saver],
    )
    ckpt = source / name / "checkpoints" / "last.ckpt" if source else None
    # No link ends with a pass over the questions: there Lightning counts epochs otherwise.
    fit.fit(model, data(Toys(72), questions_per_batch=8), ckpt_path=ckpt)
    assert fit.global_step == steps
    state = {}
    for key, value in model.named_parameters():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        state[key] = whole.detach().clone()
    if fit.is_global_zero:
        torch.save(state, out / "weights.pt")


def main():
    folders, root, kind, steps, *source = sys.argv[1:]
    for name in CASES:
        out = Path(root) / name
        out.mkdir(parents=True, exist_ok=True)
        run(Path(folders), out, kind, int(steps), Path(source[0]) if source else None, name)


if __name__ == "__main__":
    main()
