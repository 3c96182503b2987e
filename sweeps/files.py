"""Where a study's small files lie: a directory, or an object store that fsspec reaches. Names are relative, with '/'.

What the store needs of either: whole files or none, and `create`, of which exactly one of many callers wins. A directory gives
that by a hard link to a whole file (one system call, on NFS too); gs:// and s3:// by a conditional put, which fsspec calls
mode "create". Other schemes have no such thing and serve one worker, and so do servers that speak S3 and ignore the condition.
"""

import contextlib
import errno
import os
import shutil
import uuid
from pathlib import Path
from typing import Protocol

UNSUPPORTED = (errno.EPERM, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what a file system says to links and locks
CONDITIONAL_PUT = ("s3", "s3a", "gs", "gcs", "memory")


class Files(Protocol):
    @property
    def exclusive(self) -> bool:
        """Whether `create` has one winner, so that several workers may share the study."""
        ...

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError."""
        ...

    def tail(self, name: str, most: int) -> bytes:
        """Its last bytes, so many at most. Raises FileNotFoundError."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Whole and durable, or not at all."""
        ...

    def create(self, name: str, content: bytes) -> bool:
        """As write, but only where there is no such file; False where there is one."""
        ...

    def append(self, name: str, line: bytes) -> None: ...

    def names(self, directory: str) -> list[str]:
        """What lies in it; nothing where it is not there."""
        ...

    def exists(self, name: str) -> bool: ...

    def modified(self, name: str) -> float | None:
        """When it was written, in seconds since 1970; None where the store does not say. Raises FileNotFoundError."""
        ...

    def remove(self, name: str) -> None:
        """Does nothing where it is not there."""
        ...

    def sizes(self, directory: str) -> dict[str, int]:
        """Bytes of every file in it, however deep, by name; nothing where a link leads out of the study."""
        ...

    def remove_all(self, directory: str) -> None:
        """Does nothing where it is not there, or where a link leads out of the study."""
        ...


class Directory:
    exclusive = True

    def __init__(self, root: Path):
        self.root = Path(root)

    def __str__(self) -> str:
        return str(self.root)

    def path(self, name: str) -> Path:
        return self.root / name

    def read(self, name: str) -> bytes:
        return self.path(name).read_bytes()

    def tail(self, name: str, most: int) -> bytes:
        with self.path(name).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - most))
            return file.read()

    def write(self, name: str, content: bytes) -> None:
        temporary = self._temporary(name, content)
        try:
            temporary.replace(self.path(name))
        finally:
            temporary.unlink(missing_ok=True)

    def create(self, name: str, content: bytes) -> bool:
        target = self.path(name)
        temporary = self._temporary(name, content)
        try:
            target.hardlink_to(temporary)
        except FileExistsError:
            # NFS may have done it and lost the answer; then ours has two names (link(2), open(2) on O_EXCL).
            return temporary.stat().st_nlink == 2
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            raise ValueError(f"{self.root}: claims need hard links, not on this file system; use --out") from error
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _temporary(self, name: str, content: bytes) -> Path:
        target = self.path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        return temporary

    def append(self, name: str, line: bytes) -> None:
        self.path(name).parent.mkdir(parents=True, exist_ok=True)
        with self.path(name).open("ab") as file:
            file.write(line)

    def names(self, directory: str) -> list[str]:
        try:
            return [path.name for path in os.scandir(self.path(directory))]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def exists(self, name: str) -> bool:
        return self.path(name).exists()

    def modified(self, name: str) -> float:
        return self.path(name).stat().st_mtime

    def remove(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)

    def sizes(self, directory: str) -> dict[str, int]:
        if not self._is_inside(directory):
            return {}
        found = self.path(directory).rglob("*")
        return {path.relative_to(self.root).as_posix(): path.stat().st_size for path in found if path.is_file()}

    def remove_all(self, directory: str) -> None:
        if self._is_inside(directory):
            shutil.rmtree(self.path(directory), ignore_errors=True)

    def _is_inside(self, name: str) -> bool:
        """Whether it lies below the root, also where a part of its path is a link."""
        return self.path(name).resolve().is_relative_to(self.root.resolve())


