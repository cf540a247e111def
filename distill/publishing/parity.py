"""Whether a GGUF file is as good as the student that was evaluated, measured in llama.cpp itself.

Of each file: the token ids of the held-out prompts by the file's own template; its weights read
back, and the runner's own log-probabilities, against the released weights on answers that were
scored; and the held-out items answered by the file, scored as the run scores, paired with the
student's. Answers go through the store, so a measurement that was stopped continues.
"""

import gc
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.errors import DistillError, Exit, one_line
from distill.evaluation.measurements import Difference
from distill.evaluation.results import pool
from distill.evaluation.scorers import AnswersByModel, measure_items, measure_tasks
from distill.evaluation.statistics import (
    Bounds,
    Certainty,
    Noninferiority,
    estimate_difference,
    non_inferiority,
    paired,
)
from distill.evaluation.suites import answer_limit, by_item, held_out_items
from distill.formatting import count, estimate, figure, share, signed
from distill.models.chat_template import encode_prompt, encode_text
from distill.models.loading import context_length, load_model, load_tokenizer
from distill.publishing.fidelity import Conversation, answer_logits
from distill.records import Item, Record, Response, digest
from distill.responders.ask import Ask
from distill.responders.engines import (
    BY_SCRIPT,
    ROOM,
    EngineServer,
    engine_version,
    find_engine,
    require_engine,
)
from distill.responders.responder import Raw, Request, Sampling
from distill.storage.files import read_records, sha256_file
from distill.storage.progress import say
from distill.storage.run_folder import Run
from distill.tasks.task import tasks_of_run

ANSWERS = 32  # on which weights are compared
TOKENS = 16  # of each, so that the logits of all fit in memory
TOP = 10  # of the runner's log-probabilities
PARALLEL = 4  # requests that the runner answers at once
GREEDY = {"top_k": 0, "min_p": 0.0}  # what llama.cpp cuts from a distribution by itself
NO_RUNNER = f"llama.cpp is not installed ({BY_SCRIPT} llama.cpp)"


class FileParity(Record):
    """What was measured of one file; what is None was not, and `reason` says why."""

    file: str
    sha256: str
    basis: str = ""  # hash of all that the measurement depends on
    runner: str | None = None
    prompts: int = 0
    ids_equal: int | None = None  # of `prompts`
    answers: int = 0
    nmse: float | None = None  # of the logits, by transformers' reader of GGUF
    nmse_reason: str | None = None
    largest_difference: float | None = None  # of the runner's top log-probabilities, in nats
    metric: str = ""
    same_answers: int | None = None  # of `prompts`, to the letter
    student: float | None = None  # mean score, a share of the largest
    score: float | None = None
    difference: Difference = Difference()  # file - student
    verdict: Noninferiority | None = None
    reason: str | None = None

    @property
    def conclusion(self) -> str:
        """Say what the difference allows to claim."""
        if self.verdict in ("inferior", "not inferior"):
            return "worse" if self.verdict == "inferior" else "as good, within the margin"
        return f"cannot tell (n = {self.difference.n or 0})"

    def line(self) -> str:
        """Return the row as one line for the terminal."""
        if self.reason:
            return f"{self.file}: parity: not measured: {self.reason}"
        return f"{self.file}: {'; '.join(f'{k} {v}' for k, v in self.cells().items())}"

    def cells(self) -> dict[str, str]:
        """Return the columns of the card's table."""
        if self.reason:
            return {"ids equal": "not measured"}
        ends = (self.difference.mean, self.difference.low, self.difference.high)
        nmse = f"not measured: {self.nmse_reason}" if self.nmse is None else f"{self.nmse:.1e}"
        return {
            "ids equal": f"{count(self.ids_equal)} of {self.prompts}",
            "NMSE": nmse,
            "largest difference": f"{figure(self.largest_difference, 3)} nats",
            "same answers": f"{count(self.same_answers)} of {self.prompts}",
            self.metric or "score": f"{share(self.score, 1)} (student {share(self.student, 1)})",
            "difference": estimate(*ends, lambda x: signed(100 * x, 1)),
            "which is": self.conclusion,
        }


