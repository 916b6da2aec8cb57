"""pyright takes what the docs show users to write: `make test-types`."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import scsdpo

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [*scsdpo.__all__, "PolicyOptimiser"]


@pytest.fixture(scope="module")
def complaints(tmp_path_factory):
    """[(file, line, message)]: pyright's errors against the package's sources, in one call.

    Pages are read in standard mode, pyright's default, which has all rules of basic mode. The
    blocks of a page are one module, in which later ones use the imports of earlier ones.
    """
    folder = tmp_path_factory.mktemp("typed")
    for page in PAGES:
        if code := re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            (folder / f"page_{page.stem.lower()}.py").write_text("\n".join(code))
    assert len(list(folder.glob("page_*.py"))) >= 6
    annotated = Path(__file__).with_name("annotated.py").read_text()
    (folder / "annotated.py").write_text(annotated)
    lines = [f"A{number} = scsdpo.{name}" for number, name in enumerate(NAMES, 3)]
    (folder / "names.py").write_text("\n".join(["# pyright: strict", "import scsdpo", *lines]))
    settings = {"typeCheckingMode": "standard", "extraPaths": [str(ROOT / "src")]}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--project", str(folder)]
    done = subprocess.run(
        [*command, "--pythonpath", sys.executable], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("{"), done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert said["summary"]["filesAnalyzed"] == len(list(folder.glob("*.py")))
    return [
        (Path(each["file"]).name, each["range"]["start"]["line"] + 1, each["message"])
        for each in said["generalDiagnostics"]
        if each["severity"] == "error"
    ]


def test_the_python_of_every_page_has_no_error(complaints):
    assert [each for each in complaints if each[0].startswith("page_")] == []


def test_annotated_strategies_have_no_error_in_strict_mode(complaints):
    assert "# pyright: strict\n" in Path(__file__).with_name("annotated.py").read_text()
    assert [each for each in complaints if each[0] == "annotated.py"] == []


def test_every_name_of_the_package_is_typed_and_a_misspelled_one_is_an_error(complaints):
    said = [each for each in complaints if each[0] == "names.py"]
    assert {line for _, line, _ in said} == {len(NAMES) + 2}
    assert any('"PolicyOptimiser" is not a known attribute' in message for *_, message in said)
