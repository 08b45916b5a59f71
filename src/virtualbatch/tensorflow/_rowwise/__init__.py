"""`rowwise`: what comes before rows meet, on the memory of a micro-batch."""
