"""The filter stage: which answers are trained on. Every answer that is dropped keeps its reason.

Held-out pairs are never filtered: a teacher that fails there must score 0. Of several samples of a
prompt, all that pass and differ are kept, or the first few: rejection sampling.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from operator import itemgetter

import numpy as np

from distill.callables import find as find_callable
from distill.callables import source_hash
from distill.config.tree import Filters
from distill.config.yaml_file import find_config
from distill.corpus.contamination import contaminated, own_parts
from distill.corpus.ngrams import words
from distill.errors import DistillError, Exit
from distill.generation.refusals import TABLE, is_refusal
from distill.languages import SPACELESS
from distill.reasoning import join_thought
from distill.records import SPLITS, Document, Pair, Prompt, Record, Response, Split
from distill.storage.files import read_records, sha256_file, write_json, write_records
from distill.storage.progress import say
from distill.storage.run_folder import Run
from distill.tasks.checkers import check, strip_fence
from distill.tasks.task import FindTask, Task, checker_of, shipped, tasks_of_run

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
CONTAMINATED, WRONG = "holds a held-out item", "failed checker"
# What makes a text code: a fence, an indent, a statement's end, a call
CODE_LINE = re.compile(r"```|~~~|^[ \t]+\S|[{}\]>;][ \t\r]*$|^[\w.]+\(.*\)[ \t\r]*$", re.MULTILINE)
EMPHASIS = re.compile(
    r"(?<![\w*\\])(?:(\*{1,3})(?=[^\s*])([^*\n]++)(?<=\S)\1(?![\w*])"
    r"|_(?=[^\s_])([^_\n]++)(?<=\S)_(?!\w))"
)
LAST_MARK = re.compile(r"(?<=[^\W\d_]{2})!$|(?<![.,:])[.,:\u3002]$")  # not of 5! and "1, 2, ..."
# Where case may say something: symbols (x = X, `ls -A`), units (5 mW), formulas (H2O, f(X))
CASED = re.compile(
    r"""[^\w\s.,;:!?'"()%$#\u2013-\u201d-]|\$(?!\d)|_|\w\(|\d\s?[^\W\d_]{1,2}\b|[^\W\d_]\d|\s-+[^\W\d_]"""
)
# All but ASCII, exponents, indices and fractions, which NFKC makes digits of the number before
FORMS = re.compile("[^\x00-\x7f\xb2\xb3\xb9\xbc-\xbe\u2070-\u209f\u2150-\u215f]+")
CHECKED = "validation_prompts.jsonl"  # in a run's folder: what validation by the checker asks


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
    prompts = asked_prompts(run)
    splits = {d.id: d.split for d in read_records(run.path("documents.jsonl"), Document)}
    pairs = [
        Pair(prompt=prompts[response.prompt_id], response=response)
        for response in read_records(run.path("responses.jsonl"), Response)
    ]
    learned = (p for p in pairs if splits[p.prompt.document_id] != "heldout")
    texts = ((p.response.id, p.prompt, p.response.text) for p in learned)
    matches = contaminated_ids(run, texts)
    settings, keep = run.config.filters, run.config.reasoning == "keep"
    filters = active_filters(settings, tasks_of_run(run.folder), matches)
    dropped, dataset = list[Dropped](), dict[Split, list[Pair]]()
    for split in SPLITS:
        mine = [pair for pair in pairs if splits[pair.prompt.document_id] == split]
        if split != "heldout":
            soft = split == "train" and settings.failed_checker == "signals_only"
            mine = sift(mine, split, filters, dropped, keep, soft, settings.answers_per_prompt)
        dataset[split] = mine
        write_records(run.path(f"dataset/{split}.jsonl"), mine)
    write_records(run.path("dropped.jsonl"), dropped)
    if run.config.train.metric_for_best_model == "checker":
        write_records(run.path(CHECKED), checked_prompts(run))
    rows = [f"{len(mine)} kept for {split}" for split, mine in dataset.items()]
    if only_signals := sum(pair.only_signals for pair in dataset["train"]):
        rows[0] += f" ({only_signals} of them for soft labels alone)"
    reasons = Counter(row.reason for row in dropped).most_common()
    funnel = {"prompts": len({pair.prompt.id for pair in pairs}), "answers": len(pairs)}
    funnel |= {f"kept_{split}": len(mine) for split, mine in dataset.items()}
    funnel |= {"only_signals": only_signals} if only_signals else {}
    write_json(run.path("funnel.json"), funnel | {"dropped": dict(reasons)})
    rows += [f"{count} dropped: {reason}" for reason, count in reasons]
    say(f"filter: {len(pairs)} answers; {'; '.join(rows)}")
    if not dataset["train"]:
        most = f"{reasons[0][1]} of {len(pairs)} were {reasons[0][0]}" if reasons else "no answers"
        what, where = f"no row is left: {most}", run.path("dataset/train.jsonl")
        fix = "change filters or teacher.max_new_tokens; dropped.jsonl has the texts"
        raise DistillError(Exit.INPUT, where, what, fix)


def asked_prompts(run: Run) -> dict[str, Prompt]:
    """Return the prompts of a run by their ids, with the questions that the teacher wrote."""
    paths = [run.path("prompts.jsonl"), run.path("questions.jsonl")]
    return {p.id: p for path in paths if path.exists() for p in read_records(path, Prompt)}


