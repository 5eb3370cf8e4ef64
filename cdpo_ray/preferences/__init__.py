"""Human preference data -> samples."""
