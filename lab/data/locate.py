"""What a person means by a source of text: a corpus's name, a prepared directory, files, or a data set's name on the hub."""

from pathlib import Path

from lab.checks import nearest
from lab.data.corpora import CORPORA, PREPARED
from lab.data.manifest import FILE
from lab.data.tables import JSON_SUFFIXES, PARQUET_SUFFIXES
from lab.data.text_files import existing, folder_files
from lab.data.token_files import SUFFIXES


def locate(source: str | Path, path: str | Path | None = None, **settings: str | None) -> tuple[str, str | None]:
    """Corpus and path of a source; `settings` that are not None go into the corpus's name (lab.data.corpora.listing), and so
    do those that the source ends in (DIR:column=body). Where `path` is given, `source` is a corpus's name already.

    A folder is what its files are: of one kind if all of them are, READMEs and licences excepted, of text otherwise. Raises
    ValueError for what is neither here nor looks like a name on the hub.
    """
    source, _, own = str(source).partition(":") if not Path(source).exists() else (str(source), "", "")
    given = ",".join(filter(None, [own, *(f"{name}={value}" for name, value in settings.items() if value is not None)]))
    here = Path(source).expanduser()
    if path is not None or (source in CORPORA and not here.exists()):
        return _named(source, given), None if path is None else str(path)
    if here.exists():
        kind, source = _kind(here), str(here.absolute())
    elif source.count("/") == 1 and not source.startswith((".", "/", "~")) and not here.parent.exists():
        kind = "hf"
    elif "/" in source or here.suffix:
        existing(source)  # says what is there instead
        raise AssertionError(source)
    else:
        raise ValueError(
            f"source {source!r}: no such file or folder, and no corpus: {nearest(source, list(CORPORA))}, or give a path or a "
            "name on the Hugging Face hub (owner/name)"
        )
    if kind == PREPARED and given:
        raise ValueError(
            f"{source}: it is prepared, so that {given} changes nothing: leave it out, or prepare its source"
        )
    return _named(kind, given), source


def _named(corpus: str, settings: str) -> str:
    return f"{corpus}:{settings}" if settings else corpus


def _kind(path: Path) -> str:
    if path.is_dir():
        if (path / FILE).exists():
            return PREPARED
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return "hf"  # save_to_disk
        names = folder_files(path)
    else:
        names = [path.name]
    # What lies beside data on the hub.
    names = [
        name for name in names if not Path(name).name.upper().startswith(("README", "LICEN", "DATASET_INFOS"))
    ] or names
    for kind, suffixes in (("parquet", PARQUET_SUFFIXES), ("jsonl", JSON_SUFFIXES), ("tokens", SUFFIXES)):
        if names and all(name.endswith(suffixes) for name in names):
            return kind
    return "text"
