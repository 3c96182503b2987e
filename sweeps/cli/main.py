"""The command `lab`."""

import logging
import sys
from collections.abc import Sequence
from typing import NoReturn

import tyro
from rich.console import Console
from rich.logging import RichHandler

from lab import secrets
from lab.preemption import Preempted
from sweeps.cli import arms, calibration, control, data, fits, futures, runs, serving, studies, tuning

COMMANDS = {
    "quickstart": studies.quickstart,
    "plan": studies.plan,
    "run": studies.run,
    "tune": tuning.tune,
    "report": fits.report,
    "data": data.data,
    # A study that runs, or has run.
    "status": control.status,
    "logs": control.logs,
    "retry": control.retry,
    "cancel": control.cancel,
    "gc": control.gc,
    "export": control.export,
    # One run.
    "describe": runs.describe,
    "flops": runs.flops,
    "train": runs.train,
    "calibrate": calibration.calibrate,
    "sample": serving.sample,
    "evaluate": serving.evaluate,
    "serve-cost": serving.serve_cost,
    # Laws on any table of runs.
    "fit": fits.fit,
    "compare": arms.compare,
    "forecast": futures.forecast,
    "design": futures.design,
}
DESCRIPTION = (
    "Bitterlab: does a piece of structure still pay when compute grows? Start with `lab quickstart`. "
    "`lab COMMAND --help` shows an example of each command; --debug shows the traceback of an error."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command. Exit status: 0 done, 1 some runs failed, 2 an error, 75 stopped and saved, to be started again."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [word for word in arguments if word != "--debug"] or ["--help"]
    handler = RichHandler(console=Console(stderr=True), show_path=False)
    handler.setFormatter(secrets.Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        with secrets.masked_threads():
            _command(arguments)
    except (ValueError, OSError) as error:
        if debug:
            _fall(error)
        Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {_plain(error)}", soft_wrap=True)
        sys.exit(2)
    except Preempted:
        Console(stderr=True).print("stopped and saved; the same command goes on from here")
        raise
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; the same command goes on from the last checkpoints")
        sys.exit(130)
    except Exception as error:  # the lab's own mistake
        _fall(error)


def _command(arguments: list[str]) -> None:
    commands, named, about = COMMANDS, "lab", DESCRIPTION
    if arguments[0] == "data":
        commands, named, about, arguments = data.COMMANDS, "lab data", data.data.__doc__, arguments[1:] or ["--help"]
    tyro.extras.subcommand_cli_from_dict(commands, prog=named, description=about, args=arguments)


def _plain(error: Exception) -> str:
    return secrets.redacted(str(error)).replace("[", r"\[")


def _fall(error: Exception) -> NoReturn:
    """Leaves with the traceback, as Python does, but without keys; with status 2, since 1 says that some runs failed."""
    secrets.excepthook(type(error), error, error.__traceback__)
    sys.exit(2)


if __name__ == "__main__":
    main()
