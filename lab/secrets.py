"""Keys in this process's environment, and passwords in addresses, kept out of what is written down."""

import contextlib
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from types import TracebackType

# Words that a variable's name ends in, or that stand before an underscore; the short ones between underscores only (a PATH
# and a PWD are none).
SECRET = re.compile(
    r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL)S?(_|$)|(^|_)(PAT|PASS)S?(_|$)|_PWD(_|$)", re.IGNORECASE
)
SHORTEST = 4  # characters: a shorter value would be found everywhere
# scheme://user:password@host; a password may hold an @, and no / that is not written as %2F.
ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^\s/:@'\"]*:)[^\s/'\"]+@")


def is_secret(name: str) -> bool:
    """Whether an environment variable is named like a key, a token, a secret, a password or credentials."""
    return SECRET.search(name) is not None


def redacted(text: str) -> str:
    """`text` without the values of environment variables that are named like keys, tokens, secrets, passwords and credentials,
    and without the passwords of addresses."""
    values = {value: name for name, value in os.environ.items() if is_secret(name) and len(value) >= SHORTEST}
    for value in sorted(values, key=len, reverse=True):  # one may be a part of another
        text = text.replace(value, f"[{values[value]}]")
    return ADDRESS.sub(r"\1[password]@", text)


class Formatter(logging.Formatter):
    """As logging's, with messages and tracebacks redacted."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As sys.excepthook: what a process dies of, redacted."""
    sys.stderr.write(redacted("".join(traceback.format_exception(kind, error, trace))))


@contextlib.contextmanager
def masked_threads() -> Iterator[None]:
    """Meanwhile, what threads of this process die of is redacted."""
    before = threading.excepthook

    def hook(died: threading.ExceptHookArgs) -> None:
        if issubclass(died.exc_type, SystemExit):  # how a thread may leave, as Python's own hook has it
            return
        name = died.thread.name if died.thread else "that is gone"
        trace = traceback.format_exception(died.exc_type, died.exc_value, died.exc_traceback)
        sys.stderr.write(redacted(f"Exception in thread {name}:\n{''.join(trace)}"))

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before
