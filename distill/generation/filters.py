"""The filter stage: which answers are trained on. Every answer that is dropped keeps its reason.

Held-out pairs are never filtered: a teacher that fails there must score 0. Of several samples of a
prompt, all that pass and differ in text are kept: rejection sampling.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from distill.callables import find as find_callable
from distill.callables import source_hash
from distill.config.tree import Filters
from distill.config.yaml_file import find_config
from distill.corpus.contamination import contaminated_pairs
from distill.corpus.ngrams import words
from distill.errors import DistillError, Exit
from distill.generation.refusals import TABLE, is_refusal
from distill.languages import SPACELESS
from distill.reasoning import join_thought
from distill.records import SPLITS, Document, Pair, Prompt, Record, Response, Split
from distill.storage.files import read_records, sha256_file, write_json, write_records
from distill.storage.progress import say
from distill.storage.run_folder import Run
from distill.tasks.checkers import check, needs_reference, strip_fence
from distill.tasks.task import FindTask, Task, shipped, tasks_of_run

Filter = Callable[[Prompt, Response], str | None]

FORMATS = frozenset({"json_object", "python_code"})  # checkers that judge the form of an answer
CODE = re.compile(r"```.*?```", re.DOTALL)  # closed, so that nothing ran away in it
ITEM = re.compile(r"^[ \t]*(?:[-*\u2022]|\d{1,4}[.)])[ \t]+", re.MULTILINE)
TAIL, PERIOD = 2000, 200  # words within which a loop is looked for, and of one turn of it
UNIT = re.compile(r"(.{1,200}?)\1{9}")
# A loop: different words of a turn (a character of Chinese is half a word), and how often in a row.
# Fewer turns are a refrain; fewer words a sum ("1 + 1"), a row of labels, of a matrix, of a song.
LOOPS = ((1, 60), (2, 30), (3, 20), (4, 6), (8, 4))
MOST_REPEATED = 0.5  # of the word triples of prose may have occurred before
TRIPLES, VOCABULARY = 30, 8  # with fewer of either, an answer is too short to judge by them
PROSE = 100  # characters of a line, on average: verses and tables have shorter ones
CONTAMINATED = "holds a held-out item"


class Dropped(Record):
    """An answer that is not trained on, and why."""

    prompt_id: str
    response_id: str
    task: str
    split: Split
    reason: str
    text: str


def main(run: Run) -> None:
    """Make dataset/*.jsonl, dropped.jsonl and funnel.json; exit 3 where no row is left."""
    sources = [run.path("prompts.jsonl"), run.path("questions.jsonl")]
    prompts = {p.id: p for path in sources if path.exists() for p in read_records(path, Prompt)}
    splits = {d.id: d.split for d in read_records(run.path("documents.jsonl"), Document)}
    pairs = [
        Pair(prompt=prompts[response.prompt_id], response=response)
        for response in read_records(run.path("responses.jsonl"), Response)
    ]
    contaminated = contaminated_pairs(
        (p for p in pairs if splits[p.prompt.document_id] != "heldout"),
        (p for p in prompts.values() if splits[p.document_id] == "heldout"),
    )
    filters = active_filters(run.config.filters, tasks_of_run(run.folder))
    filters.append(lambda p, r: CONTAMINATED if r.id in contaminated else None)
    dropped, dataset = list[Dropped](), dict[Split, list[Pair]]()
    for split in SPLITS:
        mine = [pair for pair in pairs if splits[pair.prompt.document_id] == split]
        if split != "heldout":
            mine = sift(mine, split, filters, dropped, run.config.reasoning == "keep")
        dataset[split] = mine
        write_records(run.path(f"dataset/{split}.jsonl"), mine)
    write_records(run.path("dropped.jsonl"), dropped)
    rows = [f"{len(mine)} kept for {split}" for split, mine in dataset.items()]
    reasons = Counter(row.reason for row in dropped).most_common()
    funnel = {"prompts": len({pair.prompt.id for pair in pairs}), "answers": len(pairs)}
    funnel |= {f"kept_{split}": len(mine) for split, mine in dataset.items()}
    write_json(run.path("funnel.json"), funnel | {"dropped": dict(reasons)})
    rows += [f"{count} dropped: {reason}" for reason, count in reasons]
    say(f"filter: {len(pairs)} answers; {'; '.join(rows)}")
    if not dataset["train"]:
        most = f"{reasons[0][1]} of {len(pairs)} were {reasons[0][0]}" if reasons else "no answers"
        what, where = f"no row is left: {most}", run.path("dataset/train.jsonl")
        fix = "change filters or teacher.max_new_tokens; dropped.jsonl has the texts"
        raise DistillError(Exit.INPUT, where, what, fix)


def identity(settings: Filters, reasoning: str) -> dict[str, str]:
    """Return whether rows keep their reasoning, the table of refusals, and the user's filters."""
    facts = {"reasoning": reasoning} if reasoning == "keep" else {}
    if settings.refusal:
        facts[f"table {TABLE}"] = sha256_file(find_config(TABLE))
    return facts | {f"filter {name}": source_hash("filter", name) for name in settings.python}


def active_filters(settings: Filters, find: FindTask = shipped) -> list[Filter]:
    """Return the filters that the config turns on, in the order in which they give the reason."""
    most = settings.max_answer_tokens
    switches: list[tuple[bool, Filter]] = [
        (True, lambda p, r: "failed" if r.stop in ("error", "filtered") else None),
        (settings.truncated, lambda p, r: "truncated" if r.stop == "length" else None),
        # nothing but an empty code fence is empty too
        (settings.empty, lambda p, r: None if strip_fence(r.text) else "empty"),
        # a text that merely quotes a refusal stays
        (settings.refusal, lambda p, r: "refusal" if is_refusal(r.text) else None),
        (settings.repetition, repetition),
        (settings.wrong_format, lambda p, r: rejected(find(p.task), p, r, "wrong format")),
        (settings.failed_checker, lambda p, r: rejected(find(p.task), p, r, "failed checker")),
        (True, lambda p, r: "too long" if most and r.usage.output_tokens > most else None),
        *((True, find_callable("filter", name)) for name in settings.python),
    ]
    return [filter_ for on, filter_ in switches if on]


def sift(
    pairs: Iterable[Pair],
    split: Split,
    filters: Sequence[Filter],
    dropped: list[Dropped],
    reasoning: bool = False,
) -> list[Pair]:
    """Return the pairs that pass; the others, and repeats of an answer, are added to `dropped`."""
    results, seen = list[Pair](), set[tuple[str, str]]()
    for pair in pairs:
        prompt, response = pair.prompt, pair.response
        reason = next((why for f in filters if (why := f(prompt, response))), None)
        answer = (prompt.id, response.text.strip())
        if reason := reason or ("same answer again" if answer in seen else None):
            names = {"prompt_id": prompt.id, "response_id": response.id, "task": prompt.task}
            dropped.append(Dropped(**names, split=split, reason=reason, text=response.text))
            continue
        seen.add(answer)
        if reasoning and response.reasoning:
            text = join_thought(response.text, response.reasoning)
            pair = Pair(prompt=prompt, response=response.model_copy(update={"text": text}))
        results.append(pair)
    return results


def repetition(prompt: Prompt, response: Response) -> str | None:
    """Drop an answer that goes round in circles, or half of whose prose was there before."""
    text = ITEM.sub("", CODE.sub("", response.text))
    # what is complete JSON, or closed code, is no circle, however its rows repeat
    if text.startswith(("{", "[")) and text.rstrip().endswith(("}", "]")):
        return None
    tokens = words(text)
    triples = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    again = len(triples) - len(set(triples))
    # the only circle inside a word: letters without a space, as "abab..."
    long = (token[-TAIL:] for token in tokens if len(token) > 200 and not token.isdigit())
    if any(map(UNIT.search, long)):
        return "repetition"
    if again < LOOPS[-1][0]:
        return None
    prose = len(set(tokens)) >= VOCABULARY and len(text) > PROSE * len(text.splitlines())
    if prose and len(triples) >= TRIPLES and again > MOST_REPEATED * len(triples):
        return "repetition"
    numbers: dict[str, int] = {}
    tail = tokens[-TAIL:]
    ids_N = np.array([numbers.setdefault(token, len(numbers)) for token in tail])
    for period in range(1, min(PERIOD, len(tail) // 4) + 1):
        # where the words differ from those one turn before: between two such places is a circle
        breaks = np.flatnonzero(ids_N[period:] != ids_N[:-period])
        gaps = np.diff(np.concatenate([[-1], breaks, [len(tail) - period]])) - 1
        start = int(gaps.argmax())
        turns = 1 + int(gaps[start]) // period
        first = int(breaks[start - 1]) + 1 if start else 0
        turn = tail[first : first + period]
        size = sum(0.5 if SPACELESS.match(word) else 1 for word in set(turn))
        least = next((count for length, count in reversed(LOOPS) if size >= length), LOOPS[0][1])
        if turns >= least:
            return "repetition"
    return None


def rejected(task: Task | None, prompt: Prompt, response: Response, reason: str) -> str | None:
    """Return the reason to drop what a task's checker rejects, by its form or by what it says."""
    checker = task and task.checker
    if not checker or (checker["kind"] in FORMATS) != (reason == "wrong format"):
        return None
    if needs_reference(checker["kind"]) and not (prompt.reference or "").strip():
        return None
    result = check(checker, prompt, response.text)
    if result.passed is None:  # a failure of ours: the reason says which
        return f"not checked: {result.reason}"
    return None if result.passed else reason
