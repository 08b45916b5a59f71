"""Windows of several processes: each runs its own rows, all agree, and gradients meet once."""
