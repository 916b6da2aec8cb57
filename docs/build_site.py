"""`make docs`: the site from docs/, the command line from the catalog, the API from docstrings."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from scsdpo.cli.catalog import Argument, Catalog, catalog

DOCS = Path(__file__).parent
BUILD = DOCS.parent / "build" / "docs"
ROOMS = {
    "training": "PolicyOptimizer and the optimizer step",
    "advantage": "credit of each token",
    "teacher": "what would have been said",
    "weighting": "how much a question counts",
    "rollout": "which responses",
    "selection": "which groups, and when",
    "policy": "the language model",
    "data": "sources and batches",
    "verifiers": "what is right",
    "loss": "the kernel",
    "reduction": "how losses add up",
    "state": "what is remembered",
    "callbacks": "what a run shows",
    "records": "what a run leaves behind",
    "checkpoints": "what is saved",
    "metrics": "figures",
    "statistics": "intervals",
    "types": "the data that flows",
    "prompt": "prompts and verdicts",
}
"""Public modules, and what stands beside them in the list."""


def main() -> int:
    """Assemble the pages and build them; returns the generator's exit code."""
    shutil.rmtree(BUILD, ignore_errors=True)
    pages = BUILD / "docs"
    shutil.copytree(DOCS, pages, ignore=shutil.ignore_patterns("*.py", "site.yml", "__pycache__"))
    (pages / "reference").mkdir()
    (pages / "reference" / "cli.md").write_text(command_line(catalog()))
    for room, what in ROOMS.items():
        text = f"# scsdpo.{room}\n\n{what[0].upper()}{what[1:]}.\n\n::: scsdpo.{room}\n"
        text += "    options:\n      show_root_heading: false\n      show_root_toc_entry: false\n"
        (pages / "reference" / f"{room}.md").write_text(text)
    config = yaml.safe_load((DOCS / "site.yml").read_text())
    api = [{f"scsdpo.{room}": f"reference/{room}.md"} for room in ROOMS]
    config["nav"] = list(_there(config["nav"]))
    (reference,) = [entry["Reference"] for entry in config["nav"] if "Reference" in entry]
    reference += [{"Command line": "reference/cli.md"}, {"Classes": api}]
    handler = config["plugins"][1]["mkdocstrings"]["handlers"]["python"]
    handler["paths"] = [str(DOCS.parent / path) for path in handler["paths"]]
    extensions = handler["options"]["extensions"]
    handler["options"]["extensions"] = [str(DOCS.parent / path) for path in extensions]
    config |= {"docs_dir": "docs", "site_dir": "site"}
    (BUILD / "mkdocs.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    command = [str(Path(sys.executable).with_name("zensical")), "build", "--clean", "--strict"]
    done = subprocess.run([*command, "-f", "mkdocs.yml"], cwd=BUILD, check=False)
    print(BUILD / "site" / "index.html")
    return done.returncode


def _there(nav: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The entries whose pages exist."""
    for entry in nav:
        ((title, page),) = entry.items()
        inner = list(_there(page)) if isinstance(page, list) else page
        if inner and (isinstance(inner, list) or (DOCS / inner).exists()):
            yield {title: inner}


def command_line(known: Catalog) -> str:
    """The page on all commands and keys."""
    lines = ["# Command line", "", "`scsdpo COMMAND [--config FILE ...] [--KEY=VALUE ...]`", ""]
    lines += ["Made from the parser. The same in a terminal: `scsdpo COMMAND --help`.", ""]
    for name, command in known.commands.items():
        lines += [f"## scsdpo {name}", "", command.about, ""]
        if command.like:
            lines += [
                f"Beside these it takes what [`{command.like}`](#scsdpo-{command.like}) takes."
            ]
            lines += [""]
        lines += _table({_option(key): one for key, one in command.options.items()})
    for section, path in known.sections.items():
        lines += [f"## {section}", "", _first(known, path), ""]
        arguments = known.classes[path].arguments
        lines += _table({f"{section}.{name}": one for name, one in arguments.items()})
        for name, one in arguments.items():
            paths = {path for kind in one.kinds for path in known.classes[kind].choices}
            ours = sorted(path for path in paths if path.startswith("scsdpo."))
            if section in ("model", "data") and ours:
                lines += [f"### {section}.{name}", ""]
                lines += [f"* {_link(path)}: {_first(known, path)}" for path in ours]
                lines += [""]
    return "\n".join(lines) + "\n"


def _option(name: str) -> str:
    return name if name.isupper() else f"--{name}"


def _table(arguments: dict[str, Argument]) -> list[str]:
    rows = [
        f"| `{name}` | {_cell(one.type)} | {'needed' if one.needed else _default(one)} "
        f"| {_cell(one.help)} |"
        for name, one in arguments.items()
    ]
    return ["| | type | default | |", "|---|---|---|---|", *rows, ""] if rows else []


def _default(one: Argument) -> str:
    value = one.default
    if isinstance(value, dict):
        name = value.get("class_path", "").rpartition(".")[2]
        return f"`{name}`" if name else ""
    return "" if value is None else f"`{_cell(yaml.safe_dump(value).splitlines()[0])}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _first(known: Catalog, path: str) -> str:
    return _cell(known.classes[path].doc.split("\n")[0] or "Lightning's.")


def _link(path: str) -> str:
    """To the class in the API's pages."""
    _, room, name = path.split(".")
    target = f"[`{name}`]({room}.md#{path})"
    return target if room in ROOMS else f"`{name}`"


if __name__ == "__main__":
    sys.exit(main())
