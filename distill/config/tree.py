"""The experiment's configuration: a strict tree of keys, each with meaning, default and range.

Config reaches a stage's `main` and stops there. `distill.config.yaml_file` reads it.
"""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from distill.config.learning import Arm, OnPolicy, Recipe, Signals, Student, Train
from distill.config.release import Publish, Terms
from distill.config.renamed_keys import present_value
from distill.config.teachers import (
    AnyEngine,
    AnyJudge,
    AnyTeacher,
    EndpointTeacher,
    Engines,
    LocalTeacher,
    Questions,
    Teacher,
)
from distill.config.values import (
    Count,
    Date,
    Encoding,
    File,
    Fraction,
    ModelName,
    Name,
    Pattern,
    Positive,
    Section,
)


class Chunk(Section):
    """How long documents are cut into pieces, at the ends of paragraphs."""

    max_chars: Positive = 6000
    """Characters of a piece at most; lower it where passage and answer exceed the context."""
    overlap_chars: Count = 200
    """Characters of the end of a piece that the next one begins with again."""
    min_chars: Count = 40
    """Documents of fewer characters are left out. Lower it for a corpus of short texts."""

    @model_validator(mode="after")
    def _overlap_is_smaller(self) -> "Chunk":
        if self.overlap_chars * 2 > self.max_chars:
            raise ValueError("overlap_chars must be at most half of max_chars")
        return self


class SplitSizes(Section):
    """How many documents are not trained on; documents are split before any prompt is made."""

    validation: Annotated[float, Field(ge=0)] = 0.05
    """Documents that choose the best checkpoint: a count, or below 1 a share of all."""
    heldout: Annotated[float, Field(ge=0)] = 0.1
    """Documents for the evaluation alone, written like `validation`."""


class Columns(Section):
    """Names of the columns of rows, where they are not the usual ones."""

    text: str | None = None
    """Column with a document's text; else text, content, document, passage or body."""
    id: str | None = None
    """Column with an id of yours, which must be unique; else `id`, where there is one."""
    prompt: str | Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Column with the prompt or the conversation, or several whose texts are joined by blank lines
    in this order; else those of the usual sets, which docs/corpus.md lists."""
    answer: str | None = None
    """Column with the recorded answer; else that of the usual sets."""
    system: str | None = None
    """Column with the system turn; else `system`, `system_prompt` or `system_message`."""
    reference: str | None = None
    """Column with the right answer; else `reference`, or the recorded answer of a column."""


class Corpus(Section):
    """Where the documents or the prompts come from, and how they are cleaned."""

    source: Literal["auto", "python-docs"] = "auto"
    """`auto` reads `path` or `dataset`; `python-docs` the documentation of this Python."""
    path: File | None = None
    """File or folder of documents or rows: txt, md, rst, html, json, jsonl, ndjson, csv, tsv,
    parquet, pdf or docx. Wins over `dataset`."""
    encoding: Encoding | None = None
    """Encoding of text files as Python calls it (cp1252, cp932, gb18030); null: if recognised."""
    dataset: ModelName | None = None
    """Dataset of the Hub as OWNER/NAME, or a folder that `datasets` saved, as ./FOLDER."""
    dataset_config: str | None = None
    """Configuration of the dataset, for datasets that have several (GSM8K: `main`)."""
    dataset_split: str = "train"
    """Split of the dataset that is read."""
    format: Literal["auto", "documents", "prompts"] = "auto"
    """Whether rows are documents, or prompts that exist already; `auto` tells by their columns."""
    columns: Columns = Columns()
    reference_pattern: Pattern | None = None
    r"""Regular expression whose group takes the reference from an answer (`####\s*(.+)$`)."""
    limit: Positive | None = None
    """Documents at most, without repeats, by content and seed. Set it for a first try."""
    max_bad_fraction: Fraction = 0.01
    """Share of unreadable rows above which the stage stops. Raise it for a dirty corpus."""
    chunk: Chunk = Chunk()
    near_duplicate_threshold: Annotated[float, Field(gt=0, le=1)] | None = 0.85
    """Documents that share at least this part of their word 5-grams (Jaccard) with an earlier one
    are left out; null keeps all but exact repeats."""
    split: SplitSizes = SplitSizes()
    private_text: Literal["mask", "drop", "keep"] = "mask"
    """What happens to e-mail addresses, phone and card numbers and keys: `mask` replaces them,
    `drop` drops their documents, `keep` keeps them, and no samples of answers are published."""

    @model_validator(mode="after")
    def _one_source(self) -> "Corpus":
        if self.source == "auto" and self.path is None and self.dataset is None:
            raise ValueError("needs path, dataset, or source: python-docs")
        return self


class Prompts(Section):
    """Which tasks are asked of which documents."""

    tasks: tuple[str, ...] = ()
    """Names of tasks in configs/tasks, or paths; none where the corpus holds prompts."""
    per_document: Literal["each", "rotate"] = "each"
    """`each` asks every task of every document; `rotate` one task a document, the tasks in turn."""
    train: Positive | None = None
    """Prompts of the train split at most; null takes all."""
    validation: Count | None = None
    """Prompts of the validation split at most; null takes all."""
    heldout: Count | None = None
    """Held-out prompts at most; null takes all. More of them make the intervals narrower."""
    questions: Questions | None = None
    """Lets the teacher write questions about each document; null asks for none."""
    select: Literal["all", "where_student_fails"] = "all"
    """`where_student_fails` asks the teacher `train` prompts of all that the corpus gives: first a
    quarter, then what a student trained on that fails or, unchecked, is least sure of."""

    @model_validator(mode="after")
    def _something_to_select(self) -> "Prompts":
        if self.select != "all" and (self.train or 0) < 4:
            raise ValueError("select needs train: how many prompts the teacher is asked, 4 or more")
        if self.select != "all" and self.questions:
            raise ValueError("select chooses among prompts that are there: set questions: null")
        return self


class Filters(Section):
    """Which answers are dropped before training; dropped.jsonl holds each with its reason."""

    truncated: bool = True
    """Drops answers that reached their length limit."""
    empty: bool = True
    """Drops answers without text."""
    refusal: bool = True
    """Drops answers that begin by declining."""
    repetition: bool = True
    """Drops answers that repeat themselves over and over."""
    wrong_format: bool = True
    """Drops answers without the form that their task asks for (JSON, code)."""
    failed_checker: Annotated[
        Literal["drop", "signals_only", "keep"],
        BeforeValidator(partial(present_value, "filters.failed_checker")),
    ] = "drop"
    """What becomes of answers that the checker of their task rejects: `drop` drops them, `keep`
    trains on them, `signals_only` on the teacher's distributions there, and not on their tokens."""
    answers_per_prompt: Positive | None = None
    """Distinct answers kept of a prompt, the first ones, right before wrong; null keeps all."""
    max_answer_tokens: Positive | None = None
    """Drops answers of more tokens, as counted by the teacher; null keeps long ones."""
    python: tuple[str, ...] = ()
    """Names of your filters, after these; `distill.run(..., filters=[...])` fills it in."""


class Tries(Section):
    """How often the student answers a held-out prompt, where one of its answers is chosen."""

    n: Annotated[int, Field(ge=2, le=1000)] = 8
    """Answers to a prompt."""
    temperature: Annotated[float, Field(gt=0, le=2)] = 0.7
    """Sampling temperature; at 0 all of them would be the same."""


class Evaluation(Section):
    """How models are compared, and at what prices."""

    suites: tuple[Annotated[str, Field(min_length=1, max_length=4000)], ...] = ()
    """Further questions: names in eval/suites, or paths of your own."""
    max_new_tokens: Positive | None = None
    """Tokens of an answer to a held-out prompt, at most; null takes `teacher.max_new_tokens`."""
    engine: AnyEngine = "distill"
    """What student and base answer in and are timed in; name what people will serve with, as in
    `teacher.engine`."""
    concurrency: Positive | None = None
    """Requests to student and base that run at once; null takes what fits in memory."""
    timing: Literal["quick", "full"] = "quick"
    """How models that run here are timed: with 8 requests at once, once; `full` with 1, 8 and 32,
    each until three runs agree, which takes minutes."""
    bootstrap_samples: Annotated[int, Field(ge=100, le=1_000_000)] = 10_000
    """Bootstrap samples from which an interval is read."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Confidence level of the intervals."""
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Margin of non-inferiority: how many of all items fewer still count as equal, a share."""
    machine: str | None = None
    """Row of the price table for the time of local models; null leaves it without price."""
    prices: File | None = None
    """Price table of your own in the form of configs/prices.yaml; its rows win."""
    utilisation: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of a paid hour in which the student's machine works."""
    requests_per_month: Positive = 100_000
    """Requests a month for which savings are stated."""
    teacher_price: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """Model of the price table whose price stands in for the teacher's."""
    tries: Tries | None = None
    """Measures the student with several tries at a request, {n: 8, temperature: 0.7}, of which one
    is chosen without the reference; null measures its greedy answer alone."""
    judge: AnyJudge | None = None
    """Compares answers in pairs, if it passes its probes; keys as in `teacher`. null: none."""

    @model_validator(mode="after")
    def _judge_is_asked_at_once(self) -> "Evaluation":
        if getattr(self.judge, "batch", False):
            raise ValueError("a judge is not asked by batch: leave judge.batch out")
        return self


