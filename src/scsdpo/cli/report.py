"""`scsdpo report`: one page on what happened in a run or several."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from scsdpo.cli.options import OptionParser, new_file
from scsdpo.errors import ConfigurationError
from scsdpo.report import Run, panels, read_runs, write


def options() -> argparse.ArgumentParser:
    """The command's options."""
    parser = OptionParser(
        prog="scsdpo report",
        description="Write one HTML page on one run or several: curves, responses, and where the "
        "credit went. The page loads nothing from elsewhere, so the file can be sent to anyone.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run's folder; NAME=FOLDER names it in the page"
    )
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        help="file to write (of one run RUN/report.html, of several ./report.html)",
    )
    parser.add_argument(
        "--figures",
        type=Path,
        metavar="DIR",
        help="folder, in which each figure is also written as SVG and PNG",
    )
    return parser


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: what follows `scsdpo report` on the command line.
    """
    given = options().parse_args(args)
    runs = read_runs(given.runs)
    out = given.out or (runs[0].folder if len(runs) == 1 else Path()) / "report.html"
    out = new_file(out, ".html")
    if given.figures is not None:
        _save_figures(runs, given.figures)
    write(runs, out)
    print(out)


def _save_figures(runs: Sequence[Run], folder: Path) -> None:
    try:
        from scsdpo.report.paper import save
    except ImportError as error:
        raise ConfigurationError(
            f"--figures needs matplotlib ({error}): pip install 'scsdpo[report]'"
        ) from error
    save(panels(runs), folder)
    print(folder)
