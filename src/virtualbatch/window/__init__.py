"""The law: how a batch is cut, what each micro-batch weighs, how results are put together."""