class Parity(Record):
    """The content of release/parity.json."""

    model_sha256: str
    margin: float
    files: tuple[FileParity, ...] = ()

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Return the card's table."""
        rows = [(row.file, row.cells()) for row in self.files]
        head = list(dict.fromkeys(key for _, cells in rows for key in cells))
        body = [(file, *(cells.get(key, "–") for key in head)) for file, cells in rows]
        return ("file", *head), body

    def findings(self) -> list[DistillError]:
        """Return what speaks against a file: that it is worse, or does not work."""
        findings = list[DistillError]()
        for row in self.files:
            if row.verdict == "inferior":
                ends = (row.difference.mean, row.difference.low, row.difference.high)
                points = estimate(*ends, lambda x: signed(100 * x, 1))
                what = f"is worse than the evaluated student: {points} points of {row.metric}"
                what += f", n = {row.difference.n}, beyond the margin of {share(self.margin, 1)}"
            elif row.reason and row.runner:
                what = f"does not work in {row.runner}: {row.reason}"
            else:
                continue
            fix = "leave this format out of publish.formats"
            findings.append(DistillError(Exit.PUBLISH, row.file, what, fix))
        return findings


class FileResponder:
    """Answers as a GGUF file does in a running server, with the file's own template."""

    def __init__(self, server: EngineServer, file: Path, origin: str) -> None:
        self.server, self.model, self.origin = server, file.stem, origin

    def ask(self, requests: Sequence[Request]) -> Iterator[Raw]:
        """Yield the answers as they come."""
        yield from self.server.responder(self.model, PARALLEL, GREEDY).ask(requests)


def measure(
    run: Run,
    model: Path,
    files: Sequence[Path],
    old: Mapping[str, FileParity],
    left_out: Collection[str] = (),
) -> tuple[FileParity, ...]:
    """Measure files that were made of the folder `model`; `old` are the last release's rows.

    What depends on nothing that has changed is not measured again. Without llama.cpp nothing is.
    The items `left_out`, which stand in the training data, are not scored.
    """
    hashes = {file: sha256_file(file) for file in files}
    if find_engine("llama.cpp", run.config.engines) is None:
        rows = [FileParity(file=f.name, sha256=hashes[f], reason=NO_RUNNER) for f in files]
        return tuple(rows)
    command = require_engine("llama.cpp", run.config.engines)
    runner = f"llama.cpp {engine_version(tuple(command))}"
    evaluation, answers = run.config.evaluation, sha256_file(run.path("answers/student.jsonl"))
    scored = {"evaluation": evaluation.model_dump(mode="json"), "left out": sorted(left_out)}
    bases = {
        file: digest({"file": sha, "runner": runner, "answers": answers, **scored})
        for file, sha in hashes.items()
    }
    rows = {f: old[f.name] for f in files if f.name in old and old[f.name].basis == bases[f]}
    missing = [file for file in files if file not in rows]
    compare = ParityCheck(run, model, command, runner, left_out) if missing else None
    for file in missing:
        say(f"{file.name}: compared with the student in {runner}")
        facts: dict[str, Any] = {"file": file.name, "sha256": hashes[file], "runner": runner}
        try:
            assert compare
            facts |= {"basis": bases[file], **compare.file(file, hashes[file])}
        except DistillError as error:  # the engine's, and its answers'
            facts["reason"] = f"{error.where} {error.what}"
        rows[file] = FileParity.model_validate(facts)
    return tuple(rows[file] for file in files)


