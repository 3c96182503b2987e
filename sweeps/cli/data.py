"""Commands on text: lab data prepare, tokenizer, mix, show."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from lab.data.documents import MB
from lab.data.manifest import describe_skipped
from lab.data.prepare import Progress as Done
from lab.spec import Data

Source = Annotated[str, tyro.conf.Positional]
Sources = Annotated[tuple[str, ...], tyro.conf.Positional]


def data() -> None:
    """Text: prepare it, train a tokenizer on it, mix prepared corpora, show one.

    Example: lab data prepare ./novels --out data/novels
    Example: lab data tokenizer ./novels --vocabulary 4096 --out tokenizer.json
    Example: lab data mix data/novels=0.7 data/code=0.3 --out data/both
    Example: lab data show data/novels
    """


def prepare(
    source: Source,
    /,
    out: Path,
    tokenizer: str = "bytes",
    held_out: float = 0.05,
    column: str | None = None,
    source_column: str | None = None,
    target_column: str | None = None,
    config: str | None = None,
    split: str | None = None,
    licence: str | None = None,
    workers: int | None = None,
) -> None:
    """Tokenize a source of text into memory-mapped shards with a manifest; started again, it goes on where it was.

    Example: lab data prepare ./novels --out data/novels
    Example: lab data prepare wmt.parquet --source-column translation.de --target-column translation.en --out data/wmt
    Example: lab data prepare HuggingFaceFW/fineweb-edu --config sample-10BT --tokenizer tokenizer.json --out data/edu

    Args:
        source: a folder or file of plain text, JSON-lines (also .gz), parquet or ids (.npy, .bin), a data set's name on the
            Hugging Face hub or a folder that `datasets` saved, or a corpus of the lab's own, such as python
        out: the directory that is made
        tokenizer: bytes, a tokenizer.json, a sentencepiece .model, or a name on the hub
        held_out: share of the documents that is held out
        column: of JSON-lines, parquet and data sets, the one that is the text (default: text); nested ones by dots
        source_column: of pairs, the one that is the source
        target_column: of pairs, the one that is the target
        config: configuration of a Hugging Face data set
        split: split of a Hugging Face data set (default: train)
        licence: written into the manifest (default: what the data set says)
        workers: processes (default: one a core, where the text is large enough)
    """
    from lab.data.locate import locate
    from lab.data.prepare import prepare as prepared

    corpus, path = locate(source, **_given(column, source_column, target_column, config, split))
    with progress_bar() as report:
        described = prepared(
            corpus,
            path,
            out,
            tokenizer=tokenizer,
            held_out=held_out,
            licence=licence,
            workers=workers,
            report=report,
        )
    print(f"{out}: {described}\nleft out {describe_skipped(described.summary)}")
    _say_inexact(described.summary)


def tokenizer(
    source: Source,
    /,
    vocabulary: int,
    out: Path,
    megabytes: float = 256.0,
    column: str | None = None,
    source_column: str | None = None,
    target_column: str | None = None,
    config: str | None = None,
    split: str | None = None,
) -> None:
    """Train a byte-level BPE on a source of text; every text comes back from its tokens exactly.

    Example: lab data tokenizer ./novels --vocabulary 4096 --out tokenizer.json

    Args:
        source: as `lab data prepare` takes it
        vocabulary: how many ids: 256 are the bytes, the others are learned
        out: the file that is written
        megabytes: of text to learn from, at most, taken evenly from all of the source
        column: of JSON-lines, parquet and data sets, the one that is the text (default: text)
        source_column: of pairs, the one that is the source; both sides are learned from
        target_column: of pairs, the one that is the target
        config: configuration of a Hugging Face data set
        split: split of a Hugging Face data set (default: train)
    """
    from lab.data import subwords
    from lab.data.corpora import listing
    from lab.data.locate import locate
    from lab.records import write_bytes

    if not megabytes > 0:
        raise ValueError(f"megabytes = {megabytes}: use a number above 0")
    found = listing(*locate(source, **_given(column, source_column, target_column, config, split)))
    most = megabytes * MB / len(found.parts)

    def texts() -> Iterator[str]:
        for part in found.parts:
            left = most
            for document in part.read():
                content = document.content if isinstance(document.content, tuple) else (document.content,)
                for text in content:
                    if isinstance(text, str):
                        left -= len(text.encode("utf-8", "surrogatepass"))
                        yield text
                if left <= 0:
                    break

    with Console(stderr=True).status("a byte-level BPE is trained"):
        trained = subwords.train(texts(), vocabulary)
    write_bytes(out, trained.files[subwords.JSON])
    print(f"{out}: {trained.name}, {vocabulary:,} ids, {trained.token_bytes.mean():.2f} bytes an id on average")


def mix(weights: Sources, /, out: Path) -> None:
    """Mix prepared corpora by weight: in any number of first examples each has its share, whatever the worker count.

    Example: lab data mix data/novels=0.7 data/code=0.3 --out data/both

    Args:
        weights: directories that `lab data prepare` wrote, each with its weight
        out: the directory that is made; shards are linked where the file system can
    """
    from lab.data.mix import mix as mixed

    found: dict[str, float] = {}
    for word in weights:
        name, _, weight = word.rpartition("=")
        try:
            found[name] = float(weight)
        except ValueError:
            raise ValueError(f"{word!r}: write DIRECTORY=WEIGHT, such as data/novels=0.7") from None
        if not name or list(found).count(name) > 1:
            raise ValueError(f"{word!r}: write DIRECTORY=WEIGHT, such as data/novels=0.7")
    print(f"{out}: {mixed(found, out)}")


def show(directory: Source, /, documents: int = 3) -> None:
    """What a prepared corpus is: its splits, tokenizer, licence, sources, and the beginning of some documents.

    Example: lab data show data/novels

    Args:
        directory: that `lab data prepare` or `mix` wrote
        documents: how many to show
    """
    from lab.data import describe, load

    described = describe("prepared", directory)
    corpus, summary = load(described.data), described.summary
    console = Console(highlight=False)
    table = Table("split", "documents", "bytes", "tokens", "bytes a token", box=None, pad_edge=False)
    for split in ("train", "held_out"):
        sums = summary[split]
        each = sums["bytes"] / max(sums["tokens"], 1)
        table.add_row(split, *(f"{sums[name]:,}" for name in ("documents", "bytes", "tokens")), f"{each:.2f}")
    console.print(table)
    about = summary["tokenizer"]
    console.print(
        f"manifest {summary['manifest']}\ntokenizer {about['name']}, {about['vocabulary']:,} ids"
        f"\nlicence {summary['licence'] or 'not stated'}\nleft out {describe_skipped(summary)}\nshards {len(summary['shards'])}",
        markup=False,
        soft_wrap=True,
    )
    for part in summary.get("mixture", ()):
        console.print(f"{part['weight'] / 1e6:.4f} of the examples: {part['name']}", markup=False, soft_wrap=True)
    for source in summary["sources"][:8]:
        console.print(f"{source['name']} {source['version']}: {source['documents']:,} documents, {source['bytes'] / 1e6:.1f} MB",
                      markup=False, soft_wrap=True)  # fmt: skip
    _say_inexact(summary)
    count = len(corpus.train.lengths)
    for number in range(min(documents, count)):
        tokens = corpus.train.document(number * count // documents)
        console.print(f"\n{corpus.tokenizer.decode(tokens[:200])}", markup=False, soft_wrap=True)


COMMANDS: dict[str, Callable[..., None]] = {"prepare": prepare, "tokenizer": tokenizer, "mix": mix, "show": show}


def of_source(source: str | None, tokenizer: str | None) -> Data | None:
    """What --data names, prepared if need be, with a bar; None where it is not given. A tokenizer by itself is refused."""
    from sweeps.study import corpus

    if source is None:
        if tokenizer is not None:
            raise ValueError(
                f"tokenizer = {tokenizer!r}: the study's own text has its own: leave it out, or give --data too"
            )
        return None
    with progress_bar() as report:
        return corpus(source, tokenizer=tokenizer, report=report)


def check_source(planned: Iterable[Data], source: str | None, tokenizer: str | None) -> None:
    """Raises ValueError where --data or --tokenizer is not what runs that are planned already have."""
    from lab.data.locate import locate
    from lab.data.prepare import check_tokenizer

    for text in set(planned):
        if source is not None and locate(source) != (text.corpus, text.path):
            raise ValueError(
                f"data = {source!r}: the plan in this directory is of {text.path or text.corpus}: leave it out, or run the "
                "study by its name with another --out"
            )
        check_tokenizer(text, tokenizer)


@contextmanager
def progress_bar() -> Iterator[Callable[[Done], None]]:
    """A bar that appears with the first report."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("tokenizing", total=None, visible=False)

        def report(done: Done) -> None:
            # Within a part, of what it is known how much text is read: packed files grow, so never beyond the parts.
            known = max(done.source, min(done.text, done.of_source)) if done.of_source else done.text
            bar.update(
                task,
                completed=known,
                total=done.of_source or None,
                description=f"tokenizing, {done.parts} of {done.of_parts} parts",
                visible=True,
            )

        yield report


def _given(
    column: str | None, source_column: str | None, target_column: str | None, config: str | None, split: str | None
) -> dict[str, str | None]:
    return {
        "column": column,
        "source_column": source_column,
        "target_column": target_column,
        "config": config,
        "split": split,
    }


def _say_inexact(summary: dict) -> None:
    about = summary["tokenizer"]
    if not about["exact"]:
        print(
            f"note: {about['name']} changes text (in {about['inexact_documents']:,} documents): bits per byte are scaled by "
            f"{about['scale']:.6f}, so that the held-out total is right"
        )
