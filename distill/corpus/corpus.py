"""The corpus stage: reads the sources, cleans, leaves out repeats, splits by document, then cuts.

Writes documents.jsonl, and rejects.jsonl with the place and reason of all that was left out. The
split of a document follows from its content and the seed alone: with shares, new documents never
move old ones; with counts, the documents of the lowest hashes are taken.
"""

import hashlib
import platform
from collections import Counter
from collections.abc import Iterator
from math import ceil
from pathlib import Path

from distill.config.tree import Chunk, Corpus
from distill.corpus import python_docs, readers
from distill.corpus.clean import chunk
from distill.corpus.contamination import trained_on
from distill.corpus.near_duplicates import near_repeats
from distill.corpus.ngrams import EvaluatedText, Index
from distill.corpus.privacy import mask_document
from distill.corpus.readers import Reject, SourceRow
from distill.corpus.rows import Reading, interpret
from distill.corpus.turns import LeftOut
from distill.errors import DistillError, Exit
from distill.languages import main_language
from distill.records import Document, Split
from distill.storage.files import sha256_file, write_records
from distill.storage.progress import say, tracking
from distill.storage.run_folder import Run

LOOKED_AT = 500  # documents, of which the language is told
MANY_NEAR = 0.2  # of the documents: if more are near-duplicates, the threshold may not fit them


