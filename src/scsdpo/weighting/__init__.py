"""Weighting: how much does each question, rollout and token count?"""

from scsdpo.weighting._base import Weighting
from scsdpo.weighting.pass_rate import PassRate, Uniform
from scsdpo.weighting.tokens import TeacherEntropy, TokenWeighting, UniformTokens

__all__ = ["PassRate", "TeacherEntropy", "TokenWeighting", "Uniform", "UniformTokens", "Weighting"]
