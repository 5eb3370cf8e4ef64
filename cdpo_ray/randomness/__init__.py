"""Addressed randomness: random numbers depend on their address only, never on earlier draws."""