def main(run: Run) -> None:
    """Make documents.jsonl and rejects.jsonl, and note the counts; exit 3 if nothing is usable."""
    config = run.config
    corpus, listed = config.corpus, run.path("rejects.jsonl")
    documents, rejects = read_documents(corpus, listed)
    rows, bad = len(documents) + len(rejects), sum(reject.bad for reject in rejects)
    documents, private = protect(documents, corpus.private_text, rejects)
    before = len(rejects)
    documents = deduplicate(
        documents, rejects, corpus.near_duplicate_threshold, corpus.limit, config.seed
    )
    # pages of one PDF are in one split
    groups = {
        d.id: d.source.rpartition(":")[0] if ".pdf:" in d.source.lower() else d.id
        for d in documents
    }
    names, sizes = [*dict.fromkeys(groups.values())], corpus.split
    of_group = split(names, config.seed, sizes.validation, sizes.heldout)
    splits: dict[str, Split] = {identity: of_group[group] for identity, group in groups.items()}
    chunks = cut_documents(documents, splits, corpus.chunk, rejects)
    del documents  # a chunk has its own copy of what is known of it
    repeats = len(rejects) - before
    clean_chunks = remove_contaminated(chunks, rejects)
    contaminated = len(chunks) - len(clean_chunks)
    write_records(listed, rejects)
    write_records(run.path("documents.jsonl"), clean_chunks)
    by_split = Counter(document.split for document in clean_chunks)
    facts = {
        "rows": rows,
        "kept": len(groups),
        "private_text": private,
        "contaminated": contaminated,
        "bad": bad,
        "repeats": repeats,
        "documents": len(clean_chunks),
        "splits": dict(by_split),
        "characters": sum(len(document.text) for document in clean_chunks),
        "corpus_sha256": sha256_file(run.path("documents.jsonl")),
        "python": platform.python_version(),
    }
    run.note("corpus", facts)
    sample = clean_chunks[:: max(1, len(clean_chunks) // LOOKED_AT)]
    if (language := main_language(d.text for d in sample)) not in (None, "English"):
        fix = "give tasks of your own, and see that teacher and student know the language"
        say(f"corpus: most documents are in {language}; the shipped tasks ask in English: {fix}")
    shares = ", ".join(f"{count} {name}" for name, count in sorted(by_split.items()))
    n = len(clean_chunks)
    say(f"corpus: {rows} rows, {bad} bad, {repeats} repeats, {n} documents ({shares})")
    if contaminated:
        what = "documents share text with held-out ones and are left out of training"
        say(f"corpus: {contaminated} {what}: {listed}")


def identity(corpus: Corpus) -> dict[str, str]:
    """Return what the documents depend on besides the config: hashes of files, Python's version."""
    if corpus.source == "python-docs":
        return {"python": platform.python_version()}
    folder, dataset = corpus.path, corpus.dataset or ""
    if folder is None and not dataset.startswith(("/", "./")):
        return {}
    folder, hashes = folder or Path(dataset), dict[str, str]()
    if readers.is_saved_dataset(folder):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
    else:
        files = readers.list_files(folder)[0]
    for file in files:
        try:
            hashes[f"input {_relative(file, folder)}"] = sha256_file(file)
        except OSError as error:
            what = error.strerror or str(error)
            raise DistillError(Exit.INPUT, file, what, "check the file and its rights") from None
    return hashes


def _relative(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix() if file != root else file.name


def read(corpus: Corpus) -> Iterator[SourceRow | Reject]:
    """Yield every row of the configured source, or why it could not be read."""
    if corpus.source == "python-docs":
        rows = python_docs.read_python_docs()
        yield from (SourceRow(f"python-docs:{row['name']}", row) for row in rows)
        return
    if corpus.path is None or readers.is_saved_dataset(corpus.path):
        reference = str(corpus.path.absolute()) if corpus.path else corpus.dataset or ""
        yield from readers.read_dataset(reference, corpus.dataset_config, corpus.dataset_split)
        return
    files, ignored = readers.list_files(corpus.path)
    others: dict[str, list[str]] = {}
    if ignored:
        others["of other kinds and not read"] = [_relative(file, corpus.path) for file in ignored]
    with tracking("reading", len(files), "files") as tracker:
        for file in files:
            source = _relative(file, corpus.path)
            yield from readers.read_file(file, source, corpus.encoding, others)
            tracker.advance()
    for what, names in others.items():
        some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        say(f"corpus: {len(names)} files are {what}: {some}")


def read_documents(corpus: Corpus, listed: Path) -> tuple[list[Document], list[Reject]]:
    """Return the documents and prompts of the source, and the other rows, which are listed too.

    Raises DistillError (exit 3) where nothing is left, or more rows are bad than allowed.
    """
    documents, rejects, reading = list[Document](), list[Reject](), Reading()
    settings = corpus.columns, corpus.format, corpus.reference_pattern
    for row in read(corpus):
        if isinstance(row, Reject):
            rejects.append(row)
            continue
        try:
            document = interpret(row.value, row.where, *settings, reading)
            if "messages" not in document.meta and len(document.text) < corpus.chunk.min_chars:
                raise ValueError(f"shorter than {corpus.chunk.min_chars} characters")
            documents.append(document)
        except ValueError as error:
            bad = not isinstance(error, LeftOut)
            rejects.append(Reject(where=row.where, reason=str(error)[:300], bad=bad))
    for line in reading.lines():
        say(f"corpus: {line}")
    for reason, count in Counter(reject.reason for reject in rejects if not reject.bad).items():
        say(f"corpus: {count} rows are left out: {reason}")
    write_records(listed, rejects)
    good, bad = len(documents), [reject for reject in rejects if reject.bad or not documents]
    share = len(bad) / max(1, len(bad) + good)
    if not good or share > corpus.max_bad_fraction:
        example = f", first {bad[0].where}: {bad[0].reason}" if bad else ""
        what, fix = f"{len(bad)} of {len(bad) + good} rows are bad{example}", f"all are in {listed}"
        if good:
            limit = ceil(share * 100) / 100
            fix += f"; correct them, or raise corpus.max_bad_fraction to {limit:g}"
        raise DistillError(Exit.INPUT, "corpus", what, fix)
    return documents, rejects


def protect(
    documents: list[Document], policy: str, rejects: list[Reject]
) -> tuple[list[Document], dict[str, object]]:
    """Mask private text, or drop its documents; return these, and how much of it there was."""
    if policy == "keep":
        return documents, {"policy": policy}
    results, kinds, holding = list[Document](), Counter[str](), 0

    def listed(counts: Counter[str]) -> str:
        return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))

    for document in documents:
        masked, counts = mask_document(document)
        holding += bool(counts)
        kinds += counts
        if counts and policy == "drop":
            rejects.append(_left_out(document, f"holds private text: {listed(counts)}"))
        else:
            results.append(masked)
    if not results:
        what = f"every document holds private text: {listed(kinds)}"
        raise DistillError(Exit.INPUT, "corpus", what, "set corpus.private_text to mask")
    if holding:
        action = "dropped" if policy == "drop" else "masked"
        say(f"corpus: private text {action} in {holding} rows: {listed(kinds)}")
    return results, {"policy": policy, "documents": holding, "kinds": dict(sorted(kinds.items()))}


def _left_out(document: Document, reason: str) -> Reject:
    return Reject(where=document.source, reason=reason, bad=False)


def deduplicate(
    documents: list[Document],
    rejects: list[Reject],
    threshold: float | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[Document]:
    """Return the documents without repeats, in their order; of equal ones, the first stays.

    With a limit, that many, chosen by content and seed.
    """
    unique = join_samples(documents, rejects)
    candidates = [*unique.values()]
    if limit is not None:
        candidates.sort(key=lambda document: rank(document.id, seed, "limit"))
    ids, copies = set[str](), 0
    near = near_repeats(candidates, threshold, limit) if threshold else {}
    for place, document in enumerate(candidates):
        if len(ids) == limit:
            break
        if place in near:
            source, copies = candidates[near[place]].source, copies + 1
            rejects.append(_left_out(document, f"nearly the same as {source}"))
        else:
            ids.add(document.id)
    if copies > MANY_NEAR * (looked_at := len(ids) + copies):
        share = f"{copies} of {looked_at} documents ({copies / looked_at:.0%})"
        say(
            f"corpus: warning: {share} are left out as nearly the same as another; if they are "
            "not, set corpus.near_duplicate_threshold higher, or to null"
        )
    return [document for document in unique.values() if document.id in ids]


def join_samples(documents: list[Document], rejects: list[Reject]) -> dict[str, Document]:
    """Return the documents by their ids; a prompt gets its other answers as more samples.

    Raises DistillError (exit 3) where an id of the user's stands with two contents in one file.
    """
    by_content: dict[str, Document] = {}
    by_name: dict[tuple[str, str], Document] = {}
    samples: dict[str, dict[tuple[str, str | None], dict[str, str]]] = {}

    def answers_of(document: Document) -> dict[tuple[str, str | None], dict[str, str]]:
        model = document.meta.get("recorded_model")
        model = {"model": str(model)} if model else {}
        answers = document.recorded_answers
        return {(answer["text"], answer.get("reasoning")): model | answer for answer in answers}

    for document in documents:
        name, file = document.meta.get("id"), document.source.rpartition(":")[0]
        other = by_name.setdefault((file, name), document) if name else document
        if other.id != document.id:
            what = f"id {name!r:.60} stands with other content at {other.source}"
            fix = "make ids unique, or name another column with corpus.columns.id"
            raise DistillError(Exit.INPUT, document.source, what, fix)
        first = by_content.setdefault(document.id, document)
        if first is not document:
            answers, more = samples.setdefault(first.id, answers_of(first)), answers_of(document)
            if more.keys() <= answers.keys():
                rejects.append(_left_out(document, f"same content as {first.source}"))
            for key, answer in more.items():
                answers.setdefault(key, answer)
    for identity, answers in samples.items():
        if len(answers) > len((first := by_content[identity]).recorded_answers):
            meta = first.meta | {"recorded_answer": [*answers.values()]}
            by_content[identity] = first.model_copy(update={"meta": meta})
    return by_content


def rank(identity: str, seed: int, salt: str = "") -> float:
    """Return a number in [0, 1) that depends on content and seed only."""
    key = hashlib.sha256(f"{seed} {salt} {identity}".encode()).digest()
    return int.from_bytes(key[:7], "big") / 2**56


def split(ids: list[str], seed: int, validation: float, heldout: float) -> dict[str, Split]:
    """Assign each id; sizes of 1 and more are counts, below 1 shares, of a document at least.

    Raises DistillError (exit 3) where none would be left to train on.
    """
    splits: dict[str, Split] = dict.fromkeys(ids, "train")
    sizes: list[tuple[Split, float, float]] = [
        ("heldout", heldout, heldout),
        # of what heldout leaves, so that it is a share of all
        ("validation", validation, validation / (1 - heldout) if heldout < 1 else validation),
    ]
    for name, size, share in sizes:
        ranks = {one: rank(one, seed, name) for one, now in splits.items() if now == "train"}
        ranked = sorted(ranks, key=lambda identity: (ranks[identity], identity))
        below = sum(number < share for number in ranks.values())
        picked = ranked[: int(size) if size >= 1 else max(below, int(share > 0))]
        if len(picked) < size or len(picked) >= len(ranks):
            what = f"{len(ids)} documents cannot give {size:g} for {name} and leave some to train"
            fix = "give more documents, or smaller corpus.split sizes"
            raise DistillError(Exit.INPUT, "corpus.split", what, fix)
        splits |= dict.fromkeys(picked, name)
    return splits


def cut_documents(
    documents: list[Document], splits: dict[str, Split], rule: Chunk, rejects: list[Reject]
) -> list[Document]:
    """Cut the documents into chunks, each in the split of its document; a prompt stays complete."""
    chunks: dict[str, Document] = {}
    for document in documents:
        pieces = [document]
        if "messages" not in document.meta and len(document.text) > rule.max_chars:
            texts = chunk(document.text, rule.max_chars, rule.overlap_chars)
            pieces = [
                Document.make(
                    text, document.source, document.meta | {"chunk": number, "chunks": len(texts)}
                )
                for number, text in enumerate(texts, 1)
            ]
        for piece in pieces:
            if piece.id in chunks:
                where = chunks[piece.id].source
                rejects.append(_left_out(piece, f"a chunk of it stands in {where}"))
            else:
                meta = piece.meta | {"parent": document.id}
                update = {"split": splits[document.id], "meta": meta}
                chunks[piece.id] = piece.model_copy(update=update)
    return list(chunks.values())


def remove_contaminated(documents: list[Document], rejects: list[Reject]) -> list[Document]:
    """Leave out the documents that share text with a held-out one, which itself stays.

    To leave out the held-out ones that are found would change what is measured. Raises DistillError
    (exit 3) where none is left to train on.
    """
    held_out = {document.id: document for document in documents if document.split == "heldout"}
    items = [
        EvaluatedText(d.id, str(d.meta.get("parent")), (d.text,), d.meta.get("reference"))
        for d in held_out.values()
    ]
    matches: dict[str, str] = {}
    for item, place, phrase in Index(items).find(trained_on(documents)):
        source = held_out[item.id].source
        what = f"holds text of {source}, which is held out: {phrase[:120]}"
        matches.setdefault(place, what)
    left_out = [_left_out(d, matches[d.id]) for d in documents if d.id in matches]
    results = [document for document in documents if document.id not in matches]
    if left_out and not any(document.split == "train" for document in results):
        what = "all documents to train on share text with held-out ones, such as "
        fix = "give documents that differ, or a smaller corpus.split.heldout"
        raise DistillError(Exit.INPUT, left_out[-1].where, f"{what}{left_out[-1].reason}", fix)
    rejects += left_out
    return results
