"""Compares accumulation with the uncut batch, and names what breaks it."""
