"""Policy and frozen reference, the errors of both, and implicit rewards."""