def contaminated_ids(run: Run, texts: Iterable[tuple[str, Prompt, str]]) -> set[str]:
    """Return the ids of the texts that hold, or whose prompt does, something of a held-out one."""
    documents = read_records(run.path("documents.jsonl"), Document)
    held_out = {document.id for document in documents if document.split == "heldout"}
    prompts = (p for p in asked_prompts(run).values() if p.document_id in held_out)
    parts = ((name, "\n".join([*own_parts(prompt), text])) for name, prompt, text in texts)
    return contaminated(parts, prompts)


def checked_prompts(run: Run) -> list[Prompt]:
    """Return the validation prompts whose answers a checker can judge, whether the teacher has
    answered or not, but for those that hold something of a held-out prompt."""
    splits = {d.id: d.split for d in read_records(run.path("documents.jsonl"), Document)}
    prompts, find = read_records(run.path("prompts.jsonl"), Prompt), tasks_of_run(run.folder)
    mine = [p for p in prompts if splits[p.document_id] == "validation"]
    mine = [prompt for prompt in mine if checker_of(find(prompt.task), prompt)]
    matches = contaminated_ids(run, ((prompt.id, prompt, "") for prompt in mine))
    return [prompt for prompt in mine if prompt.id not in matches]


def identity(settings: Filters, reasoning: str) -> dict[str, str]:
    """Return whether rows keep their reasoning, the table of refusals, and the user's filters."""
    facts = {"reasoning": reasoning} if reasoning == "keep" else {}
    if settings.refusal:
        facts[f"table {TABLE}"] = sha256_file(find_config(TABLE))
    return facts | {f"filter {name}": source_hash("filter", name) for name in settings.python}


def active_filters(
    settings: Filters, find: FindTask = shipped, matches: Collection[str] = ()
) -> list[Filter]:
    """Return the filters that the config turns on, in the order in which they give the reason; the
    last one drops the answers of the ids in `matches`."""
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
        (settings.failed_checker != "keep", lambda p, r: rejected(find(p.task), p, r, WRONG)),
        (True, lambda p, r: "too long" if most and r.usage.output_tokens > most else None),
        *((True, find_callable("filter", name)) for name in settings.python),
        (True, lambda p, r: CONTAMINATED if r.id in matches else None),
    ]
    return [filter_ for on, filter_ in switches if on]


def sift(
    pairs: Iterable[Pair],
    split: Split,
    filters: Sequence[Filter],
    dropped: list[Dropped],
    reasoning: bool = False,
    soft: bool = False,
    most: int | None = None,
) -> list[Pair]:
    """Return the pairs that pass, of a prompt `most`; the others are added to `dropped`.

    With `soft`, wrong answers pass too, after the right ones, whose place none takes, and marked.
    """
    judged = list[tuple[bool, str | None, Pair]]()
    for pair in pairs:
        reasons = (reason for f in filters if (reason := f(pair.prompt, pair.response)))
        reason = next(reasons, None)
        wrong = soft and reason == WRONG
        judged.append((wrong, next(reasons, None) if wrong else reason, pair))
    results, answers = list[Pair](), defaultdict[str, set[str]](set)
    for wrong, reason, pair in sorted(judged, key=itemgetter(0)):
        prompt, response, mine = pair.prompt, pair.response, answers[pair.prompt.id]
        form = same_as(response.text)
        if not reason and (form in mine or len(mine) == most):
            reason = "same answer again" if form in mine else "more than answers_per_prompt"
        if reason:
            names = {"prompt_id": prompt.id, "response_id": response.id, "task": prompt.task}
            dropped.append(Dropped(**names, split=split, reason=reason, text=response.text))
            continue
        mine.add(form)
        if reasoning and response.reasoning:
            text = join_thought(response.text, response.reasoning)
            response = response.model_copy(update={"text": text})
        results.append(pair.model_copy(update={"response": response, "only_signals": wrong}))
    return results


def same_as(text: str) -> str:
    """Return the form that answers share which count as the same one.

    Code stays as it is, but for a fence around all of it and space at the ends of lines. Of prose,
    characters have one form (NFKC, but 10² is not 102), white space is one space, markdown's
    emphasis and a last full stop go, and case goes where it can say nothing.
    """
    body = strip_fence(text)
    if body != text.strip() or CODE_LINE.search(body):
        return "\n".join(line.rstrip() for line in body.split("\n"))
    body = unicodedata.normalize("NFC", body)
    body = FORMS.sub(lambda match: unicodedata.normalize("NFKC", match[0]), body)
    for _ in range(2):  # emphasis within emphasis
        body = EMPHASIS.sub(r"\2\3", body)
    body = LAST_MARK.sub("", " ".join(body.split()))
    return body if CASED.search(body) else body.casefold()


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
    checker = checker_of(task, prompt)
    if not checker or (checker["kind"] in FORMATS) != (reason == "wrong format"):
        return None
    result = check(checker, prompt, response.text)
    if result.passed is None:  # a failure of ours: the reason says which
        return f"not checked: {result.reason}"
    return None if result.passed else reason
