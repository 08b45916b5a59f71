"""The command `virtualbatch`."""
