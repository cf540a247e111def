"""The select stage: the teacher is asked where the student fails (`prompts.select`).

A quarter of the prompts that the teacher is to be asked is drawn at random. A student that is
trained from the base on its answers tries others, in a random order; those that it fails make the
first half, and those that a student of this half fails make all. Where too few fail, or no checker
can tell, the answers decide of which the student was least sure. A tranche is a run inside the run,
in tranches/N, and holds the one before: what was asked once is in the store.
"""

import math
import shutil
from collections.abc import Sequence

from distill.config.teachers import StatedCost
from distill.corpus.prompts import TRANCHES, asked, drawn
from distill.generation import filters, generate
from distill.models.devices import release_memory
from distill.reasoning import split_reasoning
from distill.records import Document, Prompt, Response
from distill.responders.responder import Sampling
from distill.storage.files import read_records, write_records
from distill.storage.progress import say
from distill.storage.run_folder import Run
from distill.tasks.checkers import check
from distill.tasks.scoring import answer_limit
from distill.tasks.task import TASKS_FILE, FindTask, checker_of, tasks_of_run
from distill.training import train
from distill.training.inner_run import InnerRun, student_answers
from distill.training.soft_labels import capture

FEWEST = 64  # prompts that the student tries at once


def main(run: Run) -> None:
    """Make what is left of the tranches, and selected.jsonl: the prompts that are asked.

    Raises DistillError as asking, filtering, capturing and training do.
    """
    budget, prompts = run.config.prompts.train or 0, read_records(run.path("prompts.jsonl"), Prompt)
    generate.require_turns(run, prompts)
    if len(drawn(run)) <= budget:
        say(f"select: all of {len(drawn(run))} prompts are asked, as prompts.train is no less")
        return write_records(run.path(TRANCHES[-1]), prompts)
    for number, path in enumerate(map(run.path, TRANCHES[1:]), 1):
        if not path.exists():
            tranche, size = learn(run, number), budget * number // 4
            ordered = drawn(run)
            more = hardest(tranche, ordered[size:], budget * number // 2 - size)
            others = {prompt.id for prompt in ordered[size:]} - {prompt.id for prompt in more}
            write_records(path, [prompt for prompt in prompts if prompt.id not in others])


def learn(run: Run, number: int) -> InnerRun:
    """Return tranche `number`, a quarter or half of the prompts, with the student of its answers.

    The other splits are asked with it, so that training validates, and no held-out item leaks.
    """
    config, teacher = run.config, run.config.teacher
    if isinstance(teacher, StatedCost):  # of all answers: the stage `generate` enters it
        teacher = teacher.model_copy(update={"dollars": None})
    prompts = config.prompts.model_copy(update={"select": "all"})
    tranche = InnerRun(run, f"tranches/{number}", prompts=prompts, teacher=teacher)
    path = tranche.path("prompts.jsonl")
    if not path.exists():
        write_records(path, asked(run, 0.25))
    sources = {prompt.document_id for prompt in read_records(path, Prompt)}
    documents = read_records(run.path("documents.jsonl"), Document)
    mine = (document for document in documents if document.id in sources)
    write_records(tranche.path("documents.jsonl"), mine)
    shutil.copyfile(run.path(TASKS_FILE), tranche.path(TASKS_FILE))
    for work, result in (
        (generate.main, "responses.jsonl"),
        (filters.main, "funnel.json"),
        *([(capture.main, "signals.json")] if config.captures else []),
        (train.main, "training.json"),
    ):
        if not tranche.path(result).exists():
            work(tranche)
            release_memory()
    return tranche


def hardest(tranche: InnerRun, prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Return `count` prompts: the first that the tranche's student fails, then the least sure.

    It tries no more than it takes to find so many that it fails: ever more at once.
    """
    config, find = tranche.config, tasks_of_run(tranche.folder)
    adapter, sampling = tranche.path("adapter"), Sampling(max_new_tokens=answer_limit(config))
    responses, failed, others = list[Response](), list[Prompt](), list[tuple[float, Prompt]]()
    while len(responses) < len(prompts) and len(failed) < count:
        start = len(responses)
        part = prompts[start : start + max(FEWEST, 2 * count, start)]
        title = f"student, {tranche.folder.name} of 2"
        responses += student_answers(tranche, part, adapter, sampling, title, logprobs=True)
        for prompt, response in zip(part, responses[start:], strict=True):
            if solves(find, prompt, response) is False:
                failed.append(prompt)
            else:  # one that leaves no room for an answer comes last
                sure = response.mean_logprob
                others.append((math.inf if sure is None else sure, prompt))
    write_records(tranche.path("tried.jsonl"), responses)
    chosen = [*failed, *(prompt for _, prompt in sorted(others, key=lambda pair: pair[0]))][:count]
    fails = min(len(failed), count)
    what = f"{fails} that it fails and {len(chosen) - fails} of which it is least sure"
    say(f"select: the student tried {len(responses)} prompts; chosen are {what}")
    return chosen


def solves(find: FindTask, prompt: Prompt, response: Response) -> bool | None:
    """Tell whether an answer passes its task's check in full; None where nothing can tell."""
    checker = checker_of(find(prompt.task), prompt)
    if not checker or response.stop == "error":
        return None
    if response.stop == "length":
        return False
    return check(checker, prompt, split_reasoning(response.text)[0]).passed
