"""The command `scsdpo`: dispatches to the commands and turns users' mistakes into one line."""

import gc
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from scsdpo.cli.commands import COMMANDS, module
from scsdpo.cli.front import check, did_you_mean, in_order
from scsdpo.cli.helping import help_for
from scsdpo.cli.signals import Handlers, leave
from scsdpo.errors import DISK_FAULTS, ConfigurationError, TrainingStopped, explanation
from scsdpo.interrupt import Interrupted
from scsdpo.io import streams
from scsdpo.io.text import in_one_line

_THEIRS = {"train": "fit", "grpo": "fit", "sft": "fit", "eval": "validate", "generate": "predict"}
"""Commands of other libraries, and ours."""


def usage() -> str:
    """Give the text that `scsdpo --help` prints."""
    rows = [f"  {name:<10}{what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: scsdpo COMMAND [--config FILE ...] [--key=value ...]",
            "",
            *rows,
            "",
            "scsdpo COMMAND --help lists the keys; --model.teacher.help what a key can name",
            "(=NAME explains it); --print_config shows the whole configuration, and runs nothing.",
        ]
    )


def run(command: str, args: Sequence[str]) -> None:
    """Run one command; nothing heavy is imported before it is known which, and that it can run."""
    shown = help_for(command, args)
    if shown is not None:
        print(shown)
        return
    check(command, args)
    warnings.formatwarning = _in_one_line
    args = in_order(command, args)
    sys.argv[2:] = args  # where LightningCLI reads them, and launched ranks do
    # Lightning 2.6 under torch 2.13, of no use to anyone who reads it here.
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
    _imported(module(command)).main(args)


def _in_one_line(message: Warning | str, *_: Any, **__: Any) -> str:
    """A warning without the line of code that gave it, and with nothing that acts on a terminal."""
    return f"warning: {in_one_line(str(message))}\n"


def _imported(name: str) -> Any:
    """Looking for garbage among what imports make, which all stays, takes a sixth of their time."""
    gc.disable()
    try:
        return import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def main() -> int:
    """Exit code: 0; 2 after a mistake of the user's; 3 if training or a fault stopped the run, its
    last state is not saved, or what another command than `fit` says could not be written; 143 or
    130 if it was asked to stop by a signal.
    """
    streams.guard()
    args = sys.argv[1:]
    try:
        code = _main(args)
    finally:
        lost = streams.finish()
    # `fit` is worth its checkpoint, and the other commands what they say.
    return 3 if code == 0 and lost is not None and args[:1] != ["fit"] else code


def _main(args: Sequence[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0
    try:
        with Handlers(), _importing_from_here():
            return _run(args)
    except ConfigurationError as error:
        return _fail(error, 2) if _is_mine_to_say(error) else 2
    except TrainingStopped as error:
        return _fail(error, 3)
    except Exception as error:
        if words := explanation(error):
            return _fail(words, 3)
        if isinstance(error, OSError) and error.errno in DISK_FAULTS:
            return _fail(error, 3)
        raise


@contextmanager
def _importing_from_here() -> Iterator[None]:
    """Find classes of the user's in the working folder too, after everything that is installed.

    Python has that folder on its path for `python -m scsdpo`, but not for the command `scsdpo`.
    """
    here = os.getcwd()
    if {"", here} & set(sys.path):
        yield
        return
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _run(args: Sequence[str]) -> int:
    try:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            theirs = _THEIRS.get(args[0])
            hint = f"; did you mean `{theirs}`?" if theirs else did_you_mean(args[0], COMMANDS)
            raise ConfigurationError(
                f"{args[0]}: no such command{hint} (commands: {', '.join(COMMANDS)})"
            )
        run(args[0], args[1:])
    except Interrupted as stop:
        code = leave(stop)
        if any(not thread.daemon for thread in threading.enumerate()[1:]):
            sys.stderr.flush()
            os._exit(code)  # threads that wait for an answer would be waited for
        return code
    return 0


def _is_mine_to_say(mistake: ConfigurationError) -> bool:
    """False if another rank of this run prints the same line."""
    if "torch" not in sys.modules:
        return True
    from scsdpo.distributed import is_first_to_ask

    return is_first_to_ask(f"mistake {mistake}")


def _fail(error: Exception | str, code: int) -> int:
    print(f"scsdpo: error: {in_one_line(str(error))}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
