"""Whether a GGUF file is as good as the student that was evaluated, measured in llama.cpp itself.

Of each file: the token ids of the held-out prompts by the file's own template; its weights read
back, and the runner's own log-probabilities, against the released weights on answers that were
scored; and the held-out items answered by the file, scored as the run scores, paired with the
student's. Answers go through the store, so a measurement that was stopped continues.
"""

import gc
import io
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from distill.errors import DistillError, Exit
from distill.evaluation import statistics
from distill.evaluation.answering import requests_to
from distill.evaluation.measurements import Difference
from distill.evaluation.results import pool
from distill.evaluation.scorers import SHARE, AnswersByModel, measure_items, measure_tasks
from distill.evaluation.suites import answer_limit, by_item, held_out_items
from distill.formatting import estimate, share, signed
from distill.models.chat_template import encode_prompt, encode_text
from distill.models.loading import context_length, load_model, load_tokenizer, read_by_library
from distill.records import Item, Record, Response, digest
from distill.responders import engines
from distill.responders.ask import Ask
from distill.responders.engines import BY_SCRIPT, UNCUT, EngineServer
from distill.responders.responder import Raw, Request
from distill.storage.files import read_json, read_records, sha256_file
from distill.storage.progress import say
from distill.storage.run_folder import Run
from distill.tasks.task import tasks_of_run

ANSWERS = 32  # on which weights are compared
TOKENS = 16  # of each, so that the logits of all fit in memory
TOP = 10  # of the runner's log-probabilities
PARALLEL = 4  # requests that the runner answers at once
NO_RUNNER = f"llama.cpp is not installed ({BY_SCRIPT} llama.cpp)"
ScoredText = tuple[list[int], int]  # ids of a rendered prompt with its answer; where that begins
CLAIMS = {"inferior": "worse", "not inferior": "as good, within the margin"}


class FileParity(Record):
    """What was measured of one file; what is None was not, and `reason` says why."""

    file: str
    sha256: str
    basis: str = ""  # hash of all that the measurement depends on
    runner: str | None = None
    prompts: int = 0
    ids_equal: int | None = None  # of `prompts`
    nmse: float | None = None  # of the logits, by transformers' reader of GGUF
    largest_difference: float | None = None  # of the runner's top log-probabilities, in nats
    metric: str = ""
    same_answers: int | None = None  # of `prompts`, to the letter
    student: float | None = None  # mean score, a share of the largest
    score: float | None = None
    difference: Difference = Difference()  # file - student
    verdict: statistics.Noninferiority | None = None
    reason: str | None = None

    @property
    def conclusion(self) -> str:
        """Say what was found, for the card and the terminal."""
        if self.reason:
            return f"parity: not measured: {self.reason}"
        return CLAIMS.get(self.verdict or "", f"cannot tell (n = {self.difference.n or 0})")

    def points(self) -> str:
        """Return the difference in points, with its interval."""
        ends = (self.difference.value, *self.difference.ends)
        return estimate(*ends, lambda x: signed(100 * x, 1))


def findings(rows: Iterable[FileParity], margin: float) -> list[DistillError]:
    """Return what speaks against a file: that it is worse, or does not work."""
    errors = list[DistillError]()
    for row in rows:
        if row.verdict == "inferior":
            what = f"is worse than the evaluated student: {row.points()} points of {row.metric}"
            what += f", n = {row.difference.n}, beyond the margin of {share(margin, 1)}"
        elif row.reason and row.runner:
            what = f"does not work in {row.runner}: {row.reason}"
        else:
            continue
        fix = "leave this format out of publish.formats"
        errors.append(DistillError(Exit.PUBLISH, row.file, what, fix))
    return errors


class FileResponder:
    """Answers as a GGUF file does in a running server, with the file's own template."""

    def __init__(self, server: EngineServer, model: str, origin: str) -> None:
        self.server, self.model, self.origin = server, model, origin

    def ask(self, requests: Sequence[Request]) -> Iterator[Raw]:
        """Yield the answers as they come."""
        return self.server.responder(self.model, PARALLEL, UNCUT).ask(requests)


