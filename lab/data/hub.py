"""Hugging Face data sets: a name on the hub, such as HuggingFaceFW/fineweb-edu, or a local folder that `datasets` can load.

Rows are streamed once, as Arrow tables; the shards that the library itself cuts a data set into are the parts.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lab.checks import nearest
from lab.data.columns import Columns
from lab.data.documents import MOST_PARTS, Document, Listing, Part, digest, states
from lab.data.text_files import folder_files

ROWS = 256  # in a table
ROWS_OF_PART = 10_000  # of what was saved to disk, which is not in shards


class Unreachable(OSError):
    """The hub failed, or has no such thing: which of them, its libraries do not say surely. Not the source's fault, so
    that shards which were read before stay."""


def hf(
    path: str | None = None,
    *,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    column: str | None = None,
    source_column: str | None = None,
    target_column: str | None = None,
) -> Listing:
    """One split of one configuration. revision: a commit or tag on the hub (default: the newest). Raises Unreachable, also
    while it is read, for what the hub does not give."""
    if path is None:
        raise ValueError("data.path = None: corpus 'hf' needs a data set's name on the hub or a local folder")
    columns = Columns.of(column, source_column, target_column)
    datasets = library("datasets")
    folder = Path(path).expanduser().absolute()
    local = folder.exists()
    fault = ValueError if local else Unreachable
    if local:
        state: Any = states(folder, folder_files(folder))
        path = str(folder)
    else:
        revision = state = _commit(path, revision)
    saved = local and (folder / "dataset_info.json").exists() and (folder / "state.json").exists()
    saved = saved or (local and (folder / "dataset_dict.json").exists())

    def load() -> Any:
        try:
            if saved:
                return _saved(datasets, path, split)
            quiet = datasets.DownloadConfig(disable_tqdm=True)
            return datasets.load_dataset(
                path, config, split=split, revision=revision, streaming=True, download_config=quiet
            )
        except Exception as error:  # the library raises its own, OSErrors, ValueErrors and what servers answer
            raise fault(
                f"data.path = {path!r}: `datasets` can not load configuration {config!r}, split {split!r}: "
                f"{type(error).__name__}: {error}: choose them with --config and --split"
            ) from error

    found = load()
    count = found.num_shards
    licence = (found.info.license if found.info else None) or None

    def part(index: int) -> Callable[[], Iterator[Document]]:
        def read() -> Iterator[Document]:
            where, number = f"{path}, shard {index} of {count}", 0
            shard = load().shard(num_shards=count, index=index).with_format("arrow")
            tables = iter(shard.iter(batch_size=ROWS))
            while True:
                try:
                    table = next(tables, None)
                except Exception as error:
                    remedy = "mend it" if local else "the same command goes on from the shards that were read"
                    raise fault(f"{where}, after row {number}: {type(error).__name__}: {error}: {remedy}") from error
                if table is None:
                    return
                for content in columns.of_table(table, number, where):
                    name = f"{split}/{index:05d}"
                    yield Document(
                        source=str(path), version=str(revision or ""), file=name, content=content, number=number
                    )
                    number += 1

        return read

    return Listing(
        path=path,
        fingerprint=digest(["hf", path, config, split, state, columns.names]),
        parts=[Part(read=part(index)) for index in range(count)],
        licence=licence,
    )


def library(name: str) -> Any:
    """An optional library; ValueError with the command that installs it."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{name} is not installed ({error}): pip install 'bitterlab[hf]'") from error


def _commit(path: str, revision: str | None) -> str:
    """What the hub has under this name: its commit, so that every part and every machine reads the same."""
    hub = library("huggingface_hub")
    try:
        return str(hub.HfApi().dataset_info(path, revision=revision).sha)
    except Exception as error:
        raise Unreachable(
            f"data.path = {path!r}: no such file or folder here, and the hub has no such data set or can not be reached "
            f"({type(error).__name__}): check the name, or fetch it elsewhere and give its folder"
        ) from error


def _saved(datasets: Any, path: str, split: str) -> Any:
    """What `save_to_disk` wrote: one set, or a dictionary of splits."""
    found = datasets.load_from_disk(path)
    if isinstance(found, dict):
        if split not in found:
            raise ValueError(f"split = {split!r}: {nearest(split, list(found))}")
        found = found[split]
    return found.to_iterable_dataset(num_shards=max(1, min(len(found) // ROWS_OF_PART, MOST_PARTS)))
