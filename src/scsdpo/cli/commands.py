"""The commands of `scsdpo`. `main(args)` and `options()` of one stand in the module of its name."""

COMMANDS = {
    "fit": "train a policy",
    "validate": "measure a policy on the validation questions",
    "test": "the same, logged under test/",
    "predict": "write a policy's responses and their verdicts",
    "export": "write a checkpoint's policy as a Hugging Face folder",
    "rates": "measure the training questions' pass rates, for FrozenPassRate",
    "analyze": "measure what the teacher says, by correctness and by pass rate",
}
"""What each does."""

LIGHTNING = ("fit", "validate", "test", "predict")
"""These stand in `lightning_cli`."""


def module(command: str) -> str:
    """Name of the module that runs a command."""
    own = command in COMMANDS and command not in LIGHTNING
    return f"scsdpo.cli.{command if own else 'lightning_cli'}"
