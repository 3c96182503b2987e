"""Keys in this process's environment, kept out of what is written down."""

import logging
import os
import re

SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?(_|$)", re.IGNORECASE)
SHORTEST = 4  # characters: a shorter value would be found everywhere


def redacted(text: str) -> str:
    """`text` without the values of environment variables that are named like keys, tokens, secrets and passwords."""
    values = {value: name for name, value in os.environ.items() if SECRET.search(name) and len(value) >= SHORTEST}
    for value in sorted(values, key=len, reverse=True):  # one may be a part of another
        text = text.replace(value, f"[{values[value]}]")
    return text


class Formatter(logging.Formatter):
    """As logging's, with messages and tracebacks redacted."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))
