"""How fast text is prepared, beside copying it and beside the `tokenizers` library alone; how soon a batch is there.

    python tests/benchmarks/data.py [--megabytes 256] [--rounds 3] [--only bytes,bpe,batch]

bytes: the installed Python source, until there are so many MB of it, as JSON-lines, parquet, a folder and one file, prepared by
two workers; beside it a plain copy of the same file. bpe: the same text, an eighth of it, tokenized by the library's own
encode_batch_fast on as many threads, and by `prepare`, which also reads, hashes and stores it; rounds take turns. batch: a
manifest of 100 GB whose shards are holes in files, opened by a fresh process that reads batches at steps all over it; the
system's cache is told to forget the files first. Medians.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lab.data import Examples, load, subwords
from lab.data.corpora import listing
from lab.data.prepare import describe, prepare
from lab.records import SCHEMA, write_json

WORKERS = 2
SHARD, DOCUMENT = 96 * 2**20, 4096  # as large as parts of 100 GB are


def texts(megabytes: float) -> list[str]:
    """Different documents of real text: each round through the source begins its documents anew."""
    found, size, round_ = [], 0.0, 0
    while True:
        for document in listing("python").read():
            if isinstance(document.content, str) and document.content:
                found.append(f"# {round_}\n{document.content}")
                size += len(found[-1].encode()) / 1e6
                if size >= megabytes:
                    return found
        round_ += 1


def forms(root: Path, documents: list[str]) -> dict[str, Path]:
    made = {
        "jsonl": root / "text.jsonl",
        "parquet": root / "text.parquet",
        "folder": root / "folder",
        "file": root / "text.txt",
    }
    with made["jsonl"].open("w") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    pq.write_table(pa.table({"text": documents}), made["parquet"], row_group_size=1000)
    made["folder"].mkdir()
    for number, text in enumerate(documents):
        (made["folder"] / f"{number:06d}.py").write_text(text)
    made["file"].write_text("\n\n".join(documents))
    return made


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def prepared(form: str, path: Path, out: Path, tokenizer: str = "bytes") -> tuple[float, float]:
    """Seconds, and seconds of the processor in this process and its workers."""
    shutil.rmtree(out, ignore_errors=True)
    corpus, spent = "text" if form in ("folder", "file") else form, processor()
    taken = seconds(lambda: prepare(corpus, path, out, tokenizer=tokenizer, workers=WORKERS))
    return taken, processor() - spent


def processor() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def copied(path: Path, out: Path) -> None:
    shutil.copyfile(path, out)
    with out.open("rb+") as stream:
        os.fsync(stream.fileno())


def load_() -> str:
    return " ".join(f"{one:.1f}" for one in os.getloadavg())


def bytes_(root: Path, megabytes: float, rounds: int) -> None:
    documents = texts(megabytes)
    size = sum(len(text.encode()) for text in documents) / 1e6
    made = forms(root, documents)
    copies, found = [], {form: [] for form in made}
    for _ in range(rounds):
        copies.append(seconds(lambda: copied(made["jsonl"], root / "copy")))
        for form, path in made.items():
            found[form].append(prepared(form, path, root / "out"))
    copy = size / statistics.median(copies)
    print(
        f"\nbytes: {size:.0f} MB in {len(documents):,} documents, {WORKERS} workers; a copy {copy:.0f} MB/s; load {load_()}"
    )
    for form, taken in found.items():
        speed, of_processor = (size / statistics.median(one) for one in zip(*taken, strict=True))
        print(f"{form:8} {speed:6.0f} MB/s, {speed / copy:.2f} of a copy; {of_processor:.0f} MB a second of one core")


LIBRARY = """
import json, sys, time
import tokenizers
texts = json.load(open(sys.argv[1]))
loaded = tokenizers.Tokenizer.from_file(sys.argv[2])
loaded.encode_batch_fast(texts[:50], add_special_tokens=False)
began, spent = time.perf_counter(), time.process_time()
loaded.encode_batch_fast(texts, add_special_tokens=False)
print(time.perf_counter() - began, time.process_time() - spent)
"""


def bpe(root: Path, megabytes: float, rounds: int) -> None:
    documents = texts(megabytes / 8)
    size = sum(len(text.encode()) for text in documents) / 1e6
    tokenizer = subwords.train(documents[:500], 4096)
    (root / "tokenizer.json").write_bytes(tokenizer.files["tokenizer.json"])
    (root / "texts.json").write_text(json.dumps(documents))
    with (root / "bpe.jsonl").open("w") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    command = [sys.executable, "-c", LIBRARY, str(root / "texts.json"), str(root / "tokenizer.json")]
    environment = {**os.environ, "RAYON_NUM_THREADS": str(WORKERS)}
    library, ours = [], []
    from lab.data import documents as parts

    parts.PART = max(2**20, int(size * 1e6 / 8))  # eight parts, so that the two workers end together
    for _ in range(rounds):
        answer = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        library.append(tuple(map(float, answer.split())))
        ours.append(prepared("jsonl", root / "bpe.jsonl", root / "out", str(root / "tokenizer.json")))
    print(f"\nBPE of 4,096: {size:.0f} MB, {WORKERS} threads or workers; load {load_()}")
    for place, what in enumerate(("a second", "a second of one core")):
        alone, whole = ([one[place] for one in taken] for taken in (library, ours))
        ratio = statistics.median(x / y for x, y in zip(alone, whole, strict=True))
        library_, prepare_ = (size / statistics.median(taken) for taken in (alone, whole))
        print(f"library {library_:.2f} MB, prepare {prepare_:.2f} MB {what}: {ratio:.0%}")


def hollow(directory: Path, gigabytes: float = 100.0) -> None:
    """A prepared directory of so many bytes, whose shards take no space."""
    (directory / "shards").mkdir(parents=True)
    count = int(gigabytes * 1e9 // SHARD)
    shards = [{"file": f"shards/{number:05d}.bin", "tokens": SHARD} for number in range(count)]
    for shard in shards:
        with (directory / shard["file"]).open("wb") as stream:
            stream.truncate(SHARD)
    starts = np.arange(0, count * SHARD, DOCUMENT, dtype=np.int64)
    held = np.zeros(len(starts), bool)
    held[::20] = True
    sums = {}
    for name, mask in (("train", ~held), ("held_out", held)):
        np.save(directory / f"{name}.starts.npy", starts[mask])
        np.save(directory / f"{name}.lengths.npy", np.full(int(mask.sum()), DOCUMENT, np.int64))
        sums[name] = {
            what: int(mask.sum()) * each for what, each in (("documents", 1), ("bytes", DOCUMENT), ("tokens", DOCUMENT))
        }
    about = {"name": "bytes", "vocabulary": 256, "files": {}, "exact": True, "inexact_documents": 0, "scale": 1.0}
    write_json(directory / "manifest.json", {
        "schema": SCHEMA, "corpus": "hollow", "manifest": "0" * 64, "licence": None, "tokenizer": about, "pairs": False,
        "held_out_share": 0.05, **sums, "skipped": {}, "sources": [], "moved": False, "unused_tokens": 0, "shards": shards,
    })  # fmt: skip


def forget(directory: Path) -> None:
    os.sync()
    for file in directory.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def batches(directory: Path, batch: int, length: int, count: int = 200) -> None:
    from grain.experimental import index_shuffle

    index_shuffle(0, max_index=1, seed=0, rounds=4)  # what is imported is not what is measured
    began = time.perf_counter()
    corpus = load(describe("prepared", directory).data)
    opened = time.perf_counter() - began
    began = time.perf_counter()
    examples = Examples(corpus, length, seed=0)
    indexed = time.perf_counter() - began
    steps = np.random.default_rng(0).integers(0, examples.windows // batch, count)
    taken = [seconds(lambda step=step: examples.batch(int(step), batch)) for step in steps]
    status = Path("/proc/self/status").read_text()
    resident = int(status.split("VmRSS:")[1].split()[0]) / 1024
    print(json.dumps({"opened": opened, "indexed": indexed, "first": taken[0], "median": statistics.median(taken),
                      "p95": float(np.quantile(taken, 0.95)), "resident": resident, "windows": examples.windows}))  # fmt: skip


def batch(root: Path, rounds: int) -> None:
    directory = root / "hollow"
    hollow(directory)
    print(
        f"\nbatches of 100 GB, each at a step far from the last; every round a fresh process, nothing cached; load {load_()}"
    )
    for size, length in ((8, 128), (16, 256), (32, 1024)):
        found = []
        for _ in range(rounds):
            forget(directory)
            command = [sys.executable, __file__, "--batches", f"{directory},{size},{length}"]
            found.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
        print(
            f"{size} x {length}: median {1e3 * middle['median']:.3f} ms = {middle['median'] / 0.05:.2%} of 50 ms, 95% "
            f"{1e3 * middle['p95']:.3f} ms, first {1e3 * middle['first']:.2f} ms; opened in {1e3 * middle['opened']:.0f} ms, "
            f"windows counted in {1e3 * middle['indexed']:.0f} ms; {middle['windows']:,.0f} windows, "
            f"{middle['resident']:.0f} MiB resident"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="bytes,bpe,batch")
    parser.add_argument("--batches", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.batches:
        directory, size, length = given.batches.split(",")
        batches(Path(directory), int(size), int(length))
        return
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        os.environ["BITTERLAB_CACHE"] = str(root / "cache")
        if "bytes" in given.only:
            bytes_(root, given.megabytes, given.rounds)
        if "bpe" in given.only:
            bpe(root, given.megabytes, given.rounds)
        if "batch" in given.only:
            batch(root, given.rounds)


if __name__ == "__main__":
    main()
