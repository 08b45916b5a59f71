"""`rowwise`: the part of a model before rows meet, run with the memory of a micro-batch."""
