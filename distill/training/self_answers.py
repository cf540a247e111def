"""Rounds in which the student learns from its own right answers too (RFT, arXiv 2308.01825).

The trained student answers every training prompt several times. What the filters and the checker of
its task pass joins the teacher's rows, and training starts again from the base on all of them. No
teacher is asked. A round is a run inside the run, in refined/self-N. One that was killed goes on
where it was, to the same bits.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.generation.filters import Dropped, active_filters, contaminated_ids, same_as, sift
from distill.models.devices import release_memory
from distill.reasoning import split_thought
from distill.records import Pair, Prompt
from distill.responders.responder import Sampling
from distill.storage.files import read_json, read_records, write_json
from distill.storage.progress import say
from distill.storage.run_folder import Run
from distill.tasks.task import checkable, tasks_of_run
from distill.training import train
from distill.training.inner_run import SUMMARY, InnerRun, student_answers
from distill.training.soft_labels import capture

KEY = "train.self_answers"
# Whatever the teacher's answers are held to: these have nobody else to vouch for them
STRICT = {"truncated": True, "empty": True, "wrong_format": True, "failed_checker": "drop"}


def teach(run: Run, prompts: Sequence[Prompt]) -> tuple[Path, list[dict[str, Any]]]:
    """Do the rounds that are left, if any; return the last adapter, and what came of each round.

    Raises DistillError (exit 2) where a task has no checker, or no reference for it.
    """
    adapter, summaries = run.path("adapter"), list[dict[str, Any]]()
    settings = run.config.train.self_answers
    if settings is None:
        return adapter, summaries
    prompts = checkable(prompts, tasks_of_run(run.folder), KEY)
    rows = read_records(run.path("dataset/train.jsonl"), Pair)
    for number in range(1, settings.rounds + 1):
        current = InnerRun(run, f"refined/self-{number}")
        if not current.path("funnel.json").exists():
            add_answers(current, rows, prompts, adapter)
        told = read_json(current.path("funnel.json"))
        right, answers, solved = (told[name] for name in ("right", "answers", "solved"))
        line = f"{right} of {answers} answers right, {solved} of {told['prompts']} prompts solved"
        line += ": it has little left to learn from itself" if right == answers else ""
        say(f"{KEY}: round {number}: {line}")
        summaries.append(told)
        if not told["added"]:  # the same student would say the same again
            why = "no right answer is new" if right else "there is no right answer"
            say(f"{KEY}: {why}, so the student stays as it is")
            break
        if not current.path("training.json").exists():
            if current.config.captures:
                capture.main(current)
                release_memory()
            train.main(current)
        training = read_json(current.path("training.json"))
        told |= {name: training[name] for name in SUMMARY}
        rows = read_records(current.path("dataset/train.jsonl"), Pair)
        adapter = current.path("adapter")
    return adapter, summaries


def add_answers(
    current: InnerRun, rows: Sequence[Pair], prompts: Sequence[Prompt], adapter: Path
) -> None:
    """Let the student answer; write `rows` and what is right and new as dataset, and funnel.json.

    Of a prompt the first `keep` are taken, those of earlier rounds included.
    """
    config, settings = current.config, current.config.train.self_answers
    assert settings
    most = settings.max_new_tokens or config.teacher.max_new_tokens
    shape = settings.model_dump(include={"temperature", "top_p"})
    how = (Sampling(**shape, max_new_tokens=most), f"student, {current.folder.name}", settings.n)
    by_id, tries = {prompt.id: prompt for prompt in prompts}, list[Pair]()
    for response in student_answers(current, prompts, adapter, *how):
        answer = {"text": split_thought(response.text, response.reasoning)[1]}  # checkers read it
        prompt, response = by_id[response.prompt_id], response.model_copy(update=answer)
        tries.append(Pair(prompt=prompt, response=response, origin="student"))
    strict, dropped = config.filters.model_copy(update=STRICT), list[Dropped]()
    own = ((pair.response.id, pair.prompt, pair.response.text) for pair in tries)
    matches = contaminated_ids(current.outer, own)
    filters = active_filters(strict, tasks_of_run(current.outer.folder), matches)
    distinct = sift(tries, "train", filters, dropped, config.reasoning == "keep")
    reasons = Counter(row.reason for row in dropped)
    seen = {answer_of(row) for row in rows}
    counts = Counter(row.prompt.id for row in rows if row.origin == "student")
    added = list[Pair]()
    for pair in distinct:
        if answer_of(pair) not in seen and counts[pair.prompt.id] < settings.keep:
            added.append(pair)
            counts[pair.prompt.id] += 1
    current.write_dataset([*rows, *added])
    funnel = {"prompts": len(prompts), "answers": len(tries)}
    funnel |= {"right": len(distinct) + reasons["same answer again"], "distinct": len(distinct)}
    funnel |= {"solved": len({pair.prompt.id for pair in distinct}), "added": len(added)}
    funnel |= {"teacher_rows": sum(row.origin == "teacher" for row in rows)}
    funnel |= {"student_rows": counts.total(), "dropped": dict(reasons.most_common())}
    write_json(current.path("funnel.json"), funnel)


def answer_of(pair: Pair) -> tuple[str, str]:
    """Return the prompt of a row, and what all answers that count as the same share."""
    response = pair.response
    return pair.prompt.id, same_as(split_thought(response.text, response.reasoning)[1])
