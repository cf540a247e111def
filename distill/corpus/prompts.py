"""The prompts stage: applies the tasks to the documents, in the student's view and the teacher's.

A prompt is in the split of its document; who is asked what follows from content hashes, so a run
repeats. The questions that the teacher writes about a passage become prompts here too: each must
stand by itself, since the student may not see the passage.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from distill import shipped_table
from distill.config.teachers import Questions
from distill.corpus.clean import break_up
from distill.errors import DistillError, Exit
from distill.formatting import clip, one_line
from distill.languages import SPACELESS, language_of
from distill.records import SPLITS, Document, Message, Prompt, Response, digest
from distill.storage.files import read_records, sha256_file, write_json, write_records
from distill.storage.progress import say
from distill.storage.run_folder import Run
from distill.tasks.checkers import normalise_answer
from distill.tasks.task import TASKS_FILE, PromptView, Task, fill, load_task, task_path

PLAIN, QUESTION = "chat", "question"  # tasks: of prompts asked unchanged, and of written questions
TABLE = shipped_table("questions.yaml")
MARK = re.compile(TABLE["mark"], re.IGNORECASE)
ASKS = re.compile("|".join(TABLE["asks"]))
POINTS_AT_PASSAGE = re.compile("|".join(TABLE["points_at_passage"]), re.IGNORECASE)
QUOTES = ' \t\r*"\u201c\u201d\u00ab\u00bb\u300c\u300d'
SHORTEST, LONGEST = 12, 400  # characters of a question
MOST = 1000  # questions about one document; each is compared with each
SHOWN = 3  # prompts that are shown
NEARLY_SAME = 0.7  # Jaccard similarity of the words of two questions
# What `prompts.select` has chosen so far: each file holds what the one before it holds, and more
TRANCHES = ("tranches/1/prompts.jsonl", "tranches/2/prompts.jsonl", "selected.jsonl")


def main(run: Run) -> None:
    """Make prompts.jsonl from documents.jsonl; exit 2 where a task does not fit them."""
    settings = run.config.prompts
    documents = read_records(run.path("documents.jsonl"), Document)
    tasks = {task.name: task for task in map(load_task, settings.tasks)}
    if len(tasks) < len(settings.tasks):  # prompts could not tell them apart
        what = f"two tasks have one name among {', '.join(settings.tasks)}"
        raise DistillError(Exit.CONFIG, "prompts.tasks", what, "rename one")
    held = sum("messages" in document.meta for document in documents)
    about = [name for name, task in tasks.items() if "prompt" not in task.student.user]
    if held and about:
        asks = f"{held:,} rows are prompts, and task {about[0]} asks about them as if they were"
        say(f"warning: {asks} texts; prompts.tasks=[] asks what they ask")
    first: list[Prompt] = []
    counts: dict[str, Counter[str]] = {}

    def prompts() -> Iterator[Prompt]:
        for split in SPLITS:
            mine = sorted((d for d in documents if d.split == split), key=lambda d: d.id)
            pairs = assign_tasks(
                mine, [*tasks.values()], settings.per_document, settings.questions is not None
            )
            counts[split] = Counter()
            choosing = split == "train" and settings.select != "all"
            for document, task in islice(pairs, None if choosing else getattr(settings, split)):
                prompt = ask(task, document)
                counts[split][prompt.task] += 1
                if len(first) < SHOWN:
                    first.append(prompt)
                yield prompt
            by_task = ", ".join(f"{count} {task}" for task, count in counts[split].items())
            say(f"prompts: {split}: {by_task or 'none'}")

    write_records(run.path("prompts.jsonl"), prompts())
    for prompt in first:
        turns_shown = " | ".join(f"{turn.role}: {turn.content}" for turn in prompt.messages)
        say(f"prompts: for example: {one_line(clip(turns_shown, 300))}")
    bodies = {name: task.model_dump(mode="json") for name, task in tasks.items()}
    write_json(run.path(TASKS_FILE), bodies)
    # documents that forge a role are counted, not dropped
    forged = sum(break_up(document.text) != document.text for document in documents)
    run.note("prompts", {"counts": counts, "control_token_texts": forged})
    if forged:
        say(f"prompts: {forged} documents hold control-token text, which is broken up")


def identity(tasks: Sequence[str]) -> dict[str, str]:
    """Return the hash of each task's file."""
    paths = {name: task_path(name) for name in tasks or (PLAIN,)}
    return {f"task {name}": sha256_file(path) for name, path in paths.items() if path.is_file()}


def drawn(run: Run) -> list[Prompt]:
    """Return the prompts of the train split: those that are chosen, then others in a random order.

    The order follows from the seed and the prompts' contents.
    """
    splits = {d.id: d.split for d in read_records(run.path("documents.jsonl"), Document)}
    path = next((p for p in map(run.path, reversed(TRANCHES)) if p.exists()), None)
    selection = {prompt.id for prompt in read_records(path, Prompt)} if path else set[str]()
    prompts = read_records(run.path("prompts.jsonl"), Prompt)
    train = [prompt for prompt in prompts if splits[prompt.document_id] == "train"]
    return sorted(train, key=lambda p: (p.id not in selection, digest([run.config.seed, p.id])))


