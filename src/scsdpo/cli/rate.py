"""A learning rate that a later configuration file puts in the place of an earlier one's."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scsdpo.cli.front import read_config


def replaced_rate(args: Sequence[str], now: object) -> str:
    """In one line, which file's rate is used and which is not; '': no file replaced another's.

    A method file carries its paper's rate, which is of the paper's model: over a base file of
    another model the user should know.

    Args:
        args: of the command line, with the configuration files in order.
        now: `model.optimizer.init_args.lr` as it is used; a rate of the command line is chosen by
            hand, and nothing is said.
    """
    rates = [(path, rate) for path in _files(args) if (rate := _rate(read_config(path)))]
    if len(rates) < 2 or rates[-1][1] != now:
        return ""
    (*_, (below, before), (above, after)) = rates
    if before == after:
        return ""
    return (
        f"warning: model.optimizer.lr: {after:g} of {above} replaces {before:g} of {below}; a "
        "method file has the rate for its paper's model. "
        f"--model.optimizer.lr={before:g} keeps the other"
    )


def _files(args: Sequence[str]) -> Iterator[Path]:
    """The configuration files on this machine that a command line names, in its order."""
    for number, arg in enumerate(args):
        name = arg.removeprefix("--config=") if arg.startswith("--config=") else ""
        if arg in ("-c", "--config"):
            name = "".join(args[number + 1 : number + 2])
        if name and "://" not in name:
            yield Path(name)


def _rate(config: dict[str, Any]) -> float:
    """The learning rate that a file states; 0: none."""
    inside: Any = config
    for key in ("model", "optimizer", "init_args", "lr"):
        inside = inside.get(key) if isinstance(inside, dict) else None
    return float(inside) if isinstance(inside, int | float) else 0.0