def measure(
    run: Run, model: Path, files: Sequence[Path], old: Path, left_out: Sequence[str] = ()
) -> list[FileParity]:
    """Measure files that were made of the folder `model`, but for what `old` has of the same.

    `old` is the last release's parity.json. Without llama.cpp nothing is measured. The items
    `left_out`, which stand in the training data, are not scored.
    """
    command = engines.find_engine("llama.cpp", run.config.engines)
    if command is None:
        return [FileParity(file=f.name, sha256=sha256_file(f), reason=NO_RUNNER) for f in files]
    last, rows, check = list[FileParity](), list[FileParity](), None
    with suppress(DistillError, TypeError, ValidationError):  # missing or damaged: all is measured
        last = [FileParity.model_validate(row) for row in read_json(old)]
    runner = f"llama.cpp {engines.engine_version(tuple(command))}"
    basis = {
        "runner": runner,
        "answers": sha256_file(run.path("answers/student.jsonl")),
        "evaluation": run.config.evaluation.model_dump(mode="json"),
        "left out": left_out,
    }
    for file in files:
        facts: dict[str, Any] = {"file": file.name, "sha256": sha256_file(file), "runner": runner}
        facts["basis"] = digest(facts | basis)
        row = next((row for row in last if row.basis == facts["basis"] and not row.reason), None)
        if row is None:
            say(f"{file.name}: compared with the student in {runner}")
            check = check or ParityCheck(run, model, command, left_out)
            try:
                facts |= check.file(file, digest({"gguf": facts["sha256"], "runner": runner}))
            except DistillError as error:  # the engine's, and its answers'
                facts["reason"] = f"{error.where} {error.what}"
            row = FileParity.model_validate(facts)
        rows.append(row)
    return rows


