"""The data set: the teacher's answers as JSON lines with a card, for `datasets` and any trainer.

`distill publish RUN --dataset [--heldout] [--soft-labels] [--push OWNER/NAME]`. Its config `kept`
holds the answers that the filters kept, `raw` all of them with the reason why one was dropped, and
`soft_labels` the teacher's distributions over the kept ones. Private text is masked everywhere.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from huggingface_hub import DatasetCard, DatasetCardData
from pydantic import Field

from distill.corpus.privacy import mask
from distill.errors import DistillError, Exit
from distill.evaluation.scorecard import Funnel
from distill.formatting import one_line
from distill.generation.filters import Dropped, asked_prompts
from distill.models.registry import hub_id, is_folder
from distill.publishing import card
from distill.publishing.secret_scan import scan
from distill.publishing.upload import check_name, push
from distill.reasoning import split_thought
from distill.records import Document, Message, Origin, Pair, Record, Response, Stop
from distill.responders.terms import require_terms
from distill.storage.files import read_json, read_records, replacing, write_records
from distill.storage.progress import say
from distill.storage.run_folder import Run

SPLIT_NAMES = {"train": "train", "validation": "validation", "heldout": "test"}  # run's: Hub's
PYTHON_DOCS = "PSF-2.0"
UNSTATED = ("", "unknown", "none", "null", "other")
RESERVED = re.compile(r"all rights reserved|proprietary", re.IGNORECASE)


class Answer(Record):
    """A row; a text that there is none of is empty, since a column of nulls would have no type."""

    id: str
    messages: tuple[Message, ...]  # prompt and completion
    prompt: tuple[Message, ...]  # as the student sees it
    completion: tuple[Message, ...]
    teacher_prompt: tuple[Message, ...]  # as the teacher was asked it
    reasoning: str
    reference: str
    task: str
    document_id: str
    model: str
    license: str  # of the document
    stop: Stop
    usage: dict[str, Any]
    dropped: str  # by a filter, why
    # Wrong, and kept for soft labels: a column of all rows, where the filters keep such answers
    only_signals: Annotated[bool | None, Field(exclude_if=lambda only: only is None)] = None
    origin: Annotated[Origin | None, Field(exclude_if=lambda origin: origin is None)] = None


class SoftLabel(Record):
    """An answer's tokens: for each the teacher's top ids, their log-probabilities, tail mass."""

    id: str
    token_ids: list[int]
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]
    tail_mass: list[float]


class Placed(NamedTuple):
    """A row, its split on the Hub, and what was masked in it."""

    split: str
    row: Answer
    masked: Counter[str]


def main(
    run: Run,
    repository: str | None = None,
    public: bool = False,
    heldout: bool = False,
    soft_labels: bool = False,
) -> Path:
    """Build the data set, and push it where `repository` (OWNER/NAME) is given; return its folder.

    Raises DistillError: exit 9 for what must not be published, 10 where the teacher's terms or the
    license of the corpus do not allow it.
    """
    if repository:
        check_name(repository)
    config, folder = run.config, run.path("release-dataset")
    if config.corpus.private_text == "keep":
        what, fix = "is keep, and then no answers are published", "set it to mask: --redo corpus"
        raise DistillError(Exit.PUBLISH, "corpus.private_text", what, fix)
    terms = require_terms(config.teacher, config.terms.basis).lines()
    raw = [*answers(run, heldout)]
    retained = [one for one in raw if not one.row.dropped]
    parts: dict[str, list[tuple[str, Record]]] = {
        "kept": [(one.split, one.row) for one in retained],
        "raw": [(one.split, one.row) for one in raw if one.row.origin != "student"],
    }
    if soft_labels:
        parts["soft_labels"] = [*labels(run, retained)]
    counts = {part: Counter(split for split, _ in rows) for part, rows in parts.items()}
    with replacing(folder) as work:
        for part, splits in counts.items():
            for split in splits:
                rows = (row for name, row in parts[part] if name == split)
                write_records(work / part / f"{split}.jsonl", rows)
        make_card(run, repository, raw, counts, terms).save(work / "README.md")
        scan(work, (), config.publish.allow_secrets)
    say(f"data set: {folder} ({', '.join(f'{part} {n.total()}' for part, n in counts.items())})")
    if repository:
        push(folder, repository, public, "dataset")
    return folder


def answers(run: Run, heldout: bool) -> Iterator[Placed]:
    """Yield each answer that came, and those of the student's own that it learnt from, masked.

    Raises DistillError: exit 5 where a file of the run is missing, 10 where a document has no
    license, or one that reserves all rights.
    """
    config = run.config
    stated = config.publish.corpus_license or ""
    if not stated and config.corpus.source == "python-docs":
        stated = PYTHON_DOCS
    elif not stated and not config.teacher.answers_anything:  # they came with the prompts
        stated = config.teacher.license or ""
    documents = {d.id: d for d in read_records(run.path("documents.jsonl"), Document)}
    prompts = asked_prompts(run)
    marking = config.filters.failed_checker == "signals_only"
    train = read_records(run.path("dataset/train.jsonl"), Pair) if marking else []
    marks = {(pair.prompt.id, pair.response.id) for pair in train if pair.only_signals}
    rejected = read_records(run.path("dropped.jsonl"), Dropped)
    reasons = {(row.prompt_id, row.response_id): row.reason for row in rejected}
    refined = sorted(run.folder.glob("refined/self-*/dataset/train.jsonl"))[-1:]  # it holds all
    pairs = read_records(refined[0], Pair) if refined and config.train.self_answers else []
    rows = list[tuple[Origin, Response]]()
    for mine in (pair.response for pair in pairs if pair.origin == "student"):
        answer = split_thought(mine.text, mine.reasoning)[1]  # training has both in the text
        rows.append(("student", mine.model_copy(update={"text": answer})))
    responses = read_records(run.path("responses.jsonl"), Response)
    for origin, response in [*(("teacher", response) for response in responses), *rows]:
        prompt = prompts[response.prompt_id]
        document, masked = documents[prompt.document_id], Counter[str]()
        if response.stop == "error" or (document.split == "heldout" and not heldout):
            continue
        license = str(document.meta.get("recorded_license") or "").strip()
        license = stated if license.lower() in UNSTATED else license
        if not license or RESERVED.search(license):
            what = f"is under {one_line(license)[:60]!r}" if license else "states no license"
            fix = "read what its owner says, then state publish.corpus_license=SPDX-ID"
            fix = "leave such rows out of the corpus" if license else fix
            raise DistillError(Exit.TERMS, f"corpus {document.source}", what, fix)

        def clean(text: str | None, masked: Counter[str] = masked) -> str:
            text, counts = mask(text or "")
            masked.update(counts)
            return text

        turns, question = (
            tuple(Message(role=m.role, content=clean(m.content)) for m in view)
            for view in (prompt.messages, prompt.asked_of_teacher())
        )
        completion = (Message(role="assistant", content=clean(response.text)),)
        row = Answer(
            id=f"{prompt.id}-{response.id if origin == 'student' else response.sample}",
            messages=turns + completion,
            prompt=turns,
            completion=completion,
            teacher_prompt=question,
            reasoning=clean(response.reasoning),
            reference=clean(prompt.reference),
            task=prompt.task,
            document_id=document.id,
            model=Path(response.model).name if is_folder(response.model) else response.model,
            license=license,
            stop=response.stop,
            usage=response.usage.model_dump(exclude={"device"}),
            dropped=reasons.get((prompt.id, response.id), ""),
            only_signals=(prompt.id, response.id) in marks if marking else None,
            origin=origin if rows else None,
        )
        yield Placed(SPLIT_NAMES[document.split or "train"], row, masked)


def labels(run: Run, rows: Sequence[Placed]) -> Iterator[tuple[str, SoftLabel]]:
    """Yield the soft labels of rows, with their splits; those of a masked row would tell its text.

    Raises DistillError: exit 5 where none were captured, 10 where their teacher's terms forbid it.
    """
    from distill.training.soft_labels.cache import SignalCache, SignalKey, supervised_ids
    from distill.training.soft_labels.labels import read_pairs, student_view, teacher_view

    folder = read_json(run.path("signals.json"))["cache"]
    splits = {one.row.id: one.split for one in rows if not one.masked}
    names = {p.response.id: f"{p.prompt.id}-{p.response.sample}" for p in read_pairs(run)}
    texts = teacher_view(run, student_view(run))[2]
    cache = SignalCache(run.config.store_folder(), folder)
    signals = cache.read([SignalKey.of(text) for text in texts])
    for text in texts:
        name, signal = names[text.response_id], signals[text.id]
        if name in splits:
            ends, logs_E = signal.counts_N.cumsum()[:-1], signal.logs().round(4)
            label = SoftLabel(
                id=name,
                token_ids=supervised_ids(text),
                top_ids=[ids.tolist() for ids in np.split(signal.ids_E, ends)],
                top_logprobs=[logs.tolist() for logs in np.split(logs_E, ends)],
                tail_mass=signal.tail_mass_N.tolist(),
            )
            yield splits[name], label


def make_card(
    run: Run,
    repository: str | None,
    raw: Sequence[Placed],
    counts: dict[str, Counter[str]],
    terms: list[str],
) -> DatasetCard:
    """Write the card; `counts` are the rows by config and split."""
    config, licenses = run.config, sorted({one.row.license for one in raw})
    name, hub = repository or f"OWNER/{config.name}", card.hub_dataset(config.corpus)
    data = DatasetCardData(
        language=one_line(config.publish.language) or None,
        **card.license_fields(licenses, "README.md"),
        task_categories=["text-generation"],
        source_datasets=[hub] if hub else None,
        pretty_name=name.split("/")[1],
        tags=["distillation", "synthetic", "sft", "distill"],
        configs=[
            {
                "config_name": part,
                "default": part == "kept",
                "data_files": [{"split": s, "path": f"{part}/{s}.jsonl"} for s in splits],
            }
            for part, splits in counts.items()
        ],
    )
    text = card.card_text(
        "dataset.md.j2",
        data,
        repository=name,
        config=config,
        corpus=card.corpus_name(config.corpus),
        hub=hub,
        teacher=card.teacher_name(config.teacher),
        student=hub_id(config.student.model) or Path(config.student.model).name,
        reader=card.teacher_name(config.soft_teacher()),
        licenses=licenses,
        counts=counts,
        own=Counter(one.row.origin for one in raw)["student"],
        tasks=sorted(Counter(one.row.task for one in raw).items()),
        filters=[name for name, value in config.filters if value and value != "keep"],
        funnel=Funnel.model_validate(read_json(run.path("funnel.json"))),
        terms=terms,
        private=sorted(sum((one.masked for one in raw), Counter[str]()).items()),
    )
    return DatasetCard(text)
