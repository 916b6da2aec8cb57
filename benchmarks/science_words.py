"""Another task for benchmarks/real.py: science in words, such as "A cable carries 6 A for 7 s."

    python benchmarks/science_words.py DIR
    python benchmarks/real.py --methods grpo sc-sdpo --config=DIR/science.yaml

Writes the one-step science questions of scsdpo.lab into DIR (train.jsonl and val.jsonl, 56 held-out
questions as in configs/smollm2.yaml, no question in both), and science.yaml, which puts them in the
place of that file's data. A response is right iff its last number is the answer.
"""

import argparse
import json
from pathlib import Path

import yaml

from scsdpo.lab import LabTasks
from scsdpo.lab.arithmetic import LAST_NUMBER

SIZES = {"train": 448, "val": 56}
SYSTEM = "Answer with one short calculation, such as 3 * 4 = 12."
"""SmolLM2-135M-Instruct is right in 6 % of its draws with it, and in 3 % without a system turn."""


def questions(split: str, size: int) -> list[dict[str, str]]:
    """The first `size` different questions of a split."""
    source = LabTasks(split, levels=[1], shapes=["science"])  # type: ignore[arg-type]
    found: dict[str, dict[str, str]] = {}
    index = 0
    while len(found) < size:
        question = source.question(index)
        text = question.messages[-1]["content"]
        found[text] = {
            "prompt": text,
            "answer": question.answer,
            "topic": question.pitfalls[0].rstrip("*+-"),
        }
        index += 1
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("dir", type=Path, help="a folder, which is made")
    folder = parser.parse_args().dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    data = {}
    for split, size in SIZES.items():
        file = folder / f"{split}.jsonl"
        rows = questions(split, size)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data[split] = {
            "class_path": "scsdpo.data.Records",
            "init_args": {
                "path": str(file),
                "split": "train",  # the whole file
                "name": "science",
                "category": "topic",
                "system_prompt": SYSTEM,
                "verifier": {
                    "class_path": "scsdpo.verifiers.Regex",
                    "init_args": {"pattern": LAST_NUMBER.pattern},
                },
            },
        }
    (folder / "science.yaml").write_text(yaml.safe_dump({"data": data}, sort_keys=False))


if __name__ == "__main__":
    main()
