"""Train every configuration named, one after the other: `world.py FOLDERS OUT KIND NAME...`.

One of R processes that `torch.distributed.run` starts, or the only one. FOLDERS has the policies,
OUT gets for each configuration the weights and what was logged.
"""

import sys
from functools import partial
from pathlib import Path

import torch
import yaml
from jsonargparse import ArgumentParser
from torch.distributed.tensor import DTensor

from runs import Toys, data, module, trainer
from scsdpo.advantage import Blend, GroupRelative, ReferenceKL, SelfDistillation, Weighted
from scsdpo.checkpoints import FullySharded
from scsdpo.cli.config_types import arguments
from scsdpo.loss import SamplerImportance
from scsdpo.policy import CausalLM, Lora
from scsdpo.selection import InformativePool
from scsdpo.teacher import External, Frozen, NoTeacher, PlainPrompt, Restart, TrustRegion
from scsdpo.training import Limits, PolicyOptimizer
from scsdpo.training.warmup import Warmup
from scsdpo.types import Sampling
from scsdpo.weighting import TeacherEntropy, Uniform

ROOT = Path(__file__).resolve().parents[2]
SEED = 1
SGD = partial(torch.optim.SGD, lr=0.1)
ADAMW = partial(torch.optim.AdamW, lr=1e-3, eps=1e-6)


def method(name, **changes):
    """A method's own file."""
    axes = yaml.safe_load((ROOT / "configs" / "methods" / f"{name}.yaml").read_text())["model"]
    axes.pop("optimizer", None)  # the paper's rate, without a class
    parser = ArgumentParser(exit_on_error=False)
    for axis in axes:
        parser.add_argument(f"--{axis}", type=arguments(PolicyOptimizer)[axis])
    made = parser.instantiate_classes(parser.parse_object(axes))
    return {axis: made[axis] for axis in axes} | changes


def anchored(**changes):
    return {
        "advantage": Blend(
            parts=(
                Weighted(advantage=GroupRelative(), weight=1.0),
                Weighted(advantage=ReferenceKL(), weight=0.5),
            )
        ),
        "teacher": NoTeacher(),
        "weighting": Uniform(),
        "reference": Frozen(PlainPrompt()),
    } | changes


