"""Windows of several processes: each runs its own rows, and gradients are added up once."""
