"""scsdpo: self-distillation policy optimization of language models."""
