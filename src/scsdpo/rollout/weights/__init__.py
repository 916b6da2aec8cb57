"""The policy's weights on their way to an engine."""
