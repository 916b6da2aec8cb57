"""The commands of `scsdpo`; imports nothing heavy."""

COMMANDS = {
    "fit": "train a policy",
    "plan": "say what memory and time a training step takes, before anything is loaded",
    "check": "say whether this policy can teach itself this task, before training",
    "validate": "measure a policy on the validation questions: accuracy with intervals",
    "test": "as validate, with `test` as the name of the split in files and loggers",
    "predict": "write a policy's responses and their verdicts",
    "compare": "compare policies question by question, or methods seed by seed",
    "export": "write a checkpoint's policy as a Hugging Face folder",
    "solve": "attempt one question, learning from wrong attempts, until it is solved",
    "rates": "measure the training questions' pass rates, for FrozenPassRate",
    "report": "write a page on one run or several: curves, responses, credit of their tokens",
    "analyze": "measure what the teacher says, by correctness and by pass rate",
}
"""One line on each command."""

_ELSEWHERE = {"fit": "lightning_cli", "validate": "evaluate", "test": "evaluate"}
"""Any other command is in the module of its name, with `main(args)` and its own `options()`."""


def module(command: str) -> str:
    """Name of the module that runs a command; Lightning refuses an unknown one."""
    own = command if command in COMMANDS else "lightning_cli"
    return f"scsdpo.cli.{_ELSEWHERE.get(command, own)}"
