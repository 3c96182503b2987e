"""The parts of a corpus, tokenized by one process or by several.

Workers are plain subprocesses, so that a program which prepares need not guard its main module.
Each lists the corpus itself, is told numbers of parts on its standard input, and answers in JSON lines.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.data import documents
from lab.data.documents import Listing
from lab.data.parts import done, write_part
from lab.data.tokenizers import Tokenizer

# Fewer parts than so many a worker do not pay for the second it takes to start.
WORTH = 2


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Parts, and bytes of the source, that are done; text: UTF-8 bytes tokenized since this process began."""

    parts: int
    of_parts: int
    source: int
    of_source: int
    text: int


def run(
    found: Listing,
    tokenizer: Tokenizer,
    directory: Path,
    *,
    corpus: str,
    tokenizer_path: str,
    workers: int | None = None,
    report: Callable[[Progress], None] | None = None,
) -> None:
    """Writes every part that is not yet done. workers: by default the cores there are, where the parts are worth it."""
    left = [number for number in range(len(found.parts)) if not done(directory, number)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(cores, len(left) // WORTH) if workers is None else min(workers, len(left))
    tally = _Tally(found, left, report)
    if count <= 1:
        for number in left:
            write_part(found.parts[number], tokenizer, directory, number, tally.read)
            tally.finished(number)
        return
    task = {
        "corpus": corpus,
        "path": found.path,
        "fingerprint": found.fingerprint,
        "tokenizer": tokenizer_path,
        "directory": str(directory),
        "part": documents.PART,
    }
    _share(task, left, count, tally)


class _Tally:
    def __init__(self, found: Listing, left: Sequence[int], report: Callable[[Progress], None] | None):
        self.sizes, self.report, self.lock = [part.size for part in found.parts], report, threading.Lock()
        waiting = set(left)
        self.parts = len(self.sizes) - len(left)
        self.source = sum(size for number, size in enumerate(self.sizes) if number not in waiting)
        self.text = 0

    def read(self, text: int) -> None:
        with self.lock:
            self.text += text
            self._tell()

    def finished(self, number: int) -> None:
        with self.lock:
            self.parts, self.source = self.parts + 1, self.source + self.sizes[number]
            self._tell()

    def _tell(self) -> None:
        if self.report is not None:
            self.report(
                Progress(
                    parts=self.parts,
                    of_parts=len(self.sizes),
                    source=self.source,
                    of_source=sum(self.sizes),
                    text=self.text,
                )
            )


def _share(task: dict[str, Any], left: Sequence[int], count: int, tally: _Tally) -> None:
    """Raises the ValueError or OSError that a worker tells of, RuntimeError where one dies without a word."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    command = [sys.executable, "-c", "from lab.data.workers import serve; serve()"]
    waiting, errors, lock = list(reversed(left)), [], threading.Lock()
    processes = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True, errors="replace"
        )
        for _ in range(count)
    ]

    def drive(process: subprocess.Popen[str]) -> None:
        assert process.stdin and process.stdout
        try:
            process.stdin.write(json.dumps(task) + "\n")
            while True:
                with lock:
                    if not waiting or errors:
                        return
                    number = waiting.pop()
                process.stdin.write(f"{number}\n")
                process.stdin.flush()
                for line in process.stdout:
                    said = _understood(line)
                    if "text" in said:
                        tally.read(said["text"])
                    elif "error" in said:
                        raise _error(said)
                    elif "done" in said:
                        tally.finished(number)
                        break
                else:
                    raise RuntimeError(
                        f"a worker ended with status {process.wait()} in part {number}, such as for want of memory; the same "
                        "command goes on from the parts that are done"
                    )
        except (ValueError, RuntimeError, OSError) as error:
            with lock:
                errors.append(error)

    threads = [threading.Thread(target=drive, args=(process,), daemon=True) for process in processes]
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and not errors:
            time.sleep(0.02)
    finally:
        # Whatever happened: no worker goes on without the process that asked for its work.
        for process in processes:
            assert process.stdin and process.stdout
            if errors or any(thread.is_alive() for thread in threads):
                process.kill()
            else:
                process.stdin.close()
            process.wait()
        for thread in threads:
            thread.join()
        for process in processes:
            assert process.stdin and process.stdout
            process.stdout.close()
            if not process.stdin.closed:
                with contextlib.suppress(OSError):  # what it was to be told
                    process.stdin.close()
    if errors:
        raise errors[0]


def _understood(line: str) -> dict[str, Any]:
    """What a worker said; nothing of a line that it was killed in, or that a library printed."""
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _told(error: ValueError | OSError) -> dict[str, Any]:
    """An error as JSON, of which `_error` makes one of the same kind: whether finished parts stay depends on it."""
    if not isinstance(error, OSError):
        return {"error": str(error)}
    known = error.errno is not None
    number, text = (error.errno, error.strerror) if known else (None, str(error))
    return {"error": text, "system": True, "errno": number, "file": str(error.filename) if error.filename else None}


def _error(said: dict[str, Any]) -> ValueError | OSError:
    if "system" not in said:
        return ValueError(said["error"])
    return OSError(said["error"]) if said["errno"] is None else OSError(said["errno"], said["error"], said["file"])


def serve() -> None:
    """What a worker does."""
    from lab.data.corpora import listing
    from lab.data.subwords import find

    def say(**values: Any) -> None:
        print(json.dumps(values), flush=True)

    task = json.loads(sys.stdin.readline())
    documents.PART = task["part"]
    try:
        found, tokenizer = listing(task["corpus"], task["path"]), find(task["tokenizer"])
        if found.fingerprint != task["fingerprint"]:
            raise ValueError(
                f"data.path = {task['path']!r}: it changed while it was prepared: run the same command again"
            )
        for line in sys.stdin:
            # A parent that died closed the pipe: what was begun is finished, and nothing more.
            write_part(
                found.parts[int(line)], tokenizer, Path(task["directory"]), int(line), lambda text: say(text=text)
            )
            say(done=int(line))
    except (ValueError, OSError) as error:
        say(**_told(error))
