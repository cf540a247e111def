"""`distill samples RUN` and `distill chat RUN`: what the models said, and what they say now.

A chat keeps nothing, but for the answers of a paid teacher: it is asked where it is named, and its
answers go through the store that runs share. What models wrote is shown with private text masked.
"""

import difflib
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from textwrap import indent

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distill.config.teachers import EndpointTeacher
from distill.corpus.privacy import mask
from distill.errors import DistillError, Exit
from distill.evaluation.evaluate import read_answers
from distill.evaluation.measurements import EvaluationResult, Model
from distill.evaluation.suites import answer_limit, held_out_items
from distill.formatting import one_line, visible
from distill.records import Item, Message, Prompt, Response, Score
from distill.report.tables import verdict
from distill.responders.ask import Ask
from distill.responders.kinds import make_responder
from distill.responders.prices import load_prices
from distill.responders.responder import Buyer, Request, Sampling
from distill.responders.terms import require_terms
from distill.storage.files import read_json, read_records
from distill.storage.progress import console, say
from distill.storage.run_folder import Run, Stage, require_made

ORDER: tuple[Model, ...] = ("student", "teacher", "base")  # as in the report
NARROW = 36  # columns of a terminal that an answer needs; with fewer they stand under each other


def safe(text: str) -> str:
    """Return a model's or a document's text for the terminal."""
    return visible(mask(text)[0])


def block(title: str, text: str) -> str:
    """Return a text under its title; it is indented, so it cannot pass for a title."""
    return f"{title}:\n{indent(text, '  ')}"


def answer_text(response: Response) -> str:
    """Return an answer for the terminal, or in brackets why there is none."""
    if response.stop == "error":
        return f"(no answer: {safe(response.error or 'no reason given')})"
    note = {"filtered": " (refused)", "length": " (cut off)"}.get(response.stop, "")
    return (safe(response.text) if response.text.strip() else "(empty)") + note


def require_name(option: str, name: str, names: Sequence[str]) -> None:
    """Stop (exit 2) where a name is not one of `names`, and say the nearest."""
    if name not in names:
        near = difflib.get_close_matches(name, names, 1, 0.5)
        fix = f"did you mean {near[0]}?" if near else f"one of {', '.join(names)}"
        raise DistillError(Exit.CONFIG, option, f"there is no {name[:60]!r} in this run", fix)


def samples(run: Run, task: str | None, failed: bool, disagree: bool, most: int | None) -> str:
    """Return held-out items as text: what was asked, and each model's answer with its score.

    Those of `task`, whose student `failed` (no full score of its check, or 0 or no score), where
    student and teacher `disagree` (have other scores), at `most` so many. Raises DistillError: exit
    2 for an unknown task, 5 where the run is not evaluated.
    """
    require_made(run.path("evaluation.json"), "evaluate")
    evaluation = EvaluationResult.model_validate(read_json(run.path("evaluation.json")))
    items, overlap = held_out_items(run.folder)[1], evaluation.contamination
    if task is not None:
        require_name("--task", task, list(dict.fromkeys(item.task for item in items)))
    of_all = overlap.all_items.tasks if overlap and overlap.all_items else {}
    metrics = {name: row.metric for name, row in {**of_all, **evaluation.tasks}.items()}
    answers, scores = read_answers(run, items), dict[str, dict[str, Score]]()
    for model in ORDER:
        rows = read_records(run.path(f"scores/{model}.jsonl"), Score)
        scores[model] = {score.item_id: score for score in rows}
    selected = list[Item]()
    for item in items:
        student, teacher = scores["student"].get(item.id), scores["teacher"].get(item.id)
        value, checked = student and student.value, metrics.get(item.task) != "chrF"
        passed = bool(value) and (value == 1 or not checked)
        alike = not (student and teacher) or student.value == teacher.value
        if task in (None, item.task) and not (failed and passed) and not (disagree and alike):
            selected.append(item)
    selected = selected[:most]
    parts = [f"{len(selected)} of {len(items)} held-out items of {run.folder}"]
    for number, item in enumerate(selected, 1):
        lines: list[str] = [f"{number} of {len(selected)} · {item.task} · {item.id}"]
        if overlap and item.id in overlap.items:
            lines[0] += " · stands in the training data, so it is outside the results"
        lines += [block(turn.role, safe(turn.content)) for turn in item.prompt.messages]
        lines += [block("reference", safe(item.reference))] if item.reference else []
        for model in (model for model in ORDER if item.id in answers[model]):
            more = model == "teacher" and item.prompt.teacher_messages
            title = f"{model} (shown more than the student)" if more else model
            if score := scores[model].get(item.id):
                reason = one_line(safe(score.reason))
                title += f" {verdict(score.value, reason, metrics.get(item.task, ''))}"
            lines.append(block(title, answer_text(answers[model][item.id])))
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def chat(run: Run, models: str | None) -> None:
    """Talk with `models`, separated by commas: else the student, the base, and a local teacher.

    What a paid teacher costs enters the ledger as that of `chat`. Raises DistillError: exit 2 for
    an unknown model or a teacher that cannot be asked, 5 where nothing is trained, and as the
    generation does.
    """
    teacher = run.config.teacher
    names: list[str] = [m for m in ORDER if m != "teacher" or teacher.runs_here]
    if models is not None:
        names = list(dict.fromkeys(word.strip() for word in models.split(",")))
    for name in names:
        require_name("--models", name, ORDER)
    if "student" in names:
        require_made(run.trained("adapter"), "train")
    if "teacher" in names and not teacher.makes_answers:
        fix = "--models student,base"
        raise DistillError(Exit.CONFIG, "teacher.kind", f"{teacher.kind} cannot be asked", fix)
    if "teacher" not in names or not isinstance(teacher, EndpointTeacher):
        return talk(names, run)
    price = load_prices(run.config.evaluation.prices).teacher(teacher.model)
    cost = f"{price.rates} ({price.date}, {price.source})" if price else "an unknown price"
    say(f"the teacher is paid: {teacher.model}, {cost}; what it has answered before costs nothing")
    with run.lock():
        run.do(Stage("chat", (), (), (), partial(talk, names)))


