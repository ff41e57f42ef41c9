"""Runs on a cluster: `python -m pipelines submit | status | logs | cancel | watch | schedule`.

Exit status 0 done, 1 failed, 2 the user's mistake, 130 interrupted.
"""

import importlib
import sys
from typing import Any, List, Optional

import click

from distillery.errors import DistilleryError

# Command -> the module that has a function of its name; a module is imported when its command is asked for.
COMMANDS = {
    "submit": "pipelines.submit",
    "status": "pipelines.runs",
    "logs": "pipelines.runs",
    "cancel": "pipelines.runs",
    "watch": "pipelines.watch",
    "schedule": "pipelines.schedule",
    "doctor": "pipelines.doctor",
}


class Commands(click.Group):
    """The commands of the table, imported one at a time."""

    def list_commands(self, context: click.Context) -> List[str]:
        """Names in the table's order."""
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> Optional[click.Command]:
        """The command of that name."""
        found = getattr(importlib.import_module(COMMANDS[name]), name) if name in COMMANDS else None
        return found if isinstance(found, click.Command) else None


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
def app() -> None:
    """Run experiments on Kubeflow Pipelines, and look after the runs."""


def main(arguments: Optional[List[str]] = None) -> int:
    """Run one command; errors raised on purpose become one line and an exit status."""
    status: Any
    try:
        status = app.main(arguments, prog_name="python -m pipelines", standalone_mode=False)
    except DistilleryError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        place = f" {error.filename}" if error.filename else ""
        print(f"error: {error.strerror or error}{place}; check that place, then start again", file=sys.stderr)
        return 1
    return status if isinstance(status, int) else 0


if __name__ == "__main__":
    sys.exit(main())