class Objects:
    """root: such as gs://bucket/studies/one."""

    def __init__(self, root: str):
        import fsspec

        self.root = root.rstrip("/")
        self._exclusive: bool | None = None
        self.conditional = self.root.partition("://")[0] in CONDITIONAL_PUT  # as far as fsspec goes
        try:
            self.system, self.prefix = fsspec.core.url_to_fs(self.root, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{root}: {error}; a directory needs nothing, gs:// gcsfs, s3:// s3fs") from error

    @property
    def exclusive(self) -> bool:
        """Asked of the store itself, once: some that speak S3 take a conditional put and ignore its condition."""
        if self._exclusive is None:
            self._exclusive = self.conditional and self._keeps_conditions()
        return self._exclusive

    def _keeps_conditions(self) -> bool:
        name = f".create-{uuid.uuid4().hex}"
        try:
            return self.create(name, b"") and not self.create(name, b"")
        except NotImplementedError:
            return False
        finally:
            self.remove(name)

    def __str__(self) -> str:
        return self.root

    def path(self, name: str) -> str:
        return f"{self.prefix}/{name}"

    def read(self, name: str) -> bytes:
        return self.system.cat_file(self.path(name))

    def tail(self, name: str, most: int) -> bytes:
        return self.system.tail(self.path(name), most)

    def _new(self, name: str) -> str:
        """Its path, in a directory that is there, where the store has such."""
        path = self.path(name)
        if not self.conditional:
            self.system.makedirs(path.rpartition("/")[0], exist_ok=True)
        return path

    def write(self, name: str, content: bytes) -> None:
        self.system.pipe_file(self._new(name), content)

    def create(self, name: str, content: bytes) -> bool:
        try:
            self.system.pipe_file(self._new(name), content, mode="create")
        except FileExistsError:
            return False
        return True

    def append(self, name: str, line: bytes) -> None:
        """By writing it anew: for small files of one writer."""
        before = self.read(name) if self.exists(name) else b""
        self.write(name, before + line)

    def names(self, directory: str) -> list[str]:
        try:
            found = self.system.ls(self.path(directory), detail=False)
        except FileNotFoundError:
            return []
        return [name.rstrip("/").rpartition("/")[2] for name in found]

    def exists(self, name: str) -> bool:
        return self.system.exists(self.path(name))

    def modified(self, name: str) -> float | None:
        try:
            return self.system.modified(self.path(name)).timestamp()
        except NotImplementedError:
            return None

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.system.rm_file(self.path(name))

    def sizes(self, directory: str) -> dict[str, int]:
        found = self.system.find(self.path(directory), detail=True)
        return {path.removeprefix(f"{self.prefix}/"): one["size"] for path, one in found.items()}

    def remove_all(self, directory: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.system.rm(self.path(directory), recursive=True)

    def send(self, path: Path, name: str) -> None:
        self.system.put_file(str(path), self._new(name))

    def fetch(self, name: str, path: Path) -> None:
        """Raises FileNotFoundError."""
        self.system.get_file(self.path(name), str(path))


def is_remote(root: Path | str) -> bool:
    """Whether it names an object store, such as gs://bucket/study."""
    return "://" in str(root)


def files_at(root: Path | str) -> Directory | Objects:
    return Objects(str(root)) if is_remote(root) else Directory(Path(root))


def check_path(name: str) -> None:
    """Of a file in an object store, where keys may be anything: raises ValueError unless it names one below the study."""
    if "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError(
            f"object {name!r}: this key leaves the study's directory, and is not brought here; delete it there"
        )


def check_name(field: str, name: str) -> None:
    """A plan is data: its ids name files under the study's own directory and nothing else."""
    if not name or name.startswith(".") or not all(c.isalnum() or c in "-_." for c in name):
        raise ValueError(
            f"{field} = {name!r}: letters, digits, '-', '_' and '.' only; this plan was not written by the lab"
        )
