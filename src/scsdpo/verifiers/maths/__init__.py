"""The reward of mathematics: find the answer, read its kind, and compare it."""

from scsdpo.verifiers.maths.finding import final_answer
from scsdpo.verifiers.maths.verifier import MathAnswer

__all__ = ["MathAnswer", "final_answer"]
