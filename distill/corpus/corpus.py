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
from distill.corpus.contamination import contaminated_documents
from distill.corpus.dedupe import NearDuplicates, unique
from distill.corpus.privacy import mask_document
from distill.corpus.readers import Reject, SourceRow
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
    documents = interpret_rows(corpus, rejects)
    write_records(run.path("rejects.jsonl"), rejects)  # the next error refers to it
    refuse_too_many(rejects, len(documents), corpus.max_bad_fraction, run.path("rejects.jsonl"))
    rows = len(documents) + sum(reject.bad for reject in rejects)
    documents, private = protect(documents, corpus.private_text, rejects)
    threshold = corpus.near_duplicate_threshold
    documents = deduplicate(documents, rejects, threshold, corpus.limit, config.seed)
    sizes = corpus.split
    splits = split([d.id for d in documents], config.seed, sizes.validation, sizes.heldout)
    chunks = cut_documents(documents, splits, corpus.chunk, rejects)
    clean_chunks = remove_contaminated(chunks, rejects)
    write_records(run.path("rejects.jsonl"), rejects)
    write_records(run.path("documents.jsonl"), clean_chunks)
    contaminated = len(chunks) - len(clean_chunks)
    counts = {"rows": rows, "kept": len(documents), "private_text": private}
    report(run, clean_chunks, rejects, counts | {"contaminated": contaminated})


def identity(config: Config) -> dict[str, str]:
    """Return what the documents depend on outside the config: each input file's hash, or the Python version."""
    corpus = config.corpus
    if corpus.source == "python-docs":
        return {"python": platform.python_version()}
    folder, dataset = corpus.path, corpus.dataset or ""
    if folder is None and dataset.startswith(("/", "./")):
        folder = Path(dataset)
    if folder is None:
        return {}
    if not folder.exists():
        raise DistillError(Exit.INPUT, folder, "does not exist", "check corpus.path")
    saved = readers.is_saved_dataset(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file()) if saved else []
    hashes = {}
    for file in files or readers.list_files(folder)[0]:
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
    elif corpus.path is None or readers.is_saved_dataset(corpus.path):
        reference = str(corpus.path.absolute()) if corpus.path else corpus.dataset or ""
        yield from readers.read_dataset(reference, corpus.dataset_config, corpus.dataset_split)
    else:
        files, ignored = readers.list_files(corpus.path)
        if ignored:
            say(f"corpus: {ignored} files of other kinds are not read")
        for file in track(files, "reading", len(files), "files"):
            yield from readers.read_file(file, _relative(file, corpus.path))


def interpret_rows(corpus: Corpus, rejects: list[Reject]) -> list[Document]:
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


def protect(
    documents: list[Document], policy: str, rejects: list[Reject]
) -> tuple[list[Document], dict[str, Any]]:
    """Mask, drop or keep private text; return the documents, and how much private text they held, by kind.

    Raises DistillError (exit 3) where every document is dropped.
    """
    if policy == "keep":
        return documents, {"policy": policy}
    results, kinds, holding = list[Document](), Counter[str](), 0
    for document in documents:
        masked, counts = mask_document(document)
        holding, kinds = holding + bool(counts), kinds + counts
        if counts and policy == "drop":
            rejects.append(_reject(document, f"holds private text: {format_counts(counts)}"))
        else:
            results.append(masked)
    if not results:
        what = f"every document holds private text: {format_counts(kinds)}"
        raise DistillError(Exit.INPUT, "corpus", what, "set corpus.private_text to mask")
    return results, {"policy": policy, "documents": holding, "kinds": dict(sorted(kinds.items()))}


def format_counts(kinds: Mapping[str, int]) -> str:
    """Return counts by kind as text."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def _reject(document: Document, reason: str) -> Reject:
    return Reject(where=document.source, reason=reason, bad=False)


def deduplicate(
    documents: list[Document],
    rejects: list[Reject],
    threshold: float | None,
    limit: int | None,
    seed: int,
) -> list[Document]:
    """Return the documents without repeats, in their order; with a limit, that many, chosen by content and seed."""
    candidates = []
    for document, earlier in unique(documents):
        if earlier is None:
            candidates.append(document)
        else:
            rejects.append(_reject(document, f"same content as {earlier}"))
    order = {document.id: number for number, document in enumerate(candidates)}
    if limit is not None:
        candidates.sort(key=lambda document: rank(document.id, seed, "limit"))
    results, seen = [], NearDuplicates(threshold) if threshold else None
    for document in candidates:
        if limit is not None and len(results) == limit:
            break
        near = seen.find_or_add(document) if seen else None
        if near is None:
            results.append(document)
        else:
            rejects.append(_reject(document, f"nearly the same as {near.source}"))
    return sorted(results, key=lambda document: order[document.id])


def cut_documents(
    documents: list[Document], splits: dict[str, Split], rule: Chunk, rejects: list[Reject]
) -> list[Document]:
    """Cut the documents into chunks, each in the split of its document; a prompt, and a text that fits, stays complete.

    A chunk that repeats another (a license header) is left out.
    """
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
                rejects.append(_reject(piece, f"a chunk of it stands in {where}"))
            else:
                meta = piece.meta | {"parent": document.id}
                update = {"split": splits[document.id], "meta": meta}
                chunks[piece.id] = piece.model_copy(update=update)
    return list(chunks.values())


def remove_contaminated(documents: list[Document], rejects: list[Reject]) -> list[Document]:
    """Leave out the documents that share text with a held-out one, which itself stays.

    Raises DistillError (exit 3) where none is left to train on.
    """
    contaminated = contaminated_documents(documents)
    for document in documents:
        if document.id in contaminated:
            held_out, match = contaminated[document.id]
            what = f"holds text of {held_out.source}, which is held out: {match.phrase[:120]}"
            rejects.append(_reject(document, what))
    results = [document for document in documents if document.id not in contaminated]
    if contaminated and not any(document.split == "train" for document in results):
        what = (
            f"all documents to train on share text with held-out ones, such as {rejects[-1].reason}"
        )
        fix = "give documents that differ, or a smaller corpus.split.heldout"
        raise DistillError(Exit.INPUT, rejects[-1].where, what, fix)
    return results


def report(
    run: Run, documents: list[Document], rejects: list[Reject], counts: dict[str, Any]
) -> None:
    """Show the counts, and note them in the manifest."""
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
    by_split = ", ".join(f"{count} {name}" for name, count in sorted(splits.items()))
    say(
        f"corpus: {facts['rows']} rows, {facts['bad']} bad, {repeats} repeats, "
        f"{len(documents)} documents ({by_split})"
    )
    if counts["contaminated"]:
        say(
            f"corpus: {counts['contaminated']} documents share text with held-out ones and are "
            f"left out of training: {run.path('rejects.jsonl')}"
        )
    if private.get("documents"):
        action = "dropped" if dropped else "masked"
        say(
            f"corpus: private text {action} in {private['documents']} rows: {format_counts(private['kinds'])}"
        )
