"""A copy of the code that a study is trained with, so that jobs which wait in a queue do not pick up later edits."""

import hashlib
import shutil
import uuid
from pathlib import Path

PACKAGES = ("lab", "sweeps", "analysis")
DIRECTORY = "code"


def snapshot(study: Path) -> Path:
    """`<study>/code/<digest>`, to go first on PYTHONPATH: the lab's packages as they are now. Made once for each content."""
    root = Path(__file__).parent.parent.parent
    files = [path for package in PACKAGES for path in sorted((root / package).rglob("*")) if _counts(path)]
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    target = Path(study).absolute() / DIRECTORY / digest.hexdigest()[:16]
    if target.exists():
        return target
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        for path in files:
            copy = partial / path.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        try:
            partial.rename(target)
        except OSError:
            if not target.exists():  # else another was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _counts(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts
