"""Keys in this process's environment, and passwords in addresses, kept out of what is written down."""

import logging
import os
import re

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
