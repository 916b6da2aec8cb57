"""Verifiers: what is a right answer, and what to say of a wrong one."""

from scsdpo.verifiers._base import Verifier
from scsdpo.verifiers.answer import ExactMatch, MultipleChoice, last_answer
from scsdpo.verifiers.pool import Verification, VerifierPool
from scsdpo.verifiers.tool_call import ToolCall
from scsdpo.verifiers.verify import report_errors, verify_all

__all__ = [
    "ExactMatch",
    "MultipleChoice",
    "ToolCall",
    "Verification",
    "Verifier",
    "VerifierPool",
    "last_answer",
    "report_errors",
    "verify_all",
]
