"""The command `virtualbatch`, or what to install for it."""

import sys

_TOOLS = ("rich", "typer")


def main() -> None:
    """Runs the command; exits with 2 if its tools are not installed."""
    try:
        from virtualbatch.cli.app import app
    except ModuleNotFoundError as error:
        tool = (error.name or "").partition(".")[0]
        if tool not in _TOOLS:
            raise
        print(
            f"The command virtualbatch needs {' and '.join(_TOOLS)}. Got no {tool}. "
            'Run: pip install "virtualbatch[cli]"',
            file=sys.stderr,
        )
        sys.exit(2)
    app()
