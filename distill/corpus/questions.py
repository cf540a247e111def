"""Questions that the teacher writes about a passage: how it is asked for them, and how its replies become prompts.

Pure functions; the generate stage does the asking. A question must stand by itself, since the student may not see the
passage; those that point at "the text" are left out, and so are questions that nearly repeat another.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import islice

from distill.corpus.control_tokens import break_up
from distill.corpus.dedupe import overlap
from distill.corpus.prompts import template_values
from distill.errors import DistillError, Exit
from distill.records import Document, Message, Prompt
from distill.tasks.checkers import normalise_answer
from distill.tasks.task import fill, load_task

TASK = "question"
KINDS = {
    "factual": "asks for one fact that the passage states",
    "explain": "asks why or how something in the passage is so",
    "apply": "describes a small concrete situation and asks what the passage means for it",
    "compare": "asks how two things in the passage differ or agree",
    "consequence": "asks what follows, or what would happen if something in the passage were different",
}
ASK = """<document>
{passage}
</document>

Write {count} about the passage above, one on each line. Each {does}. Each must be understood by somebody who cannot \
see the passage: name the things you ask about, and never say "the passage" or "the text". Write nothing but the \
questions."""
MARK = re.compile(
    r"^\s*(?:[-*\u2022]|\(?\d{1,3}[.):]|Q(?:uestion)?\s*(?:\d+\s*)?[.:)])\s*", re.IGNORECASE
)
POINTS_AT_PASSAGE = re.compile(
    r"\b(?:the|this|that)\s+(?:given\s+|above\s+)?(?:passage|text|document|article|excerpt|paragraph|author)\b",
    re.IGNORECASE,
)
QUOTES = ' \t\r*"\u201c\u201d'
SHORTEST, LONGEST = 12, 400  # characters of a question
MOST = 1000  # questions about one document; each is compared with each
NEARLY_SAME = 0.7  # Jaccard similarity of the words of two questions


def shares(kinds: Sequence[str], per_document: int) -> list[tuple[str, int]]:
    """Spread the questions of a document over the kinds, the first ones with the remainder."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        what = f"unknown kind {unknown[0]}" if unknown else "names no kind"
        raise DistillError(
            Exit.CONFIG, "prompts.questions.kinds", what, f"use some of: {', '.join(KINDS)}"
        )
    share, extra = divmod(per_document, len(kinds))
    counts = [(kind, share + (number < extra)) for number, kind in enumerate(kinds)]
    return [(kind, count) for kind, count in counts if count]


def question_prompts(document: Document, kinds: Sequence[str], per_document: int) -> list[Prompt]:
    """Build the prompts that ask the teacher for questions about a document: one a kind, `question:KIND`."""
    prompts = []
    for kind, count in shares(kinds, per_document):
        number = "one question" if count == 1 else f"{count} different questions"
        text = ASK.format(passage=break_up(document.text), count=number, does=KINDS[kind])
        message = Message(role="user", content=text)
        prompts.append(Prompt.make((message,), document.id, f"{TASK}:{kind}"))
    return prompts


def read_questions(reply: str) -> list[str]:
    """Return the questions of a teacher's reply that stand by themselves, marks and quotes taken off."""
    lines = [MARK.sub("", line.strip(QUOTES)).strip(QUOTES) for line in reply.split("\n")]
    return [
        line
        for line in lines
        if SHORTEST <= len(line) <= LONGEST
        and line.endswith("?")
        and not POINTS_AT_PASSAGE.search(line)
    ]


def distinct(questions: Iterable[str]) -> list[str]:
    """Return the questions (the first 1,000) without those that repeat, or nearly repeat, an earlier one."""
    results: list[tuple[str, set[str]]] = []
    for question in islice(questions, MOST):
        words = set(normalise_answer(question).split())
        if words and all(overlap(words, other) < NEARLY_SAME for _, other in results):
            results.append((question, words))
    return [question for question, _ in results]


def to_prompts(
    document: Document,
    questions: Iterable[str],
    answer_with_passage: bool = True,
    student_sees_passage: bool = False,
) -> list[Prompt]:
    """Build one prompt a question; the passage stands before it in the views that see it."""
    task = load_task(TASK)
    with_passage, prompts = (task.teacher_view() or task.student).user, []
    for question in questions:
        values = template_values(document) | {"question": break_up(question)}
        student, teacher = (
            (Message(role="user", content=fill(template, task.name, values)),)
            for template in (
                with_passage if student_sees_passage else task.student.user,
                with_passage if answer_with_passage else task.student.user,
            )
        )
        differs = answer_with_passage != student_sees_passage
        prompts.append(Prompt.make(student, document.id, task.name, teacher if differs else None))
    return prompts