class ParityCheck:
    """What files are compared with: the student's weights and its scored answers."""

    def __init__(
        self, run: Run, model: Path, command: Sequence[str], left_out: Collection[str]
    ) -> None:
        self.run, self.command, self.left_out = run, command, left_out
        pairs, self.items = held_out_items(run.folder)
        answers = read_records(run.path("answers/student.jsonl"), Response)
        self.student = by_item(self.items, answers)
        self.teacher = by_item(self.items, [pair.response for pair in pairs])
        tokenizer: Any = load_tokenizer(f"{model.resolve()}")
        self.ids, texts = dict[str, list[int]](), list[ScoredText]()
        for item in self.items:
            ids = [*encode_prompt(tokenizer, item.prompt.messages, run.config.template_date)]
            answer = encode_text(tokenizer, self.student[item.id].text)[:TOKENS]
            self.ids[item.id] = ids
            if answer:
                texts.append(([*ids, *answer], len(ids)))
        self.texts = texts[:: -(-len(texts) // ANSWERS) or 1]
        network: Any = load_model(f"{model.resolve()}", "float32")
        self.most = context_length(network.config)
        self.logits = answer_logits(network, self.texts)
        del network
        gc.collect()

    def file(self, file: Path, origin: str) -> dict[str, Any]:
        """Return what is measured of a file; raises DistillError where the engine fails."""
        facts = self.read_back(file)
        limit = answer_limit(self.run.config)
        longest = max(map(len, self.ids.values())) + limit
        context = engines.context_for(longest, self.most)
        server = EngineServer("llama.cpp", self.command, file, file.stem, PARALLEL, context)
        try:
            facts["prompts"] = len(self.items)
            facts["ids_equal"] = sum(self.same_ids(server, item) for item in self.items)
            facts["largest_difference"] = max(self.next_tokens(server), default=None)
            responder = FileResponder(server, file.stem, origin)
            prompts = [item.prompt for item in self.items]
            requests = requests_to(responder, prompts, [limit] * len(prompts))
            with Ask(responder, self.run.config.store_folder() / "responses") as ask:
                responses = ask.responses(requests, f"{file.name} answers")
        finally:
            server.close()
        return facts | self.scored(by_item(self.items, responses))

    def read_back(self, file: Path) -> dict[str, Any]:
        """Return the error of the logits of a file's weights, against the student's.

        It is that of llama.cpp's tests: the sum of squared differences over that of squares.
        """
        from transformers import AutoModelForCausalLM

        try:  # its bars cannot be turned off
            with read_by_library(file.name), redirect_stderr(io.StringIO()):
                network: Any = AutoModelForCausalLM.from_pretrained(
                    file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True
                )
                logits = answer_logits(network, self.texts)
        except DistillError as error:
            say(f"{file.name}: NMSE: not measured: transformers: {error.what}")
            return {}
        both = list(zip(logits, self.logits, strict=True))
        error = sum(float((theirs - ours).square().sum()) for theirs, ours in both)
        return {"nmse": error / sum(float(ours.square().sum()) for _, ours in both)}

    def same_ids(self, server: EngineServer, item: Item) -> bool:
        """Tell whether the file's template and tokenizer make our ids of a prompt."""
        messages = [message.model_dump() for message in item.prompt.messages]
        rendered = post(server, "/apply-template", messages=messages).get("prompt")
        body = {"content": rendered, "add_special": True, "parse_special": True}
        ids = post(server, "/tokenize", **body).get("tokens") if rendered else None
        return ids == self.ids[item.id]

    def next_tokens(self, server: EngineServer) -> Iterator[float]:
        """Yield how far the runner's top log-probabilities are from ours, in nats.

        Of each text at one position, halfway through what was compared of its answer.
        """
        for (ids, answer), logits_TV in zip(self.texts, self.logits, strict=True):
            half = len(logits_TV) // 2
            ours_V: Tensor = logits_TV[half].log_softmax(-1)
            body = {"prompt": ids[: answer + half], "max_tokens": 1, "logprobs": TOP}
            reply = post(server, "/v1/completions", temperature=0, **body)
            for choice in reply.get("choices", ()):
                for place in ((choice.get("logprobs") or {}).get("content") or ())[:1]:
                    for top in place["top_logprobs"]:
                        yield abs(top["logprob"] - float(ours_V[top["id"]]))

    def scored(self, answers: Mapping[str, Response]) -> dict[str, Any]:
        """Return the scores of a file's answers beside the student's, and their difference.

        Over all checks; of a run without checks, the likeness to the teacher's answers.
        """
        config, settings = self.run.config, self.run.config.evaluation
        both: AnswersByModel = {"teacher": self.teacher, "student": self.student, "file": answers}
        items = [item for item in self.items if item.id not in self.left_out]
        rows = measure_tasks(items, both, tasks_of_run(self.run.folder))
        row = pool(list(rows.values())) or measure_items(items, both)
        file_N, student_N = (row.array(name) / row.bounds.high for name in ("file", "student"))
        both_N = statistics.paired(file_N, student_N, "the file's answers")
        a, b, clusters = file_N[both_N], student_N[both_N], row.clusters[both_N]
        certainty = statistics.Certainty(
            settings.confidence, settings.bootstrap_samples, config.seed
        )
        change = statistics.estimate_difference(a, b, clusters, certainty, SHARE)
        return {
            "metric": row.metric,
            "same_answers": sum(answers[i].text == a.text for i, a in self.student.items()),
            "student": statistics.mean_or_none(b),
            "score": statistics.mean_or_none(a),
            "difference": Difference.of(change),
            "verdict": statistics.non_inferiority(change, settings.margin),
        }


@torch.inference_mode()
def answer_logits(model: Any, texts: Sequence[ScoredText]) -> list[Tensor]:
    """Return the float32 logits (T, V) that predict each answer's tokens."""
    model.eval()
    rows = []
    for ids, answer in texts:
        logits_TV = model(input_ids=torch.tensor([ids], device=model.device)).logits[0]
        rows.append(logits_TV[answer - 1 : -1].float().cpu())
    return rows


def post(server: EngineServer, path: str, **body: object) -> dict[str, Any]:
    """Return what a running engine replies; {} where it refuses."""
    reply = server.post(path, **body)
    return reply.json() if reply.status_code == 200 else {}