class ParityCheck:
    """What files are compared with: the student's weights and its scored answers."""

    def __init__(
        self, run: Run, model: Path, command: Sequence[str], runner: str, left_out: Collection[str]
    ) -> None:
        self.run, self.command, self.runner, self.left_out = run, command, runner, left_out
        date = run.config.template_date
        pairs, self.items = held_out_items(run.folder)
        self.student = by_item(
            self.items, read_records(run.path("answers/student.jsonl"), Response)
        )
        self.teacher = by_item(self.items, [pair.response for pair in pairs])
        tokenizer: Any = load_tokenizer(f"{model.resolve()}")
        encode = partial(encode_prompt, tokenizer, date=date)
        self.ids = {item.id: encode(messages=item.prompt.messages) for item in self.items}
        self.texts = list[Conversation]()
        for item in self.items:
            answer = encode_text(tokenizer, self.student[item.id].text)[:TOKENS]
            if answer:
                ids = self.ids[item.id]
                self.texts.append(Conversation(ids=(*ids, *answer), answer=len(ids)))
        self.texts = self.texts[:: -(-len(self.texts) // ANSWERS) or 1]
        network: Any = load_model(f"{model.resolve()}", "float32")
        self.most = context_length(network.config)
        self.logits = answer_logits(network, self.texts)
        del network
        gc.collect()

    def file(self, file: Path, sha256: str) -> dict[str, Any]:
        """Return what is measured of a file; raises DistillError where the engine fails."""
        facts = self.read_back(file)
        limit = answer_limit(self.run.config)
        longest = max(map(len, self.ids.values())) + limit
        context = min(self.most, -(-longest // ROOM) * ROOM)
        line = [*self.command, f"{file}", "--alias", file.stem, "--parallel", f"{PARALLEL}"]
        server = EngineServer([*line, "--ctx-size", f"{context * PARALLEL}"], "llama.cpp")
        try:
            server.wait()
            facts["prompts"], facts["answers"] = len(self.items), len(self.texts)
            facts["ids_equal"] = sum(self.same_ids(server, item) for item in self.items)
            facts["largest_difference"] = max(self.next_tokens(server), default=None)
            responder = FileResponder(server, file, digest({"gguf": sha256, "runner": self.runner}))
            requests = [
                Request.make(
                    responder.origin,
                    item.prompt.id,
                    item.prompt.messages,
                    Sampling(max_new_tokens=limit),
                )
                for item in self.items
            ]
            with Ask(responder, self.run.config.store_folder() / "responses") as ask:
                responses = ask.responses(requests, f"{file.name} answers")
        finally:
            server.close()
        return {**facts, **self.scored(by_item(self.items, responses))}

    def read_back(self, file: Path) -> dict[str, Any]:
        """Return the error of the logits of a file's weights, against the student's.

        It is that of llama.cpp's tests: the sum of squared differences over that of squares.
        """
        from transformers import AutoModelForCausalLM

        try:
            network: Any = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True
            )
            logits = answer_logits(network, self.texts)
        except (ImportError, KeyError, RuntimeError, ValueError) as error:
            return {"nmse_reason": f"transformers: {one_line(error)[:120]}"}
        both = list(zip(logits, self.logits, strict=True))
        error = sum(float((theirs - ours).square().sum()) for theirs, ours in both)
        return {"nmse": error / sum(float(ours.square().sum()) for _, ours in both)}

    def same_ids(self, server: EngineServer, item: Item) -> bool:
        """Tell whether the file's template and tokenizer make our ids of a prompt."""
        messages = [message.model_dump() for message in item.prompt.messages]
        rendered = post(server, "/apply-template", messages=messages).get("prompt")
        asked = {"content": rendered, "add_special": True, "parse_special": True}
        ids = post(server, "/tokenize", **asked).get("tokens") if rendered else None
        return ids == self.ids[item.id]

    def next_tokens(self, server: EngineServer) -> Iterator[float]:
        """Yield how far the runner's top log-probabilities are from ours, in nats.

        Of each text at one position, halfway through what was compared of its answer.
        """
        for text, logits_TV in zip(self.texts, self.logits, strict=True):
            half = len(logits_TV) // 2
            ours_V: Tensor = logits_TV[half].log_softmax(-1)
            prompt = list(text.ids[: text.answer + half])
            asked = {"prompt": prompt, "max_tokens": 1, "logprobs": TOP, "temperature": 0}
            reply = post(server, "/v1/completions", **asked)
            for choice in reply.get("choices", ()):
                for place in ((choice.get("logprobs") or {}).get("content") or ())[:1]:
                    for top in place["top_logprobs"]:
                        yield abs(top["logprob"] - float(ours_V[top["id"]]))

    def scored(self, answers: Mapping[str, Response]) -> dict[str, Any]:
        """Return the scores of a file's answers beside the student's, and their difference.

        Over all checks; of a run without checks, the likeness to the teacher's answers.
        """
        config = self.run.config
        both: AnswersByModel = {"teacher": self.teacher, "student": self.student, "file": answers}
        items = [item for item in self.items if item.id not in self.left_out]
        rows = measure_tasks(items, both, tasks_of_run(self.run.folder))
        row = pool(list(rows.values())) or measure_items(items, both)
        (file, student), most = (row.array(name) for name in ("file", "student")), row.bounds.high
        mask = paired(file, student, "the file's answers")
        a, b, clusters = file[mask] / most, student[mask] / most, row.clusters[mask]
        evaluation = config.evaluation
        certainty = Certainty(
            evaluation.confidence, evaluation.bootstrap_samples, config.seed, evaluation.margin
        )
        change = estimate_difference(a, b, clusters, certainty, Bounds(0.0, 1.0))
        same = sum(answers[i].text == answer.text for i, answer in self.student.items())
        return {
            "metric": row.metric,
            "same_answers": same,
            "student": float(np.mean(b)) if len(b) else None,
            "score": float(np.mean(a)) if len(a) else None,
            "difference": Difference.of(change).model_copy(
                update={"n": len(row.items), "documents": change.clusters}
            ),
            "verdict": non_inferiority(change, evaluation.margin),
        }


def post(server: EngineServer, path: str, **body: object) -> dict[str, Any]:
    """Return what a running engine replies; {} where it refuses."""
    reply = server.post(path, **body)
    return reply.json() if reply.status_code == 200 else {}