def asked(run: Run, share: float = 1.0) -> list[Prompt]:
    """Return the prompts that the teacher is asked, or of the train split a share of them.

    Where `prompts.select` has not chosen all, prompts in the random order stand for the others.
    """
    prompts, settings = read_records(run.path("prompts.jsonl"), Prompt), run.config.prompts
    if settings.select == "all":
        return prompts
    others = {prompt.id for prompt in drawn(run)[int(share * (settings.train or 0)) :]}
    return [prompt for prompt in prompts if prompt.id not in others]


def assign_tasks(
    documents: list[Document], tasks: list[Task], per_document: str, questions: bool
) -> Iterator[tuple[Document, Task]]:
    """Yield each document with each of its tasks; a row that holds a prompt needs no task."""
    plain = load_task(PLAIN)
    for place, document in enumerate(documents):
        if not tasks and "messages" in document.meta:
            yield document, plain
        elif not tasks and not questions:
            what = f"{document.source} is a document, and no task is asked of it"
            fix = "name tasks, or set prompts.questions"
            raise DistillError(Exit.CONFIG, "prompts.tasks", what, fix)
        elif tasks and per_document == "rotate":
            yield document, tasks[place % len(tasks)]
        else:
            yield from ((document, task) for task in tasks)


def ask(task: Task, document: Document) -> Prompt:
    """Build the prompt of a task about a document, or around the prompt that a row holds."""
    values = template_values(document)
    teacher = task.teacher_view()
    reference = document.meta.get("reference")
    if task.reference is not None:
        reference = fill(task.reference, task.name, values)
    return Prompt.make(
        turns(task.student, task.name, document, values),
        document.id,
        task.name,
        turns(teacher, task.name, document, values) if teacher else None,
        reference,
    )


def template_values(document: Document) -> dict[str, object]:
    """Return what templates may use: `document.text`, `document.meta`, and of a prompt `prompt`."""
    meta = {k: break_up(v) if isinstance(v, str) else v for k, v in document.meta.items()}
    values: dict[str, object] = {"document": {"text": break_up(document.text), "meta": meta}}
    messages = document.meta.get("messages")
    return values | {"prompt": break_up(messages[-1]["content"])} if messages else values


def turns(
    view: PromptView, task: str, document: Document, values: dict[str, object]
) -> tuple[Message, ...]:
    """Return one side's conversation; a system turn of the task replaces the document's own."""
    earlier = [
        Message(role=turn["role"], content=break_up(turn["content"]))
        for turn in document.meta.get("messages", [])[:-1]
    ]
    if view.system is not None:
        earlier = [turn for turn in earlier if turn.role != "system"]
        earlier.insert(0, Message(role="system", content=fill(view.system, task, values)))
    return (*earlier, Message(role="user", content=fill(view.user, task, values)))


def question_shares(kinds: Sequence[str], per_document: int) -> list[tuple[str, int]]:
    """Spread the questions of a document over the kinds, the first ones with the remainder."""
    share, extra = divmod(per_document, len(kinds))
    counts = [(kind, share + (number < extra)) for number, kind in enumerate(kinds)]
    return [(kind, count) for kind, count in counts if count]


def prompts_for_questions(document: Document, settings: Questions) -> list[Prompt]:
    """Build the prompts that ask the teacher for questions: one a kind, `question:KIND`."""
    prompts, language = [], language_of(document.text)
    for kind, count in question_shares(settings.kinds, settings.per_document):
        number = "one question" if count == 1 else f"{count} different questions"
        passage, does = break_up(document.text), TABLE["kinds"][kind]
        text = TABLE["ask"].format(passage=passage, count=number, does=does)
        if language not in (None, "English"):
            text += TABLE["in_its_language"].format(language=language)
        message = Message(role="user", content=text)
        prompts.append(Prompt.make((message,), document.id, f"{QUESTION}:{kind}"))
    return prompts


def read_questions(reply: str) -> list[str]:
    """Return the questions of a reply that stand by themselves, without marks and quotes."""
    lines = [MARK.sub("", line.strip(QUOTES)).strip(QUOTES) for line in reply.split("\n")]
    return [
        line
        for line in lines
        if len(line) + 2 * len(SPACELESS.findall(line)) >= SHORTEST
        and len(line) <= LONGEST
        and ASKS.search(line)
        and not POINTS_AT_PASSAGE.search(line)
    ]


def distinct(questions: Iterable[str]) -> list[str]:
    """Return the questions, of the first 1,000, that do not nearly repeat an earlier one."""
    results: dict[str, set[str]] = {}
    for question in islice(questions, MOST):
        words = set(normalise_answer(question).split())
        overlaps = (len(words & other) / len(words | other) for other in results.values())
        if words and all(overlap < NEARLY_SAME for overlap in overlaps):
            results[question] = words
    return list(results)


def written_prompts(
    settings: Questions, document: Document, replies: Iterable[Response]
) -> list[Prompt]:
    """Build a prompt of each written question, with the passage in the views that see it."""
    task = load_task(QUESTION)
    templates = task.student.user, (task.teacher_view() or task.student).user
    sees = settings.student_sees_passage, settings.answer_with_passage
    prompts = []
    for question in distinct(one for reply in replies for one in read_questions(reply.text)):
        values = template_values(document) | {"question": break_up(question)}
        student, teacher = (
            (Message(role="user", content=fill(templates[passage], task.name, values)),)
            for passage in sees
        )
        teacher = teacher if sees[0] != sees[1] else None
        prompts.append(Prompt.make(student, document.id, task.name, teacher))
    return prompts
