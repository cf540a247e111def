"""Several tries when served: the student answers a request n times, and one answer is chosen.

It is chosen without the reference, as it can be in service: by a vote where the check reads an
answer out of a text, by the check itself where that needs no reference; else there is no choice.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from distill.config.tree import Tries
from distill.evaluation import results
from distill.evaluation.measurements import TRIES, TriesResult, TriesRow
from distill.evaluation.scorers import Checker, Measured, compares_with_answer, score_answer
from distill.evaluation.statistics import Certainty
from distill.records import Prompt, Response, Score
from distill.tasks.checkers import KINDS, check, needs_reference
from distill.tasks.sandbox.programs import read_tests
from distill.tasks.task import Task

WAYS = TEST, VOTE = "first that passes", "vote"
ANY = "any"  # the best of the tries, beside the chosen one


def way_to_choose(task: Measured | Task | None, prompt: Prompt) -> str:
    """Return the one of WAYS in which an answer is chosen, or the reason why none can be."""
    checker = task.checker if task else None
    kind = checker["kind"] if checker else ""
    if not checker or (needs_reference(kind) and not (prompt.reference or "").strip()):
        return "nothing says which answer is right"
    if not compares_with_answer(checker):
        return TEST
    if kind == "python_tests":
        question = "\n".join(message.content for message in prompt.messages)
        before, _, code = read_tests(prompt.reference or "").code.rpartition("\n\ncheck(")
        visible = all(line.strip() in question for line in (before or code).splitlines())
        return TEST if visible else "the tests do not stand in the prompt"
    return VOTE if kind in KINDS.keys() - {"includes"} else f"{kind} reads no answer to vote on"


def vote(checker: Checker, prompt: Prompt, answers: Sequence[Response]) -> int:
    """Return the first of the answers that most agree with; of a tie the first seen.

    Two agree where one passes the check with the other as the reference. What was cut off, or says
    nothing that the check can read, has no vote; without any vote the first answer is taken.
    """
    parties = list[tuple[Prompt, list[int]]]()
    for number, response in enumerate(answers):
        leader = prompt.model_copy(update={"reference": response.text})
        result = check(checker, leader, response.text)
        if response.stop != "end" or not result.answer:
            continue
        if not result.passed:  # as a reference the check reads what it reads out of the text
            leader = prompt.model_copy(update={"reference": result.answer})
        alike = (votes for first, votes in parties if check(checker, first, response.text).passed)
        if votes := next(alike, None):
            votes.append(number)
        else:
            parties.append((leader, [number]))
    return max((votes for _, votes in parties), key=len, default=[0])[0]


def choose(
    rows: Mapping[str, Measured], responses: Sequence[Response]
) -> tuple[dict[str, Measured], dict[str, Response]]:
    """Choose an answer to each item that was tried, and score it, and the best, as all others.

    Returns the rows by task, and the chosen answers by item, with the usage of all tries.
    """
    tries, by_task, choices = defaultdict[str, list[Response]](list), {}, dict[str, Response]()
    for response in responses:
        tries[response.prompt_id].append(response)
    for task, row in rows.items():
        items = [item for item in row.items if item.prompt.id in tries]
        scores: dict[str, dict[str, Score]] = {TRIES: {}, ANY: {}}
        for item in items:
            answers = tries[item.prompt.id]
            of_each = [score_answer(item, answer, TRIES, row.checker) for answer in answers]
            values = [-1.0 if score.value is None else score.value for score in of_each]
            place = best = values.index(max(values))
            if row.checker and way_to_choose(row, item.prompt) == VOTE:
                place = vote(row.checker, item.prompt, answers)
            scores[TRIES][item.id], scores[ANY][item.id] = of_each[place], of_each[best]
            names, usages = ("input_tokens", "output_tokens", "seconds"), [a.usage for a in answers]
            usage = {name: sum(getattr(usage, name) for usage in usages) for name in names}
            usage = usages[0].model_copy(update=usage)
            choices[item.id] = answers[place].model_copy(update={"usage": usage})
        scores["student"] = dict(row.scores["student"])
        by_task[task] = replace(row, items=items or row.items, scores=scores)
    return by_task, choices


def tries_result(
    settings: Tries, rows: Mapping[str, Measured], certainty: Certainty
) -> TriesResult:
    """Compare the choices with the student's greedy answers, task by task and over all checks."""

    def compared(row: Measured, way: str = "") -> TriesRow:
        facts: dict[str, object] = {"metric": row.metric, "n": len(row.items), "way": way}
        for name, model in {"student": "student", "choice": TRIES, "any_right": ANY}.items():
            facts[name] = results.mean_of(row, model, certainty)
        change = results.compare(row, TRIES, "student", certainty)
        return TriesRow.model_validate({**facts, "choice_minus_student": change})

    result = TriesResult(n=settings.n, temperature=settings.temperature, tasks={})
    for task, row in rows.items():
        way = way_to_choose(row, row.items[0].prompt)
        none = TriesRow(metric=row.metric, n=len(row.items), reason=way)
        result.tasks[task] = compared(row, way) if row.scores[TRIES] else none
    pooled = results.pool([row for row in rows.values() if row.scores[TRIES]])
    return result.model_copy(update={"overall": compared(pooled)} if pooled else {})
