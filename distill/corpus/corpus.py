"""The corpus stage: reads the sources, cleans, leaves out repeats, splits by document, then cuts into chunks.

What shares text with a held-out document is left out too, so that nothing is bought or trained on that is evaluated.
Writes documents.jsonl, and rejects.jsonl with the place and reason of everything that was left out. Counts and hashes
go into the run's manifest under `corpus`.
"""

import platform
from collections import Counter
from collections.abc import Iterator, Mapping
from math import ceil
from pathlib import Path
from typing import Any

from distill.config import Chunk, Config, Corpus
from distill.corpus import python_docs, readers
from distill.corpus.clean import chunk
from distill.corpus.contamination import leaking
from distill.corpus.dedupe import NearDuplicates, unique
from distill.corpus.privacy import Policy, masked_document
from distill.corpus.readers import Reject, Row
from distill.corpus.rows import interpret
from distill.corpus.split import rank, split
from distill.errors import DistillError, Exit
from distill.records import Document, Split
from distill.storage.files import sha256_file, write_records
from distill.storage.progress import say, track
from distill.storage.run_folder import Run


def main(config: Config, run: Run) -> None:
    """Make documents.jsonl and rejects.jsonl; raises DistillError (exit 3) where the corpus is not usable."""
    corpus, rejects = config.corpus, list[Reject]()
    found = interpreted(corpus, rejects)
    write_records(run.path("rejects.jsonl"), rejects)  # also for the one who meets the refusal
    refuse_too_many(rejects, len(found), corpus.max_bad_fraction, run.path("rejects.jsonl"))
    rows = len(found) + sum(reject.bad for reject in rejects)
    found, private = protected(found, corpus.private_text, rejects)
    kept = deduplicated(found, rejects, corpus.near_duplicate_threshold, corpus.limit, config.seed)
    sizes = corpus.split
    splits = split([d.id for d in kept], config.seed, sizes.validation, sizes.heldout)
    chunks = chunked(kept, splits, corpus.chunk, rejects)
    documents = uncontaminated(chunks, rejects)
    leaks = len(chunks) - len(documents)
    write_records(run.path("rejects.jsonl"), rejects)
    write_records(run.path("documents.jsonl"), documents)
    counts = {"rows": rows, "kept": len(kept), "private_text": private, "contaminated": leaks}
    report(run, documents, rejects, counts)


def identity(config: Config) -> dict[str, str]:
    """Return what the documents depend on outside the config: each input file's hash, or the Python version."""
    corpus = config.corpus
    if corpus.source == "python-docs":
        return {"python": platform.python_version()}
    folder = corpus.path or _saved_folder(corpus)
    if folder is None:
        return {}
    if not folder.exists():
        raise DistillError(Exit.INPUT, folder, "does not exist", "check corpus.path")
    saved = readers.is_saved_dataset(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file()) if saved else []
    return {
        f"input {_shown(file, folder)}": _hash(file)
        for file in files or readers.list_files(folder)[0]
    }


def _hash(file: Path) -> str:
    try:
        return sha256_file(file)
    except OSError as error:
        raise DistillError(
            Exit.INPUT, file, error.strerror or str(error), "check the file and its rights"
        ) from None


def _saved_folder(corpus: Corpus) -> Path | None:
    local = corpus.dataset is not None and corpus.dataset.startswith(("/", "./"))
    return Path(corpus.dataset) if local and corpus.dataset else None


