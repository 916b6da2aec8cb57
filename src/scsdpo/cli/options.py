"""Commands' own options; imports nothing heavy."""

import argparse
from pathlib import Path
from typing import NoReturn

from scsdpo.errors import ConfigurationError


class OptionParser(argparse.ArgumentParser):
    """Its mistakes are the user's."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(message)


def own_parser(command: str, what: str, like: str = "predict") -> argparse.ArgumentParser:
    """For a command's own options; what it does not know is as in the command `like`."""
    parser = OptionParser(prog=f"scsdpo {command}", description=what, allow_abbrev=False)
    parser.set_defaults(like=like)
    return parser


def new_file(path: Path) -> Path:
    """`path`, in a folder that exists then.

    Raises:
        ConfigurationError: if it is a folder.
    """
    if path.is_dir():
        raise ConfigurationError(f"--out: {path} is a folder; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
