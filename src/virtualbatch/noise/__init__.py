"""It pays: the noise of gradients, and which batch it speaks for."""