class Speaker:
    """One who is talked with: how it is asked, and the turns so far."""

    def __init__(self, run: Run, name: str, stack: ExitStack) -> None:
        from distill.evaluation.answering import student_responder  # which loads torch

        config, teacher, path = run.config, run.config.teacher, run.path("prompts.jsonl")
        self.turns, self.ask = list[Message](), None
        prompts = read_records(path, Prompt) if path.is_file() else []
        views = (p.asked_of_teacher() if name == "teacher" else p.messages for p in prompts)
        first = {view[0].model_dump_json(): view[0] for view in views}
        shared = len(first) == 1 and "system" in {turn.role for turn in first.values()}
        self.opening = tuple(first.values()) if shared else ()  # as the student was trained
        for turn in self.opening:
            say(f"{name}: begins with the system turn of all prompts, {turn.content!r}")
        if name == "teacher":
            require_terms(teacher, config.terms.basis)
            now = {"batch": False} if teacher.paid else {}
            self.responder = make_responder(teacher.model_copy(update=now), config)
            self.sampling = Sampling.of(teacher)  # so that what the run has bought is found
        else:
            self.responder, _ = student_responder(run, name, trained=name == "student")
            self.sampling = Sampling(max_new_tokens=answer_limit(config))
        if isinstance(self.responder, Buyer):
            store = config.store_folder() / "responses"
            self.ask = stack.enter_context(Ask(self.responder, store, run))
        elif close := getattr(self.responder, "close", None):  # of an engine
            stack.callback(close)

    def reply(self, question: str) -> str:
        """Ask the next question; what gets no answer is no part of the conversation."""
        turn = Message(role="user", content=question)
        messages = (*self.opening, *self.turns, turn)
        request = Request.make(self.responder.origin, "chat", messages, self.sampling)
        if self.ask:
            (request,) = self.ask.fetch([request], self.responder.model)
            response = self.ask.store.response(request)
        else:
            with console.status(self.responder.model):
                (raw,) = self.responder.ask([request])
            response = raw.response("chat")
        if response.stop in ("end", "length") and response.text.strip():
            self.turns += [turn, Message(role="assistant", content=response.text)]
        return answer_text(response)


def questions() -> Iterator[str]:
    """Yield what is typed, or what comes through a pipe, a line each, until Ctrl-D or /quit."""
    terminal = sys.stdin.isatty()
    if terminal:
        say("Ctrl-D or /quit ends, /new begins a new conversation")
        with suppress(ImportError):  # by it `input` lets a line be edited
            import readline  # noqa: F401
    with suppress(EOFError):
        while (line := input("> " if terminal else "").strip()) != "/quit":
            if line:
                yield line
        return
    print(end="\n" * terminal)  # after Ctrl-D


def talk(names: Sequence[str], run: Run) -> None:
    """Put each question to the models in turn, and show their answers together."""
    out = Console(highlight=False)
    with ExitStack() as stack:
        speakers = {name: Speaker(run, name, stack) for name in names}
        for question in questions():
            if question == "/new":
                for speaker in speakers.values():
                    speaker.turns.clear()
                continue
            texts = {name: speaker.reply(question) for name, speaker in speakers.items()}
            if out.is_terminal and out.width >= NARROW * len(texts):
                table = Table(*texts, expand=True)
                for column in table.columns:
                    column.ratio, column.overflow = 1, "fold"
                table.add_row(*map(Text, texts.values()))
                out.print(table)
            else:
                print(*(block(*pair) for pair in texts.items()), "", sep="\n")
