"""Address -> random numbers: what is drawn depends on its address alone, never on what was drawn before."""
