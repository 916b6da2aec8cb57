"""The loss: one kernel that turns credit into gradients, for every objective."""

from scsdpo.loss.credit import Chunk, Credit, DenseCredit, SparseCredit, SumCredit
from scsdpo.loss.importance import (
    Importance,
    NoImportance,
    SamplerImportance,
    SequenceImportance,
    TokenImportance,
)
from scsdpo.loss.kernel import (
    HeadGradient,
    LossOutput,
    Objective,
    ObservedBlock,
    Observer,
    TeacherOutput,
    Tokens,
    chunks,
    credit_loss,
    unobserved,
)
from scsdpo.loss.logits import Buffers, Head, TokenLogits
from scsdpo.loss.signals import Derivation, NeedsSignals, Signals, mean_log_ratio

__all__ = [
    "Buffers",
    "Chunk",
    "Credit",
    "DenseCredit",
    "Derivation",
    "Head",
    "HeadGradient",
    "Importance",
    "LossOutput",
    "NeedsSignals",
    "NoImportance",
    "Objective",
    "ObservedBlock",
    "Observer",
    "SamplerImportance",
    "SequenceImportance",
    "Signals",
    "SparseCredit",
    "SumCredit",
    "TeacherOutput",
    "TokenImportance",
    "TokenLogits",
    "Tokens",
    "chunks",
    "credit_loss",
    "mean_log_ratio",
    "unobserved",
]
