"""Commands' own options; imports nothing heavy."""

import argparse
from pathlib import Path
from typing import NoReturn

from scsdpo.errors import ConfigurationError


class OptionParser(argparse.ArgumentParser):
    """Raises a ConfigurationError for a mistake, where argparse would exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(message)


def own_parser(command: str, what: str, like: str = "predict") -> argparse.ArgumentParser:
    """A parser of a command's own options; all others are those of the command `like`."""
    parser = OptionParser(prog=f"scsdpo {command}", description=what, allow_abbrev=False)
    parser.set_defaults(like=like)
    return parser


def check_policy(key: str, policy: str) -> None:
    """Check that there is a model of this name, before anything else is looked at.

    Args:
        key: what names it.
        policy: no run or checkpoint.

    Raises:
        ConfigurationError: if it is neither a model's folder nor a model of the hub.
    """
    from scsdpo.policy.location import located  # slow to import

    try:
        located(policy)
    except ValueError as error:
        raise ConfigurationError(
            f"{key}: {policy} is not a run or checkpoint, and {error}"
        ) from error


def new_file(path: Path, *suffixes: str) -> Path:
    """Check a file to be written, and make its folder; returns `path`.

    Args:
        path: as given.
        suffixes: allowed suffixes; a name without a suffix is allowed too.

    Raises:
        ConfigurationError: if it is a folder, or has the suffix of another format.
    """
    if path.is_dir():
        raise ConfigurationError(f"--out: {path} is a folder; name a file")
    if path.suffix and path.suffix not in suffixes:
        names = " or ".join(str(path.with_suffix(suffix)) for suffix in suffixes)
        raise ConfigurationError(f"--out: {path} has the suffix of another format; name it {names}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def check_new_folder(path: Path) -> None:
    """Refuse a folder that is not empty.

    Raises:
        ConfigurationError: if `path` is a file, or a folder that is not empty.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ConfigurationError(f"--out: {path} is not empty; choose a new folder")
