"""The policy and its frozen reference, the errors of both, and the rewards that they imply."""
