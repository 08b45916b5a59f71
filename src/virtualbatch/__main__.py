"""`python -m virtualbatch`, the same as the command `virtualbatch`."""

from virtualbatch.cli.main import main

main()
