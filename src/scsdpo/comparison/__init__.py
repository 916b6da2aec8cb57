"""Comparisons: policies in pairs of questions, methods in pairs of seeds, and the runs for it."""

from scsdpo.comparison.finding import evaluation_in, read, seeds_in
from scsdpo.comparison.questions import Duel, Row, duel
from scsdpo.comparison.running import DONE, Job, execute, run_all
from scsdpo.comparison.seeds import SeedRow, by_seed
from scsdpo.comparison.table import answers_table, duel_table, seeds_table, stars

__all__ = [
    "DONE",
    "Duel",
    "Job",
    "Row",
    "SeedRow",
    "answers_table",
    "by_seed",
    "duel",
    "duel_table",
    "evaluation_in",
    "execute",
    "read",
    "run_all",
    "seeds_in",
    "seeds_table",
    "stars",
]
