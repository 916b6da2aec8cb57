"""Loss: one kernel that turns credit into gradients, whatever the objective."""

from scsdpo.loss.credit import Chunk, Credit, DenseCredit, SparseCredit, SumCredit
from scsdpo.loss.importance import (
    Importance,
    NoImportance,
    SamplerImportance,
    SequenceImportance,
    TokenImportance,
)
from scsdpo.loss.kernel import LossOutput, Objective, Tokens, Voice, chunks, credit_loss
from scsdpo.loss.logits import Buffers, Head, TokenLogits

__all__ = [
    "Buffers",
    "Chunk",
    "Credit",
    "DenseCredit",
    "Head",
    "Importance",
    "LossOutput",
    "NoImportance",
    "Objective",
    "SamplerImportance",
    "SequenceImportance",
    "SparseCredit",
    "SumCredit",
    "TokenImportance",
    "TokenLogits",
    "Tokens",
    "Voice",
    "chunks",
    "credit_loss",
]
