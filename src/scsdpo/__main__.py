"""The command `scsdpo`: dispatches to the commands and turns users' mistakes into one line."""

import os
import sys
import threading
import warnings
from collections.abc import Sequence

from scsdpo.cli.signals import Handlers, leave
from scsdpo.errors import DISK_FAULTS, ConfigurationError, TrainingStopped, explanation
from scsdpo.interrupt import Interrupted

COMMANDS = {
    "fit": "train a policy",
    "plan": "say what memory and time a training step takes, before anything is loaded",
    "validate": "measure a policy on the validation questions: accuracy with intervals",
    "test": "the same, under the name test",
    "predict": "write a policy's responses and their verdicts",
    "compare": "compare policies question by question, or methods seed by seed",
    "export": "write a checkpoint's policy as a Hugging Face folder",
    "rates": "measure the training questions' pass rates, for FrozenPassRate",
    "report": "write a page on one run or several: curves, responses, credit of their tokens",
    "analyze": "measure what the teacher says, by correctness and by pass rate",
}


def usage() -> str:
    """What `scsdpo --help` prints."""
    rows = [f"  {name:<10}{what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: scsdpo COMMAND [--config FILE ...] [--key=value ...]",
            "",
            *rows,
            "",
            "scsdpo COMMAND --help lists the keys; scsdpo fit --model.advantage.help=NAME explains",
            "a strategy; --print_config shows the whole configuration instead of running it.",
        ]
    )


def run(args: Sequence[str]) -> None:
    """Run one command; imports wait until it is known which, so that help comes at once."""
    if args[0] == "export":
        from scsdpo.cli.export import main as export

        export(args[1:])
        return
    if args[0] == "report":
        from scsdpo.cli.report import main as report

        report(args[1:])
        return
    # Lightning 2.6 under torch 2.13, of no use to anyone who reads it here.
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
    if args[0] == "compare":
        from scsdpo.cli.compare import main as compare

        compare(args[1:])
    elif args[0] in ("validate", "test"):
        from scsdpo.cli.evaluate import main as evaluate

        evaluate("test" if args[0] == "test" else "validate", args[1:])
    elif args[0] == "predict":
        from scsdpo.cli.predict import main as predict

        predict(args[1:])
    elif args[0] == "rates":
        from scsdpo.cli.rates import main as rates

        rates(args[1:])
    elif args[0] == "plan":
        from scsdpo.cli.plan import main as plan

        plan(args[1:])
    elif args[0] == "analyze":
        from scsdpo.cli.analyze import main as analyze

        analyze(args[1:])
    else:
        from scsdpo.cli.lightning_cli import main as lightning

        lightning()


def main() -> int:
    """Exit code: 0; 2 after a mistake of the user's; 3 if training or a fault stopped the run; 143
    or 130 if it was asked to by a signal.
    """
    args = sys.argv[1:]
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0
    try:
        with Handlers():
            return _run(args)
    except ConfigurationError as error:
        return _fail(error, 2)
    except TrainingStopped as error:
        return _fail(error, 3)
    except Exception as error:
        if words := explanation(error):
            return _fail(words, 3)
        if isinstance(error, OSError) and error.errno in DISK_FAULTS:
            return _fail(error, 3)
        raise


def _run(args: Sequence[str]) -> int:
    try:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            raise ConfigurationError(f"{args[0]}: no such command; choose {', '.join(COMMANDS)}")
        run(args)
    except Interrupted as stop:
        code = leave(stop)
        if any(not thread.daemon for thread in threading.enumerate()[1:]):
            sys.stderr.flush()
            os._exit(code)  # threads that wait for an answer would be waited for
        return code
    return 0


def _fail(error: Exception | str, code: int) -> int:
    print(f"scsdpo: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
