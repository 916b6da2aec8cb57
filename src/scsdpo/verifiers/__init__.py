"""Verifiers, which decide whether a response is right and give feedback on a wrong one."""

from scsdpo.prompt import Verifier
from scsdpo.verifiers.answer import ExactMatch, MultipleChoice, last_answer
from scsdpo.verifiers.bfcl import BFCLCalls, BFCLRelevance
from scsdpo.verifiers.episodes import Episodes
from scsdpo.verifiers.function import Callable
from scsdpo.verifiers.maths import MathAnswer
from scsdpo.verifiers.pool import VerifierPool
from scsdpo.verifiers.python_tests import PythonTests
from scsdpo.verifiers.reasoning_gym import ReasoningGymAnswer
from scsdpo.verifiers.regex import Regex
from scsdpo.verifiers.tool_call import ToolCall
from scsdpo.verifiers.verification import Verification
from scsdpo.verifiers.verify import Failures, verify_all

__all__ = [
    "BFCLCalls",
    "BFCLRelevance",
    "Callable",
    "Episodes",
    "ExactMatch",
    "Failures",
    "MathAnswer",
    "MultipleChoice",
    "PythonTests",
    "ReasoningGymAnswer",
    "Regex",
    "ToolCall",
    "Verification",
    "Verifier",
    "VerifierPool",
    "last_answer",
    "verify_all",
]
