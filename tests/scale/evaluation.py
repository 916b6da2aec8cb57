"""Validate, test and predict: `evaluation.py FOLDERS OUT KIND`. Ranks have unequal counts."""

import json
import sys
from pathlib import Path

from world import strategy

from runs import Toys, data, module, trainer
from scsdpo.callbacks import PredictionWriter
from scsdpo.types import Sampling


def main():
    folders, out, kind = sys.argv[1:]
    sampling = Sampling(n=3, max_new_tokens=6, seed=1)
    model = module(Path(folders) / "tied", val_sampling=sampling)
    world = int(kind[-1])
    questions = data(Toys(8), Toys(5), val_questions_per_batch=max(world, 2))
    writer = PredictionWriter(f"{out}/predictions.jsonl")
    run = trainer(out, devices=world, strategy=strategy(kind), callbacks=[writer])
    figures = run.validate(model, questions, verbose=False) + run.test(
        model, questions, verbose=False
    )
    run.predict(model, questions, return_predictions=False)
    if run.is_global_zero:
        (Path(out) / "figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
