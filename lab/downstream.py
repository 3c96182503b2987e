"""What a trained model does with a task, beside its loss: choices ranked by likelihood, and targets that are written out.

choices   JSON lines {"context": text, "choices": [text, ..], "answer": index}: the log-likelihood of each choice as targets
          after the context as inputs, raw, per token and per UTF-8 byte, as lm-evaluation-harness ranks them (its acc and
          acc_norm are the first and the last); accuracy of each with its standard error.
pairs     JSON lines {"source": text, "target": text}: the target is written greedily until SEP ends it; exact match, and chrF
          (Popović 2015) as sacreBLEU computes it.

Other keys of a line are left alone. Contexts and sources are read whole, however many inputs the model was trained on. Rows
of near lengths go through one compiled program (lab.serving.bucket), `BATCH` at a time.

Letters: B batch, C slots for inputs, T target length, V vocabulary.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from lab.data import load
from lab.data.packed import evenly
from lab.data.tokenizers import Tokenizer
from lab.forms import Objective
from lab.generate import filled, next_tokens, opened
from lab.serving import Cache, bucket, logits, prefill
from lab.spec import Run
from lab.transformer import Params, Transformer

BATCH = 16
RANKINGS = ("raw", "per_token", "per_byte")


@dataclass(frozen=True, kw_only=True)
class Question:
    context: str
    choices: tuple[str, ...]
    answer: int  # index of the right choice


@dataclass(frozen=True, kw_only=True)
class Pair:
    source: str
    target: str


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """Of each choice of one question: its log-likelihood in nats, its tokens and its UTF-8 bytes."""

    log_likelihoods: tuple[float, ...]
    tokens: tuple[int, ...]
    bytes: tuple[int, ...]

    def picked(self, ranking: str) -> int:
        """The likeliest choice; of equals the first."""
        sizes = {"raw": (1,) * len(self.tokens), "per_token": self.tokens, "per_byte": self.bytes}[ranking]
        return int(np.argmax([value / size for value, size in zip(self.log_likelihoods, sizes, strict=True)]))


@dataclass(frozen=True, kw_only=True)
class Written:
    """ended: SEP came before the room was over."""

    text: str
    ended: bool


# ---- files -------------------------------------------------------------------------------------------------------------


def read_questions(path: Path) -> list[Question]:
    """Raises ValueError naming the file and the line."""

    def question(line: dict[str, Any]) -> Question:
        choices, answer = line["choices"], line["answer"]
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            raise ValueError(f"choices = {choices!r}: use a list of at least two texts, none of them empty")
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
            raise ValueError(f"answer = {answer!r}: use the index of the right choice, from 0 to {len(choices) - 1}")
        return Question(context=_text(line, "context"), choices=tuple(choices), answer=answer)

    return _read(path, ("context", "choices", "answer"), question)


def read_pairs(path: Path) -> list[Pair]:
    """Raises ValueError naming the file and the line."""
    return _read(
        path, ("source", "target"), lambda line: Pair(source=_text(line, "source"), target=_text(line, "target"))
    )


def held_out_pairs(run: Run, count: int) -> list[Pair]:
    """`count` held-out pairs of the run's own corpus, evenly spaced; ValueError where it has no pairs, or fewer."""
    corpus = load(run.data)
    split, decode = corpus.held_out, corpus.tokenizer.decode
    if split.sources is None:
        raise ValueError(f"data.corpus = {run.data.corpus!r}: it has no pairs: give --pairs FILE")
    found = []
    for number in evenly(count, len(split.lengths), "pairs").tolist():
        ids, cut = split.document(number), int(split.sources[number])
        found.append(Pair(source=decode(ids[:cut]), target=decode(ids[cut:])))
    return found


def _text(line: dict[str, Any], key: str) -> str:
    if not isinstance(line[key], str) or not line[key]:
        raise ValueError(f"{key} = {line[key]!r}: use a text of at least one character")
    return line[key]


