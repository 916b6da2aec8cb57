"""Analysis: what a policy's teacher says, measured without training."""
