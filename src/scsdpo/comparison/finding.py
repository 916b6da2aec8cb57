"""What an argument of `scsdpo compare` is: an evaluation's file, a run, or a folder of seeds."""

import re
from pathlib import Path

from scsdpo.errors import blamed_on
from scsdpo.evaluation import Result

_SEED = re.compile(r"seed_?(\d+)")
_VALIDATION = re.compile(r"val-(\d+)\.json")


def evaluation_in(path: Path) -> Path | None:
    """The file that `path` is, or the last validation of the run that it is; None: neither."""
    if path.is_file() and path.suffix == ".json":
        return path
    found = [(int(m[1]), file) for file in (path / "evaluations").glob("val-*.json")
             if (m := _VALIDATION.fullmatch(file.name))]  # fmt: skip
    return max(found)[1] if found else None


def seeds_in(path: Path) -> dict[int, Path]:
    """The runs of a method, `seed0`, `seed1`, ... in its folder; empty if it is none."""
    if not path.is_dir():
        return {}
    matches = ((_SEED.fullmatch(folder.name), folder) for folder in path.iterdir())
    found = {int(match[1]): folder for match, folder in matches if match and folder.is_dir()}
    return dict(sorted(found.items()))


def read(path: Path) -> Result:
    """An evaluation.

    Raises:
        ConfigurationError: if it is none.
    """
    with blamed_on("compare"):
        found = evaluation_in(path)
        if found is None:
            raise ValueError(f"{path} holds no evaluation")
        return Result.read(found)