def _read(path: Path, keys: tuple[str, ...], parse: Callable[[dict[str, Any]], Any]) -> list[Any]:
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; give one with a JSON object on each line") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error
    rows = []
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            if not isinstance(line, dict):
                raise ValueError(f"{type(line).__name__} where an object with {', '.join(keys)} belongs")
            missing = [key for key in keys if key not in line]
            if missing:
                raise ValueError(f"missing key {missing[0]}: each line is an object with {', '.join(keys)}")
            rows.append(parse(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); write one object on each line") from error
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not rows:
        raise ValueError(f"{path}: no lines in it; write one object with {', '.join(keys)} on each")
    return rows


# ---- choices -----------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="model")
def log_likelihoods(
    model: Transformer,
    params: Params,
    cache: Cache,
    first_B: Int[Array, "B"],
    labels_BT: Int[Array, "B T"],
    counts_B: Int[Array, "B"],
) -> Float[Array, "B"]:
    """Of the first `counts_B` labels of each row, as targets after the cache's inputs, in nats; the cache stays as it is.
    first_B: what enters the target stream before them."""
    targets_BT = jnp.concatenate([first_B[:, None], labels_BT[:, :-1]], axis=1)
    each_BTV = jax.nn.log_softmax(logits(model, params, cache, targets_BT), axis=-1)
    chosen_BT = jnp.take_along_axis(each_BTV, labels_BT[..., None], axis=-1)[..., 0]
    counted_BT = np.arange(labels_BT.shape[1])[None] < counts_B[:, None]
    return jnp.sum(jnp.where(counted_BT, chosen_BT, 0.0), axis=1)


def rank(
    model: Transformer, params: Params, objective: Objective, questions: Sequence[Question], tokenizer: Tokenizer
) -> list[Ranked]:
    """Each context is read once, as a model of this objective reads it, and each of its choices scored after it."""
    begun = [opened(objective, tokenizer, _ids(tokenizer, question.context)) for question in questions]
    choices = [[_ids(tokenizer, choice) for choice in question.choices] for question in questions]
    for number, (question, ids) in enumerate(zip(questions, choices, strict=True), start=1):
        _not_empty(
            number, {"context": _ids(tokenizer, question.context)} | {f"choice {i}": c for i, c in enumerate(ids)}
        )
    found: list[list[float]] = [[] for _ in questions]
    for rows, inputs_BC, lengths_B in _batches([inputs for inputs, _ in begun]):
        room = bucket(max(len(choice) for row in rows for choice in choices[row]))
        cache = prefill(model, params, inputs_BC, lengths_B, room=room)
        for index in range(max(len(choices[row]) for row in rows)):
            # A question with fewer choices has its last one scored again, for nothing.
            labels_BT, counts_B = filled([choices[row][min(index, len(choices[row]) - 1)] for row in rows], room)
            first_B = np.array([begun[row][1] for row in rows], np.int32)
            sums = log_likelihoods(model, params, cache, first_B, labels_BT, counts_B)
            for row, value in dict(zip(rows, np.asarray(sums).tolist(), strict=True)).items():
                if index < len(choices[row]):
                    found[row].append(value)
    return [
        Ranked(
            log_likelihoods=tuple(values),
            tokens=tuple(len(choice) for choice in tokens),
            bytes=tuple(len(choice.encode("utf-8")) for choice in question.choices),
        )
        for values, tokens, question in zip(found, choices, questions, strict=True)
    ]


def summarise_choices(questions: Sequence[Question], ranked: Sequence[Ranked]) -> dict[str, Any]:
    """JSON: accuracy of each ranking with its standard error, what guessing gives, and every question's numbers."""
    right = {
        ranking: [one.picked(ranking) == question.answer for one, question in zip(ranked, questions, strict=True)]
        for ranking in RANKINGS
    }
    return {
        "questions": len(questions),
        "accuracy": {ranking: _share(hits) for ranking, hits in right.items()},
        "guessing": float(np.mean([1 / len(question.choices) for question in questions])),
        "ranked": [asdict(one) | {"answer": question.answer} for one, question in zip(ranked, questions, strict=True)],
    }


# ---- pairs -------------------------------------------------------------------------------------------------------------


def write_out(
    model: Transformer,
    params: Params,
    objective: Objective,
    sources: Sequence[str],
    tokenizer: Tokenizer,
    *,
    most: int,
) -> list[Written]:
    """The likeliest token after token until SEP, at most `most` of them."""
    ids = [_ids(tokenizer, source) for source in sources]
    for number, source in enumerate(ids, start=1):
        _not_empty(number, {"source": source})
    begun = [opened(objective, tokenizer, source) for source in ids]
    written: dict[int, Written] = {}
    for rows, inputs_BC, lengths_B in _batches([inputs for inputs, _ in begun]):
        cache = prefill(model, params, inputs_BC, lengths_B, room=most)
        newest_B = np.array([begun[row][1] for row in rows], np.int32)
        columns, ended_B = [], np.zeros(len(rows), bool)
        while len(columns) < most and not ended_B.all():
            token_B, cache = next_tokens(model, params, cache, newest_B, choices=tokenizer.sep + 1)
            newest_B = np.asarray(token_B)
            columns.append(newest_B)
            ended_B |= newest_B == tokenizer.sep
        for row, tokens in zip(rows, np.stack(columns, axis=1).tolist(), strict=True):
            ended = tokenizer.sep in tokens
            kept = tokens[: tokens.index(tokenizer.sep)] if ended else tokens
            written[row] = Written(text=tokenizer.decode(kept), ended=ended)
    return [written[row] for row in range(len(sources))]


def summarise_pairs(pairs: Sequence[Pair], written: Sequence[Written]) -> dict[str, Any]:
    """JSON: share of targets that are written to the last character, chrF over all of them (0 to 100), and every text."""
    metric = chrf()
    texts, targets = [one.text for one in written], [pair.target for pair in pairs]
    return {
        "pairs": len(pairs),
        "exact_match": _share([text == target for text, target in zip(texts, targets, strict=True)]),
        "chrf": float(metric.corpus_score(texts, [targets]).score),
        "chrf_signature": str(metric.get_signature()),
        "not_ended": sum(not one.ended for one in written),
        "written": texts,
    }


def chrf() -> Any:
    """sacreBLEU's metric; raises ValueError with the way out where it is not installed."""
    try:
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise ValueError("chrF needs sacrebleu, which is not installed: pip install 'bitterlab[eval]'") from error
    return CHRF()


# ---- both --------------------------------------------------------------------------------------------------------------


def digest(path: Path) -> str:
    """SHA-256 of a file, so that results of two runs are known to be of one task."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _share(hits: Sequence[bool]) -> dict[str, float | None]:
    """A share and its standard error, that of a mean of independent questions; None of a single one."""
    share = float(np.mean(hits))
    spread = math.sqrt(share * (1 - share) / (len(hits) - 1)) if len(hits) > 1 else None
    return {"value": share, "standard_error": spread}


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return [int(token) for token in tokenizer.encode(text)]


def _not_empty(number: int, texts: dict[str, list[int]]) -> None:
    """ValueError for what the tokenizer makes nothing of."""
    for name, ids in texts.items():
        if not ids:
            raise ValueError(f"example {number}: its {name} has no tokens: give it text that the tokenizer knows")


def _batches(inputs: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """(which rows, their tokens, their lengths), BATCH rows of one bucket at a time; the last are filled up by repetition."""
    by_width: dict[int, list[int]] = {}
    for row, tokens in enumerate(inputs):
        by_width.setdefault(bucket(len(tokens)), []).append(row)
    for width, members in sorted(by_width.items()):
        for start in range(0, len(members), BATCH):
            rows = members[start : start + BATCH]
            rows += rows[-1:] * (BATCH - len(rows))
            yield rows, *filled([inputs[row] for row in rows], width)
