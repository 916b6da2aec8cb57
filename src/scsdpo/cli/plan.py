"""`scsdpo plan`: memory and time of a training step, before anything is loaded."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from scsdpo.cli.lightning_cli import CLI, run_cli
from scsdpo.cli.options import own_parser
from scsdpo.errors import ConfigurationError
from scsdpo.io.console import Terminal
from scsdpo.planning import (
    Devices,
    Lengths,
    Rates,
    Setup,
    memory_of,
    setup_of,
    sharding,
    splits,
)
from scsdpo.planning.setup import GIB
from scsdpo.planning.table import print_plan, print_splits
from scsdpo.policy.location import TINY

_SLOTS = ("policy", "teacher", "reference")
"""Keys of the section `model` that may name a model."""
_POSITIVE = ("gpus", "memory", "tflops", "bandwidth", "link", "host_ms")
_TOKENS = ("prompt_tokens", "teacher_tokens", "response_tokens")


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: what follows `scsdpo plan` on the command line.
    """
    given, rest = options().parse_known_args(args)
    for name in (*_POSITIVE, *_TOKENS):
        value = getattr(given, name)
        if value is not None and not value > 0:
            raise ConfigurationError(f"--{name.replace('_', '-')} must be > 0, got {value}")
    if given.split is not None and given.split < 2:
        raise ConfigurationError(f"--split must be >= 2, got {given.split}")

    class Planner(CLI):
        def before_instantiate_classes(self) -> None:
            """Use the shipped tokenizer: the plan needs none, and a model's may be out of reach."""
            slots = {name: self.config["fit"].model[name] for name in _SLOTS}
            given = {name: slot.get("init_args", {}) for name, slot in slots.items()}
            named = {name: args for name, args in given.items() if "name_or_path" in args}
            self.names = {name: args.name_or_path for name, args in named.items()}
            for args in named.values():
                args.name_or_path = TINY

        def instantiate_trainer(self, **kwargs: Any) -> Any:
            """Make no Trainer: it would look for the devices that are planned for."""

        def after_instantiate_classes(self) -> None:
            """Look for no checkpoint: nothing is run."""

        def run_subcommand(self, subcommand: str) -> None:
            setup = _setup(given, self.model, self.config["fit"], self.names)
            rates = Rates(
                flops=given.tflops * 1e12,
                bandwidth=given.bandwidth * 1e12,
                link=given.link * 1e9,
                host=given.host_ms / 1e3,
            )
            if given.split is None:
                print_plan(setup, memory_of(setup), rates, Terminal())
                return
            found = splits(setup, given.split, rates)
            if not found:
                raise ConfigurationError(
                    f"--split: {given.split} devices cannot be divided into trainers and servers: "
                    "the weights fit on no server (raise --memory or --split), or "
                    f"data.questions_per_batch ({setup.questions}) is not a multiple of any "
                    "possible number of trainers"
                )
            print_splits(setup, found, rates, Terminal())

    # LightningCLI and its messages read the command line from here.
    sys.argv = ["scsdpo", "fit", *rest]
    run_cli(Planner)


def options() -> argparse.ArgumentParser:
    """The command's own options, beside the keys of a configuration."""
    parser = own_parser(
        "plan",
        "Say how much memory each part and phase of a training step takes, whether it fits, and "
        "how long a step takes, from config.json and the configuration alone.",
        like="fit",
    )
    add, rates = parser.add_argument, Rates()
    add(
        "--architecture",
        help="config.json or its folder; needed if the policy is not on this machine",
    )
    add("--gpus", type=int, help="number of devices (trainer.devices x trainer.num_nodes)")
    add("--split", type=int, metavar="N", help="divide N devices into trainers and vLLM servers")
    add("--memory", type=float, default=80.0, help="memory of each device in GiB (80)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="kind of the devices (cuda)")
    add("--prompt-tokens", type=int, help="tokens of a prompt (data.max_prompt_tokens)")
    add(
        "--teacher-tokens",
        type=int,
        help="tokens of a teacher's prompt (those of a prompt and a response)",
    )
    add("--response-tokens", type=int, help="tokens of a response (model.sampling.max_new_tokens)")
    add(
        "--tflops",
        type=float,
        default=rates.flops / 1e12,
        help="TFLOP/s that matrix products reach (400)",
    )
    add(
        "--bandwidth",
        type=float,
        default=rates.bandwidth / 1e12,
        help="memory bandwidth of each device in TB/s (2.5)",
    )
    add(
        "--link", type=float, default=rates.link / 1e9, help="bandwidth between ranks in GB/s (200)"
    )
    add(
        "--host-ms",
        type=float,
        default=rates.host * 1e3,
        help="ms of Python for each layer and decoding step of HFRollout (1.25)",
    )
    return parser


def _setup(given: argparse.Namespace, module: Any, config: Any, names: Mapping[str, str]) -> Setup:
    trainer, data = config.trainer, config.data
    ranks = given.gpus or _ranks(trainer)
    strategy = trainer.strategy
    sharded = sharding(strategy if isinstance(strategy, str) else strategy.as_dict())
    if data.questions_per_batch % ranks:
        raise ConfigurationError(
            f"data.questions_per_batch: must be a multiple of the {ranks} devices, got "
            f"{data.questions_per_batch}; change it, or --gpus"
        )
    prompt = given.prompt_tokens or data.max_prompt_tokens
    response = given.response_tokens or module.sampling.max_new_tokens
    return setup_of(
        module,
        devices=Devices(
            ranks=ranks, kind=given.device, memory=int(given.memory * GIB), sharded=sharded
        ),
        autocast="mixed" in str(trainer.precision),
        questions=data.questions_per_batch,
        validation=data.val_questions_per_batch,
        lengths=Lengths(
            prompt=prompt,
            teacher_prompt=given.teacher_tokens or prompt + response,
            response=response,
        ),
        architecture=given.architecture,
        names=names,
    )


def _ranks(trainer: Any) -> int:
    """Number of devices in the configuration; `auto` counts as one."""
    devices = trainer.devices
    if isinstance(devices, list):
        return len(devices) * trainer.num_nodes
    text = str(devices)
    return max(int(text), 1) * trainer.num_nodes if text.lstrip("-").isdigit() else 1
