"""Dependencies in pure Python are as low or as new as pyproject.toml allows (VERSIONS)."""

import os
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMPILED = {"torch", "numpy", "pyarrow", "google-re2", "safetensors"}
"""They stay as constraints.txt has them."""
PURE = [r for r in map(Requirement, PROJECT["dependencies"]) if r.name not in COMPILED]
WHICH = os.environ.get("VERSIONS")


def required(name):
    """Names and ranges that an installed package asks for on this machine, but for its extras."""
    for each in map(Requirement, requires(name) or ()):
        if not each.marker or each.marker.evaluate({"extra": ""}):
            yield each


def test_it_is_said_which_versions_are_meant():
    assert WHICH in ("lowest", "newest"), "VERSIONS must be lowest or newest: `make test-versions`"


@pytest.mark.skipif(WHICH != "lowest", reason="of the lowest versions")
@pytest.mark.parametrize("dependency", PURE, ids=lambda r: r.name)
def test_the_lowest_version_is_the_bound_of_pyproject(dependency):
    bound = next(s.version for s in dependency.specifier if s.operator == ">=")
    padded = [*bound.split("."), "0", "0"][:3]
    installed = version(dependency.name).split(".")
    assert installed[:3] == padded


@pytest.mark.skipif(WHICH != "newest", reason="of the newest versions")
@pytest.mark.parametrize("dependency", PURE, ids=lambda r: r.name)
def test_the_newest_version_is_at_least_that_of_constraints(dependency):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = next(
        Requirement(line)
        for line in lines
        if line.lower().replace("_", "-").startswith(f"{dependency.name}==")
    )
    at_least = Requirement(str(pinned).replace("==", ">="))
    assert at_least.specifier.contains(version(dependency.name))


def test_what_is_installed_goes_together():
    """What dependencies ask for, and what that asks for, is there in a version that suits."""
    seen, due, wrong = set(), ["scsdpo"], []
    while due:
        name = due.pop()
        if name in seen:
            continue
        seen.add(name)
        for each in required(name):
            try:
                installed = version(each.name)
            except PackageNotFoundError:
                wrong.append(f"{name} asks for {each}, which is not installed")
                continue
            due.append(each.name)
            if not each.specifier.contains(installed, prereleases=True):
                wrong.append(f"{name} asks for {each}, and {installed} is installed")
    assert not wrong
