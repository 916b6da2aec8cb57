"""The reward of mathematics: where the answer stands, of which kind it is, and if it is right."""

from scsdpo.verifiers.maths.finding import final_answer
from scsdpo.verifiers.maths.verifier import MathAnswer

__all__ = ["MathAnswer", "final_answer"]
