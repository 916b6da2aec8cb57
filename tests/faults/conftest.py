"""Fixtures: the process that runs the command, and a run that was left alone."""

import pytest
from stopping import Commands


@pytest.fixture(scope="session")
def commands(qwen3):
    made = Commands(qwen3)
    yield made
    made.close()


@pytest.fixture(scope="session")
def undisturbed(commands, tmp_path_factory):
    """The folder of a run that was left alone."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert commands.run(folder) == 0, (folder / "err").read_text()
    return folder
