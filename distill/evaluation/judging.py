"""Puts a run's answers to the judge of its config: its probes, then student against teacher and against base.

A judge is asked through the shared store, so its verdicts too are paid once. They stand in `answers/judge/`, also where
it did not pass its probes: then the win rates are null, with that reason.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from distill.config import Config, Teacher
from distill.errors import DistillError, Exit
from distill.evaluation.acceptance import Acceptance
from distill.evaluation.judge import (
    Duel,
    Judge,
    Outcome,
    accepted,
    duels_of,
    examined,
    judge,
    load_probes,
    one_family,
    outcomes_of,
    probe_duels,
    row_of_duels,
    scores_of,
    withheld,
)
from distill.evaluation.measurements import RIVALS, JudgeResult, ProbeResult
from distill.evaluation.results import AnswersByModel
from distill.evaluation.statistics import Certainty
from distill.records import Item, Message, Response, Score, digest
from distill.responders.ask import Ask
from distill.responders.kinds import make_responder
from distill.responders.responder import Request, Sampling
from distill.storage.files import read_records, write_records
from distill.storage.progress import say
from distill.storage.run_folder import Run

TEST = "the judge prefers it, or ties it with an answer of the teacher's that will do"


class JudgeEvidence(NamedTuple):
    """The judge's part of the evaluation, and its verdicts against the teacher, where it may be used."""

    result: JudgeResult
    duels: Sequence[Duel]
    outcomes: Sequence[Outcome]

    def acceptance(self, will_do: Callable[[str], bool]) -> Acceptance | None:
        """Return the judge's word on what the student may answer; `will_do` is about the teacher's own answers."""
        if not self.result.probe.passed:
            return None
        return Acceptance(TEST, accepted(self.duels, self.outcomes, will_do), when_served=False)


def ask_judge(config: Config, run: Run, items: Sequence[Item], answers: AnswersByModel) -> None:
    """Put the probes and all duels to the judge of the config, if it has one, and write its verdicts."""
    settings = config.evaluation.judge
    if settings is None:
        return
    responder = make_responder(settings, config)
    store, again = config.store_folder() / "responses", "evaluate" in run.remade
    with Ask(responder, store, run, again) as ask:
        probes, replies = probe_duels(load_probes()), through(ask, settings)
        found = {"probe": (probes, judge(probes, replies, ask_copies=True))}
        for rival in RIVALS:
            duels = duels_of(items, answers, "student", rival)
            found[rival] = (duels, judge(duels, replies))
    for name, (duels, outcomes) in found.items():
        rows = scores_of(f"student against {name}", duels, outcomes)
        write_records(run.path(f"answers/judge/{name}.jsonl"), rows)


def read_judge(
    config: Config, run: Run, items: Sequence[Item], answers: AnswersByModel, certainty: Certainty
) -> JudgeEvidence | None:
    """Return what the judge's verdicts on these items say; None without a judge."""
    settings = config.evaluation.judge
    if settings is None:
        return None
    found = {
        name: outcomes_of(read_records(run.path(f"answers/judge/{name}.jsonl"), Score))
        for name in ("probe", *RIVALS)
    }
    probe = examined(load_probes(), list(found["probe"].values()))
    duels = {rival: duels_of(items, answers, "student", rival) for rival in RIVALS}
    outcomes = {rival: [found[rival][d.item] for d in duels[rival]] for rival in RIVALS}
    if not probe.passed:
        say(f"the judge is not used: {probe.reason}")
    rows = {
        rival: row_of_duels(duels[rival], outcomes[rival], len(items), certainty)
        if probe.passed
        else withheld(probe.reason or "")
        for rival in RIVALS
    }
    warnings = tuple(_warnings(settings, config.teacher))
    name = settings.model or settings.kind
    result = JudgeResult(model=name, probe=probe, warnings=warnings, **rows)
    return JudgeEvidence(result, duels["teacher"], outcomes["teacher"])


def through(ask: Ask, settings: Teacher) -> Judge:
    """Return what asks a responder with these settings in the role of a judge."""
    sampling = Sampling.of(settings)

    def replies(conversations: Sequence[tuple[Message, ...]]) -> list[Response]:
        origin = ask.responder.origin
        requests = [
            Request.make(origin, digest([m.content for m in turns]), turns, sampling)
            for turns in conversations
        ]
        return ask.responses(requests, "judge")

    return replies


def probed(config: Config) -> ProbeResult:
    """Put the probes to the judge of a config, and return the result; raises DistillError (exit 2) without a judge."""
    settings = config.evaluation.judge
    if settings is None:
        fix = "set evaluation.judge, for instance {kind: local, model: MODEL, max_new_tokens: 96}"
        raise DistillError(Exit.CONFIG, "evaluation.judge", "is not set", fix)
    probes = load_probes()
    responder = make_responder(settings, config)
    with Ask(responder, config.store_folder() / "responses") as ask:
        outcomes = judge(probe_duels(probes), through(ask, settings), ask_copies=True)
    return examined(probes, outcomes)


def probe_lines(result: ProbeResult) -> list[str]:
    """Say what a judge let win of its probes, and whether it may be used."""
    rows = [
        f"{kind:10}{row.n:4}  wins {row.wins:6.1%}  losses {row.losses:6.1%}  no verdict {row.unparsed:6.1%}"
        for kind, row in result.kinds().items()
    ]
    verdict = "may be used" if result.passed else f"is not used: {result.reason}"
    return [
        *rows,
        f"chose by place in {result.flip_rate:.1%} of the probes",
        f"the judge {verdict}",
    ]


def _warnings(settings: Teacher, teacher: Teacher) -> list[str]:
    """Say what makes the judge's word weaker."""
    if not one_family(settings.model, teacher.model):
        return []
    warning = f"judge {settings.model} and teacher {teacher.model} seem to be of one family: it may favour its own"
    say(f"warning: {warning}")
    return [warning]
