"""The end of a fork that runs the command."""

import os
import sys

from scsdpo.__main__ import main as command


def run_and_leave(arguments):
    """Run `scsdpo ARGUMENTS`, and end this process with its exit code."""
    sys.argv = ["scsdpo", *arguments]
    try:
        code = command()
    except SystemExit as stop:
        code = stop.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)
