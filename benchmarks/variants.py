"""Variants of the methods of configs/methods, by name: a method and words of the command line.

`benchmarks/real.py --methods` and the pairs of `benchmarks/check.py` take these names, those of
configs/methods and files. docs/will-it-work.md has the results.
"""

from dataclasses import dataclass

import yaml
from study import ROOT, overlay


@dataclass(frozen=True)
class Variant:
    """A method of configs/methods, and what follows it on the command line."""

    method: str
    words: tuple[str, ...] = ()


def hybrid(share: float) -> Variant:
    """SDPO's hybrid with another share of the policy gradient; the file's is .9."""
    file = ROOT / "configs" / "methods" / "sdpo-hybrid.yaml"
    parts = yaml.safe_load(file.read_text())["model"]["advantage"]["init_args"]["parts"]
    for part, weight in zip(parts, (share, round(1 - share, 6)), strict=True):
        part["weight"] = weight
    text = yaml.safe_dump(parts, default_flow_style=True, width=float("inf")).strip()
    return Variant("sdpo-hybrid", (f"--model.advantage.init_args.parts={text}",))


def rate(lr: str) -> str:
    """The word that sets the learning rate."""
    return f"--model.optimizer.init_args.lr={lr}"


COOLER = "--model.sampling.temperature=0.6"
FROZEN = "--model.teacher=Frozen"
ADAPTER = "--model.policy.adapter"
GOLD = (
    "--model.warmup.examples="
    "{class_path: GoldAnswers, init_args: {response: 'The answer is {answer}.'}}"
)
DEMONSTRATION = (
    "--model.teacher={class_path: EMA, init_args: {rate: 0.05, context: SiblingDemonstration}}"
)
"""A teacher for the warm-up of a method that has none."""
WARM_STEPS = 30
WARM = (
    f"--model.warmup.steps={WARM_STEPS}",
    GOLD,
    f"--trainer.max_steps={2 * WARM_STEPS}",
    f"--trainer.val_check_interval={WARM_STEPS}",
)
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
"""As configs/smollm2-lora.yaml."""
VARIANTS = {
    "sc-sdpo-t06": Variant("sc-sdpo", (COOLER,)),
    "sc-sdpo-t06-frozen": Variant("sc-sdpo", (COOLER, FROZEN)),
    "sc-sdpo-topp": Variant("sc-sdpo", ("--model.sampling.top_p=0.9",)),
    "sc-sdpo-frozen": Variant("sc-sdpo", (FROZEN,)),
    "sc-sdpo-trust": Variant(
        "sc-sdpo", ("--model.teacher=TrustRegion", "--model.teacher.init_args.mix=0.01")
    ),
    "sc-sdpo-gold": Variant("sc-sdpo", ("--model.teacher.init_args.context=GoldSolution",)),
    "sc-sdpo-self": Variant(
        "sc-sdpo", ("--model.teacher.init_args.context.init_args.exclude_self=false",)
    ),
    "sc-sdpo-lr5e-6": Variant("sc-sdpo", (rate("5e-6"),)),
    "sc-sdpo-overlong": Variant("sc-sdpo", ("--model.token_weighting=Overlong",)),
    "warm-sc-sdpo": Variant("sc-sdpo", WARM),
    "warm-grpo": Variant("grpo", (DEMONSTRATION, *WARM)),
    "warm-trusted-hybrid": Variant("trusted-hybrid", WARM),
    "warm-only": Variant("sc-sdpo", (*WARM, f"--model.warmup.steps={2 * WARM_STEPS}")),
    "hybrid-50": hybrid(0.5),
    "hybrid-99": hybrid(0.99),
    "lora-5e-4": Variant(
        "sdpo-hybrid",
        (
            rate("5e-4"),
            f"{ADAPTER}=Lora",
            *(f"{ADAPTER}.init_args.{name}={value}" for name, value in LORA.items()),
        ),
    ),
}
"""t06: sampled at temperature .6. frozen, trust: another teacher, shown the same. gold: the
teacher is shown the data's answer. self: a lone success is shown to itself. overlong: nothing is
learned from responses cut off at 40. warm: 30 supervised steps before as many of the method
(`model.warmup`), with the data's answers; warm-only: 60 of them."""


def find(method: str) -> Variant:
    """A variant by its name; a method of configs/methods or a file is one without words."""
    return VARIANTS.get(method, Variant(method))


def is_known(method: str) -> bool:
    """Whether it is a variant, a method of configs/methods, or a file."""
    return overlay(find(method).method).is_file()


def words(method: str) -> tuple[str, ...]:
    """A method's words of the command line: its file over the configuration, and its changes."""
    variant = find(method)
    return (f"--config={overlay(variant.method)}", *variant.words)