class Config(Section):
    """One experiment."""

    name: Name
    """Name of the run, and of its folder below `runs`."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the split, of samples and of training."""
    runs: File = Path("runs")
    """Folder of all runs."""
    store: File | None = None
    """Folder of the answers and soft labels that all runs share; null takes .store below `runs`."""
    template_date: Date = "2026-01-01"
    """Date that chat templates print, so that a run repeats on another day."""
    reasoning: Literal["drop", "keep"] = "drop"
    """What becomes of thoughts before the teacher's answers: `drop` makes a student that answers
    at once, `keep` one that thinks first; answers are scored without them."""
    corpus: Corpus
    prompts: Prompts = Prompts()
    teacher: AnyTeacher
    """Who answers, and how."""
    engines: Engines = Engines()
    terms: Terms = Terms()
    filters: Filters = Filters()
    signals: Signals = Signals()
    student: Student
    train: Train = Train()
    recipe: Recipe = Recipe()
    on_policy: OnPolicy = OnPolicy()
    evaluation: Evaluation = Evaluation()
    publish: Publish = Publish()
    _user_sections: dict[str, Any] = PrivateAttr({})  # where `recipe` changes what the user wrote

    @property
    def captures(self) -> bool:
        """Tell whether the teacher's distributions are captured before training."""
        loss = self.train.loss
        return (bool(loss.soft) and loss.teacher == "cached") or bool({*self.arms} - {"text"})

    @property
    def arms(self) -> tuple[Arm, ...]:
        """Return the losses that a search tries, none where there is no search."""
        full = self.soft_teacher().logprobs == "full" and self.signals.method == "nucleus"
        arms = self.recipe.losses or (("text", "reverse_kl", "forward_kl") if full else ("text",))
        return arms if self.recipe.mode == "auto" else ()

    @property
    def distributions(self) -> bool:
        """Tell whether any stage needs the teacher's distributions, cached or live."""
        return bool(self.train.loss.soft) or self.captures or self.on_policy.rounds > 0

    @property
    def refines(self) -> bool:
        """Tell whether the student goes on after its training: by its own answers, or on policy."""
        return self.train.self_answers is not None or self.on_policy.rounds > 0

    @property
    def auto_engines(self) -> list[str]:
        """Return the keys of the engines that are still to be chosen."""
        evaluation = self.evaluation
        sections: dict[str, object] = {"teacher": self.teacher, "evaluation": evaluation}
        sections["evaluation.judge"] = evaluation.judge
        return [f"{k}.engine" for k, v in sections.items() if getattr(v, "engine", "") == "auto"]

    @property
    def train_seed(self) -> int:
        """Return the seed of the training: its own, else the run's."""
        return self.seed if self.train.seed is None else self.train.seed

    @model_validator(mode="after")
    def _search_has_what_it_needs(self) -> "Config":
        if self.recipe.mode == "off":
            return self
        teacher, temperatures = self.teacher, self.signals.temperatures
        if self.refines:
            what = "recipe.mode auto compares trainings alone: train.self_answers and on_policy"
            raise ValueError(f"{what} come after it, with chosen.yaml")
        metric = {"metric_for_best_model": "checker"}
        changes: dict[str, Section] = {"train": self.train.model_copy(update=metric)}
        if dollars := self.recipe.dollars:
            if not isinstance(teacher, EndpointTeacher):
                what = "recipe.dollars is for a paid teacher: set teacher_tokens, or neither"
                raise ValueError(what)
            least = min(dollars, teacher.budget_dollars or dollars)
            changes["teacher"] = teacher.model_copy(update={"budget_dollars": least})
        if "forward_kl" in self.arms and 2.0 not in temperatures:
            more = {"temperatures": (*temperatures, 2.0)}
            changes["signals"] = self.signals.model_copy(update=more)
        self._user_sections = {name: getattr(self, name) for name in changes}
        vars(self).update(changes)  # which the resolved config shows
        return self

    @model_validator(mode="after")
    def _distributions_can_be_had(self) -> "Config":
        if self.filters.failed_checker == "signals_only" and not self.train.loss.soft:
            what = "filters.failed_checker signals_only needs soft labels, and train.loss has none"
            raise ValueError(f"{what}: say drop or keep, or add a part (train.loss.forward_kl: 1)")
        if not self.distributions:
            return self
        loss, signals, teacher = self.train.loss, self.signals, self.soft_teacher()
        rounds, sampled = self.on_policy.rounds > 0, signals.method == "sampled"
        divergences = [*(loss.soft if self.captures else ()), *{*self.arms} - {"text"}]
        divergences += [self.on_policy.divergence] if rounds else []
        biased = any(name != "forward_kl" for name in divergences) or loss.temperature != 1
        bodies = self.teacher.extra_body if isinstance(self.teacher, EndpointTeacher) else {}
        listed, local = teacher.logprobs == "listed", "name a local model in signals.model"
        no_server = rounds or self.train.self_answers is not None  # gave some of the answers
        why = ""
        if divergences and sampled and biased:
            why = "signals.method sampled is right for ce and forward_kl at temperature 1 only"
        elif teacher.logprobs is None or (listed and (no_server or not self.captures)):
            what = "train.loss has soft parts" if loss.soft else "recipe.losses has divergences"
            what = "train.self_answers adds answers" if no_server else what
            what = "on_policy has rounds" if rounds else what
            why = f"{what}, which a local teacher must read: {local}"
        elif listed and (sampled or signals.temperatures or loss.temperature != 1):
            why = f"an endpoint tells top tokens at temperature 1 only; for more, {local}"
        elif listed and getattr(teacher, "form", "") == "anthropic":
            why = f"wire anthropic tells no distributions: {local}"
        elif self.buys_signals and getattr(teacher, "batch", False):
            why = "prompt_logprobs are not asked by batch: set batch: false where they are read"
        elif signals.from_answers and not bodies.get("logprobs"):
            why = (
                "signals.from_answers needs teacher.extra_body: {logprobs: true, top_logprobs: 20}"
            )
        elif divergences and loss.temperature not in (1.0, *signals.temperatures):
            why = "train.loss.temperature is not captured: add it to signals.temperatures"
        if why:
            raise ValueError(why)
        return self

    @property
    def buys_signals(self) -> bool:
        """Tell whether a server is asked to read the answers again, for their distributions."""
        served = self.soft_teacher().logprobs == "listed"
        return self.captures and served and not self.signals.from_answers

    def soft_teacher(self) -> Teacher:
        """Return whose distributions are captured: the teacher of `signals`, else `teacher`."""
        signals = self.signals
        if signals.model is None:
            return signals.endpoint or self.teacher
        return LocalTeacher(model=signals.model, revision=signals.revision, dtype=signals.dtype)

    def reader(self) -> tuple[str, str | None]:
        """Return the model, of a server that of its tokenizer, and the revision loaded here."""
        teacher, signals, student = self.soft_teacher(), self.signals, self.student
        if teacher.runs_here:
            return teacher.model, teacher.revision
        if signals.tokenizer:
            return signals.tokenizer, signals.revision
        return student.model, student.revision

    def store_folder(self) -> Path:
        """Return the folder of the store that all runs share."""
        return self.store or self.runs / ".store"

    def resolved(self) -> dict[str, Any]:
        """Return the whole tree as plain JSON values."""
        return self.model_dump(mode="json")

    def user_tree(self) -> dict[str, Any]:
        """Return it without what follows from `recipe`, so that this does not outlast `recipe`."""
        return self.model_copy(update=self._user_sections).resolved()
