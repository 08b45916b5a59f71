"""It is right: accumulation compared with the uncut batch, and what breaks it by name."""
