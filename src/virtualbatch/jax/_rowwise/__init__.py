"""Functions of rows on the memory of a micro-batch, which whoever differentiates them calls."""
