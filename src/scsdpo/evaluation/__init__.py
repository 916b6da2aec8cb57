"""Evaluations: a policy's scores on each question, as figures and as a file."""

from scsdpo.evaluation.figures import Figures, by_category, figures, means
from scsdpo.evaluation.question import EvaluatedQuestion, predictions, questions
from scsdpo.evaluation.result import Result
from scsdpo.evaluation.table import result_table

__all__ = [
    "EvaluatedQuestion",
    "Figures",
    "Result",
    "by_category",
    "figures",
    "means",
    "predictions",
    "questions",
    "result_table",
]
