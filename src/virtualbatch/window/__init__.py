"""How a batch is cut, what each micro-batch weighs, and how results are put together."""