def external(**arguments):
    """A model of another size, whose folder lies beside the policies."""
    return External(str(Path(sys.argv[1]) / "larger"), **arguments)


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CONFIGURATIONS = {
    "sc-sdpo": lambda: method("sc-sdpo"),
    "sc-sdpo adamw": lambda: method("sc-sdpo", optimizer=ADAMW),
    "sc-sdpo adamw, fused": lambda: method("sc-sdpo", optimizer=partial(ADAMW, fused=True)),
    "grpo": lambda: method("grpo"),
    "grpo adamw": lambda: method("grpo", optimizer=ADAMW),
    "srpo": lambda: method("srpo"),
    "drift": lambda: method("drift"),
    "dapo": lambda: method("dapo", selection=InformativePool(questions=4, max_batches=2)),
    "reference": anchored,
    "restart": lambda: method("sc-sdpo", teacher=Restart(every=2, rate=0.4)),
    "trust region, measured": lambda: method(
        "sc-sdpo", teacher=TrustRegion(mix=0.1), token_weighting=TeacherEntropy()
    ),
    "lora": lambda: method("sc-sdpo", policy={"adapter": Lora(r=4)}),
    "lora adamw": lambda: method("sc-sdpo", policy={"adapter": Lora(r=4)}, optimizer=ADAMW),
    "lora, frozen": lambda: method("sc-sdpo", policy={"adapter": Lora(r=1)}, teacher=Frozen()),
    "lora, bf16 base": lambda: method(
        "sc-sdpo", policy={"adapter": Lora(r=4), "dtype": "bfloat16"}
    ),
    "external": lambda: method("sc-sdpo", teacher=external()),
    "external, on host": lambda: method("sc-sdpo", teacher=external(on_host=True)),
    "external, bf16, lora": lambda: method(
        "sc-sdpo", teacher=external(dtype="bfloat16"), policy={"adapter": Lora(r=4)}
    ),
    "external twice": lambda: anchored(
        advantage=Blend(
            parts=(
                Weighted(advantage=SelfDistillation(), weight=1.0),
                Weighted(advantage=ReferenceKL(), weight=0.5),
            )
        ),
        teacher=external(),
        reference=external(),
    ),
    "lora on the ends": lambda: method(
        "sc-sdpo",
        policy={"adapter": Lora(r=4, target_modules=["embed_tokens", "lm_head", "q_proj"])},
    ),
    "experts": lambda: method("sc-sdpo", policy={"name_or_path": "experts", "expert_balance": 0.1}),
    "lora on experts": lambda: method(
        "sc-sdpo",
        policy={
            "name_or_path": "experts",
            "adapter": Lora(r=4, target_modules=["q_proj"], target_parameters=EXPERTS),
        },
    ),
    "untied": lambda: method("sc-sdpo", policy={"name_or_path": "untied"}),
    "window": lambda: method("sc-sdpo", policy={"name_or_path": "olmo3"}),
    "two updates": lambda: method("sc-sdpo", updates_per_rollout=2),
    "three updates": lambda: method(
        "grpo", updates_per_rollout=3, questions=12, importance=SamplerImportance(cap=2.0)
    ),
    "checkpointing": lambda: method("sc-sdpo", policy={"gradient_checkpointing": True}),
    "eager": lambda: method("sc-sdpo", policy={"attn_implementation": "eager"}),
    # Short responses of which some are one token, in micro-batches of their own.
    "uneven": lambda: method(
        "sc-sdpo",
        limits=Limits(max_tokens=3),
        sampling=Sampling(n=2, max_new_tokens=2),
    ),
    "clipped": lambda: method("sc-sdpo", limits=Limits(max_grad_norm=0.01, max_tokens=60)),
    "warm-up adamw": lambda: method(
        "sc-sdpo", warmup=Warmup(steps=3, questions=4, measure_every=2), optimizer=ADAMW
    ),
    "warm-up, lora": lambda: method(
        "sc-sdpo", warmup=Warmup(steps=2, questions=4), policy={"adapter": Lora(r=4)}
    ),
    "measured room": lambda: method("sc-sdpo", limits=Limits(max_tokens="auto")),
}


def strategy(kind):
    """Of `one-1`, `ddp-2`, `fsdp-4`, ..."""
    way, _ = kind.split("-")
    strategies = {"one": "auto", "ddp": "ddp", "fsdp": FullySharded()}
    return strategies[way]


def run(name, folders, out, kind):
    settings = {
        "optimizer": SGD,
        # With this seed no draw lies within rounding of the border between two tokens.
        "sampling": Sampling(n=2, max_new_tokens=6, seed=SEED),
        "limits": Limits(max_tokens=60),
    } | CONFIGURATIONS[name]()
    of_policy = {"name_or_path": "tied"} | settings.pop("policy", {})
    policy = CausalLM(**of_policy | {"name_or_path": str(folders / of_policy["name_or_path"])})
    number = settings.pop("questions", 8)
    # Two rollouts a question: ranks often have different numbers of rows to run, or none.
    model = module(None, policy=policy, **settings)
    fit = trainer(
        out,
        devices=int(kind[-1]),
        strategy=strategy(kind),
        max_steps=5,
        max_epochs=-1,
        val_check_interval=2,
        check_val_every_n_epoch=None,
    )
    questions = data(Toys(60), Toys(7), questions_per_batch=number, val_questions_per_batch=4)
    fit.fit(model, questions)
    assert fit.global_step >= 5
    state = {}
    for key, value in model.named_parameters():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        state[key] = whole.detach().clone()
    if fit.is_global_zero:
        torch.save(state, out / "weights.pt")


def main():
    folders, root, kind, *names = sys.argv[1:]
    for name in names:
        out = Path(root) / name
        out.mkdir(parents=True, exist_ok=True)
        run(name, Path(folders), out, kind)


if __name__ == "__main__":
    main()
