"""Paired comparisons of policies by question and of methods by seed, and the runs for them."""

from scsdpo.comparison.questions import ComparedFigure, PairedComparison, compare_questions
from scsdpo.comparison.running import DONE, Job, execute, run_all
from scsdpo.comparison.seeds import SeedRow, by_seed
from scsdpo.comparison.table import answers_table, figures_table, seeds_table, stars

__all__ = [
    "DONE",
    "ComparedFigure",
    "Job",
    "PairedComparison",
    "SeedRow",
    "answers_table",
    "by_seed",
    "compare_questions",
    "execute",
    "figures_table",
    "run_all",
    "seeds_table",
    "stars",
]
