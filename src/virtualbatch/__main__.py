"""`python -m virtualbatch`, the same as the command `virtualbatch`."""

from virtualbatch.cli.app import app

app()