def _shown(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix() if file != root else file.name


def read(corpus: Corpus) -> Iterator[Row | Reject]:
    """Yield every row of the configured source, or why it could not be read."""
    if corpus.source == "python-docs":
        rows = python_docs.read_python_docs()
        yield from (Row(f"python-docs:{row['name']}", row) for row in rows)
    elif corpus.path is None or readers.is_saved_dataset(corpus.path):
        reference = str(corpus.path.absolute()) if corpus.path else corpus.dataset or ""
        yield from readers.read_dataset(reference, corpus.dataset_config, corpus.dataset_split)
    else:
        files, ignored = readers.list_files(corpus.path)
        if ignored:
            say(f"corpus: {ignored} files of other kinds are passed by")
        for file in track(files, "reading", len(files), "files"):
            yield from readers.read_file(file, _shown(file, corpus.path))


def interpreted(corpus: Corpus, rejects: list[Reject]) -> list[Document]:
    """Return the documents and prompts of the source; rows that are neither are added to `rejects`."""
    documents = []
    for row in read(corpus):
        if isinstance(row, Reject):
            rejects.append(row)
            continue
        try:
            document = interpret(
                row.value, row.where, corpus.columns, corpus.format, corpus.reference_pattern
            )
            if "messages" not in document.meta and len(document.text) < corpus.chunk.min_chars:
                raise ValueError(f"shorter than {corpus.chunk.min_chars} characters")
            documents.append(document)
        except ValueError as error:
            rejects.append(Reject(where=row.where, reason=str(error)[:300]))
    return documents


def refuse_too_many(rejects: list[Reject], good: int, allowed: float, listed: Path) -> None:
    """Raise DistillError (exit 3) where nothing is left, or more rows are bad than allowed."""
    bad = [reject for reject in rejects if reject.bad]
    share = len(bad) / max(1, len(bad) + good)
    if good and share <= allowed:
        return
    example = f", first {bad[0].where}: {bad[0].reason}" if bad else ""
    what = f"{len(bad)} of {len(bad) + good} rows are bad{example}"
    fix = f"all are in {listed}; correct them, or raise corpus.max_bad_fraction to {ceil(share * 100) / 100:g}"
    raise DistillError(Exit.INPUT, "corpus", what, fix if good else f"all are in {listed}")


def protected(
    found: list[Document], policy: Policy, rejects: list[Reject]
) -> tuple[list[Document], dict[str, Any]]:
    """Mask or drop private text, or keep it; return the documents, and how much was found by kind.

    Raises DistillError (exit 3) where every document is dropped.
    """
    if policy == "keep":
        return found, {"policy": policy}
    kept, kinds, holding = list[Document](), Counter[str](), 0
    for document in found:
        masked, counts = masked_document(document)
        holding, kinds = holding + bool(counts), kinds + counts
        if counts and policy == "drop":
            reason = f"holds private text: {told(counts)}"
            rejects.append(Reject(where=document.source, reason=reason, bad=False))
        else:
            kept.append(masked)
    if not kept:
        what = f"every document holds private text: {told(kinds)}"
        raise DistillError(Exit.INPUT, "corpus", what, "set corpus.private_text to mask")
    return kept, {"policy": policy, "documents": holding, "kinds": dict(sorted(kinds.items()))}


def told(kinds: Mapping[str, int]) -> str:
    """Say counts by kind."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def deduplicated(
    found: list[Document],
    rejects: list[Reject],
    threshold: float | None,
    limit: int | None,
    seed: int,
) -> list[Document]:
    """Return the documents without repeats, in their order; with a limit, that many, chosen by content and seed."""
    fresh = []
    for document, earlier in unique(found):
        if earlier is None:
            fresh.append(document)
        else:
            rejects.append(_repeat(document, f"same content as {earlier}"))
    order = {document.id: place for place, document in enumerate(fresh)}
    if limit is not None:
        fresh.sort(key=lambda document: rank(document.id, seed, "limit"))
    kept, seen = [], NearDuplicates(threshold) if threshold else None
    for document in fresh:
        if limit is not None and len(kept) == limit:
            break
        near = seen.find_or_add(document) if seen else None
        if near is None:
            kept.append(document)
        else:
            rejects.append(_repeat(document, f"nearly the same as {near.source}"))
    return sorted(kept, key=lambda document: order[document.id])


def _repeat(document: Document, reason: str) -> Reject:
    return Reject(where=document.source, reason=reason, bad=False)


def cut(document: Document, rule: Chunk) -> list[Document]:
    """Return the document's chunks; one that fits, and a prompt, stays whole."""
    if "messages" in document.meta or len(document.text) <= rule.max_chars:
        return [document]
    pieces = chunk(document.text, rule.max_chars, rule.overlap_chars)
    return [
        Document.make(
            text, document.source, document.meta | {"chunk": number, "chunks": len(pieces)}
        )
        for number, text in enumerate(pieces, 1)
    ]


def chunked(
    kept: list[Document], splits: dict[str, Split], rule: Chunk, rejects: list[Reject]
) -> list[Document]:
    """Cut the documents; a chunk has its parent's split, and one that repeats another (a license header) is left out."""
    chunks: dict[str, Document] = {}
    for document in kept:
        for piece in cut(document, rule):
            if piece.id in chunks:
                rejects.append(_repeat(piece, f"a chunk of it stands in {chunks[piece.id].source}"))
            else:
                meta = piece.meta | {"parent": document.id}
                changes = {"split": splits[document.id], "meta": meta}
                chunks[piece.id] = piece.model_copy(update=changes)
    return list(chunks.values())


def uncontaminated(documents: list[Document], rejects: list[Reject]) -> list[Document]:
    """Leave out the documents that share text with a held-out one, which itself stays.

    Raises DistillError (exit 3) where none is left to train on.
    """
    leaks = leaking(documents)
    for document in documents:
        if document.id in leaks:
            held_out, found = leaks[document.id]
            what = f"holds text of {held_out.source}, which is held out: {found.phrase[:120]}"
            rejects.append(Reject(where=document.source, reason=what, bad=False))
    kept = [document for document in documents if document.id not in leaks]
    if leaks and not any(document.split == "train" for document in kept):
        what = (
            f"all documents to train on share text with held-out ones, such as {rejects[-1].reason}"
        )
        fix = "give documents that differ, or a smaller corpus.split.heldout"
        raise DistillError(Exit.INPUT, rejects[-1].where, what, fix)
    return kept


def report(
    run: Run, documents: list[Document], rejects: list[Reject], counts: dict[str, Any]
) -> None:
    """Show the counts and note them in the manifest."""
    splits = Counter(document.split for document in documents)
    private = counts["private_text"]
    dropped = private.get("documents", 0) if private["policy"] == "drop" else 0
    repeats = sum(not reject.bad for reject in rejects) - dropped - counts["contaminated"]
    facts: dict[str, Any] = {
        **counts,
        "bad": sum(reject.bad for reject in rejects),
        "repeats": repeats,
        "documents": len(documents),
        "splits": dict(splits),
        "characters": sum(len(document.text) for document in documents),
        "corpus_sha256": sha256_file(run.path("documents.jsonl")),
        "python": platform.python_version(),
    }
    run.note("corpus", facts)
    shown = ", ".join(f"{count} {name}" for name, count in sorted(splits.items()))
    say(
        f"corpus: {facts['rows']} rows, {facts['bad']} bad, {repeats} repeats, "
        f"{len(documents)} documents ({shown})"
    )
    if counts["contaminated"]:
        say(
            f"corpus: {counts['contaminated']} documents share text with held-out ones and are "
            f"left out of training: {run.path('rejects.jsonl')}"
        )
    if private.get("documents"):
        done = "dropped" if dropped else "masked"
        say(f"corpus: private text {done} in {private['documents']} rows: {told(private['kinds'])}")
