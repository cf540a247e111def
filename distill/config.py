"""The experiment's configuration: a strict tree of keys with their defaults, ranges and rules.

`distill.config_file` reads one from YAML. Config reaches a stage's `main` and stops there.
"""

import ipaddress
import re
import socket
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0, le=10**9)]
Count = Annotated[int, Field(ge=0, le=10**9)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
Weight = Annotated[float, Field(ge=0)]
SOFT = ("forward_kl", "reverse_kl", "jsd", "skew_kl")


class Section(BaseModel):
    """A part of the tree: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def plain_path(value: Path) -> Path:
    """Refuse a path that no file system would take."""
    if any(len(part.encode()) > 255 for part in value.parts) or len(str(value)) > 4000:
        raise ValueError("the path is too long")
    return value


def plain_revision(value: str) -> str:
    """Accept a branch, tag or commit."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}", value) or ".." in value:
        raise ValueError("a revision is a branch, a tag or a commit")
    return value


File = Annotated[Path, AfterValidator(plain_path)]
Revision = Annotated[str, AfterValidator(plain_revision)]


def checked_model(value: str) -> str:
    """Accept a Hub id, a name of models.yaml, or an explicit folder (`./x`, `/x`); refuse traversal."""
    if value.startswith(("./", "/")) and "\0" not in value and ".." not in Path(value).parts:
        return value
    if not MODEL.fullmatch(value):
        raise ValueError("a model is NAME, OWNER/NAME, or a folder written as ./FOLDER or /FOLDER")
    return value


SERVED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/-]{0,199}")  # what servers call their models
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")


def checked_url(value: str, allow_insecure: bool = False) -> str:
    """Accept the address of an endpoint: https, or http on this machine (anywhere with `allow_insecure`)."""
    try:
        parts = urlsplit(value)
        host, _ = (parts.hostname or "").lower(), parts.port
    except ValueError:
        raise ValueError("the address cannot be read") from None
    if parts.scheme not in ("http", "https") or not host or not value.isprintable():
        raise ValueError("an address is https://HOST/v1, or http://localhost:PORT/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError("an address holds no name, key, query or fragment")
    address = _ip(host)
    if host == "metadata.google.internal" or (address and _is_metadata(address)):
        raise ValueError("the address is that of a cloud's metadata service")
    local = host == "localhost" or bool(address and address.is_loopback)
    if parts.scheme == "http" and not local and not allow_insecure:
        raise ValueError("http is for this machine; use https, or set allow_insecure: true")
    return value.rstrip("/")


Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _ip(host: str) -> Address | None:
    """Return a host as an IP address, also one written as a single number or in octal; None for a name."""
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        try:
            return ipaddress.IPv4Address(socket.inet_aton(host))
        except (OSError, UnicodeError):
            return None
    return getattr(found, "ipv4_mapped", None) or found


def _is_metadata(address: Address) -> bool:
    """Tell whether an address is link-local (where clouds put their keys) or the one that AWS has in IPv6."""
    return address.is_link_local or str(address) in ("fd00:ec2::254", "100.100.100.200")


class Chunk(Section):
    """Cut documents longer than `max_chars` at paragraph ends, with `overlap_chars` carried over."""

    max_chars: Positive = 6000
    overlap_chars: Count = 200
    min_chars: Count = 40

    @model_validator(mode="after")
    def _overlap_is_smaller(self) -> "Chunk":
        if self.overlap_chars * 2 > self.max_chars:
            raise ValueError("overlap_chars must be at most half of max_chars")
        return self


class SplitSizes(Section):
    """Documents for validation and held out: a whole number is a count, below 1 a share of all."""

    validation: Annotated[float, Field(ge=0)] = 0.05
    heldout: Annotated[float, Field(ge=0)] = 0.1


class Columns(Section):
    """Names of the columns in rows, where they are not the usual ones."""

    text: str | None = None
    id: str | None = None
    prompt: str | None = None
    reference: str | None = None


class Corpus(Section):
    """Where the documents, or the prompts that are there already, come from. `path` wins over `dataset`."""

    source: Literal["auto", "python-docs"] = "auto"
    path: File | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    format: Literal["auto", "documents", "prompts"] = "auto"
    columns: Columns = Columns()
    reference_pattern: str | None = None
    limit: Positive | None = None
    max_bad_fraction: Fraction = 0.01
    chunk: Chunk = Chunk()
    near_duplicate_threshold: Annotated[float, Field(gt=0, le=1)] | None = 0.85
    split: SplitSizes = SplitSizes()
    private_text: Literal["mask", "drop", "keep"] = "mask"

    @field_validator("dataset")
    @classmethod
    def _dataset_name(cls, value: str | None) -> str | None:
        return value if value is None else checked_model(value)

    @field_validator("reference_pattern")
    @classmethod
    def _pattern(cls, value: str | None) -> str | None:
        try:
            if value is not None and re.compile(value).groups != 1:
                raise ValueError("the pattern needs exactly one group")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return value

    @model_validator(mode="after")
    def _one_source(self) -> "Corpus":
        if self.source == "auto" and self.path is None and self.dataset is None:
            raise ValueError("needs path, dataset, or source: python-docs")
        return self


class Questions(Section):
    """Questions that the teacher writes about each document."""

    kinds: tuple[str, ...] = ("factual", "explain", "apply")
    per_document: Positive = 3
    max_new_tokens: Positive = 256
    answer_with_passage: bool = True
    student_sees_passage: bool = False


class Prompts(Section):
    """Which tasks are asked of which documents; counts cap the prompts of each split."""

    tasks: tuple[str, ...] = ()
    per_document: Literal["each", "rotate"] = "each"
    train: Positive | None = None
    validation: Count | None = None
    heldout: Count | None = None
    questions: Questions | None = None


class Teacher(Section):
    """Who answers, and how. `recorded` and `canned` read answers from a file, `endpoint` asks a server."""

    kind: Literal["local", "endpoint", "canned", "recorded"] = "local"
    model: str = ""
    revision: Revision | None = None
    answers: File | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Positive = 512
    n: Positive = 1
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    slots: Positive | None = None
    licence: str | None = None
    dollars: Decimal | None = None
    # kind: endpoint
    base_url: str | Annotated[tuple[str, ...], Field(min_length=1, max_length=100)] | None = None
    allow_insecure: bool = False
    api: Literal["chat", "completions"] = "chat"
    api_key_env: str | None = None
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    omit: tuple[Literal["temperature", "max_tokens"], ...] = ()
    extra_body: dict[str, Any] = {}
    strict_model: bool = False
    reasoning: Literal["drop", "keep"] = "drop"
    budget_dollars: Annotated[Decimal, Field(gt=0, allow_inf_nan=False)] | None = None
    concurrency: Annotated[int, Field(gt=0, le=4096)] = 16
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    connect_timeout: Seconds = 10
    read_timeout: Seconds = 300
    total_timeout: Seconds = 600
    drain_timeout: Seconds = 60
    max_pause: Seconds = 300
    first_wait: Seconds = 0.5
    max_retries: Annotated[int, Field(ge=0, le=100)] = 6
    max_straight_failures: Positive = 100
    max_body_bytes: Annotated[int, Field(ge=1000, le=10**9)] = 16_000_000

    @property
    def base_urls(self) -> tuple[str, ...]:
        """Return the addresses of the endpoint; the first names it."""
        urls = (self.base_url,) if isinstance(self.base_url, str) else self.base_url or ()
        return tuple(url.rstrip("/") for url in urls)

    @field_validator("model")
    @classmethod
    def _model_name(cls, value: str, info: ValidationInfo) -> str:
        served = info.data.get("kind") == "endpoint" and SERVED.fullmatch(value)
        if served and ".." not in value:
            return value
        return value and checked_model(value)

    @field_validator("extra_body")
    @classmethod
    def _no_field_of_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        if ours := value.keys() & {"model", "messages", "prompt", "n", "stream"}:
            raise ValueError(f"{min(ours)} is ours to set")
        return value

    @field_validator("api_key_env")
    @classmethod
    def _a_variable(cls, value: str | None) -> str | None:
        if value is not None and not VARIABLE.fullmatch(value):
            raise ValueError("names an environment variable, and never holds a key")
        return value

    @model_validator(mode="after")
    def _complete(self) -> "Teacher":
        if self.kind in ("local", "endpoint") and not self.model:
            raise ValueError("needs model")
        if self.kind == "canned" and self.answers is None:
            raise ValueError("kind canned needs answers: FILE")
        if (self.kind == "endpoint") != bool(self.base_url):
            raise ValueError("kind endpoint needs base_url, and no other kind takes one")
        for url in self.base_urls:
            checked_url(url, self.allow_insecure)
        greedy = self.temperature == 0 and "temperature" not in self.omit
        if self.n > 1 and greedy and self.kind in ("local", "endpoint"):
            raise ValueError(
                "n above 1 needs a temperature above 0: greedy answers are all the same"
            )
        return self


class Signals(Section):
    """What is kept of the teacher's distributions, for losses that need them.

    Of each the ids that hold `p`, at most `k`; or by `method: sampled` as many draws as `samples`, which are right in
    the mean whatever the text: for text that is not the teacher's own, of which k ids hold too little. `model` reads
    the answers, here, where the teacher shall not; `endpoint` does so elsewhere, with prompt_logprobs as vLLM gives
    them; `from_answers` takes the top log-probabilities that came with an endpoint's answers. `tokenizer` names a model
    with the server's tokenizer and template, where they are not the student's.
    """

    method: Literal["nucleus", "sampled"] = "nucleus"
    samples: Annotated[int, Field(ge=1, le=255)] = 50
    p: Annotated[float, Field(gt=0, lt=1)] = 0.999
    k: Annotated[int, Field(ge=1, le=1024)] = 64
    temperatures: tuple[Annotated[float, Field(gt=0, le=100)], ...] = ()
    model: str | None = None
    revision: Revision | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    endpoint: Teacher | None = None
    from_answers: bool = False
    tokenizer: str | None = None

    @field_validator("model", "tokenizer")
    @classmethod
    def _model_name(cls, value: str | None) -> str | None:
        return value and checked_model(value)

    @model_validator(mode="after")
    def _one_reader(self) -> "Signals":
        if self.endpoint and self.endpoint.kind != "endpoint":
            raise ValueError("endpoint is of kind: endpoint; a local reader is named in model")
        if sum((bool(self.endpoint), bool(self.model), self.from_answers)) > 1:
            raise ValueError("either model reads the answers, or endpoint, or from_answers is true")
        return self

    @model_validator(mode="after")
    def _no_tails(self) -> "Signals":
        if self.method == "sampled" and self.temperatures:
            raise ValueError("method sampled is for temperature 1 only: leave temperatures out")
        return self

    @property
    def shape(self) -> dict[str, Any]:
        """Return the settings that shape what is kept."""
        sampled = {"method": self.method, "samples": self.samples}
        nucleus = {"p": self.p, "k": self.k, "temperatures": list(self.temperatures)}
        return sampled if self.method == "sampled" else nucleus


class Filters(Section):
    """Which answers are dropped before training; every drop keeps its reason."""

    truncated: bool = True
    empty: bool = True
    refusal: bool = True
    repetition: bool = True
    wrong_format: bool = True
    failed_checker: bool = True
    max_answer_tokens: Positive | None = None


class Student(Section):
    """The small model that learns."""

    model: str
    revision: Revision | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    load_in_4bit: bool = False
    allow_pickle: bool = False
    trust_remote_code: bool = False

    _model_name = field_validator("model")(classmethod(lambda cls, value: checked_model(value)))


class Lora(Section):
    """The adapter, in PEFT's words."""

    r: Annotated[int, Field(ge=1, le=1024)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"


class Loss(Section):
    """Weights of the parts of the loss, used as given; all but `ce` need the teacher's distributions.

    These come from the cache of the signals stage, or from a teacher that is kept in memory and read at every step.
    `beta` is that of the Jensen-Shannon divergence, `alpha` that of skew KL, `temperature` that of all soft parts.
    """

    ce: Weight = 1.0
    forward_kl: Weight = 0.0
    reverse_kl: Weight = 0.0
    jsd: Weight = 0.0
    skew_kl: Weight = 0.0
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.1
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    teacher: Literal["cached", "live"] = "cached"

    @property
    def soft(self) -> dict[str, float]:
        """Return the parts that need the teacher's distributions, with their weights."""
        parts = {name: getattr(self, name) for name in SOFT}
        return {name: weight for name, weight in parts.items() if weight}

    @property
    def parts(self) -> dict[str, float]:
        """Return all parts that have a weight, the cross-entropy first."""
        return {**({"ce": self.ce} if self.ce else {}), **self.soft}

    @model_validator(mode="after")
    def _something(self) -> "Loss":
        if not self.ce and not self.soft:
            raise ValueError("gives every part the weight 0")
        return self


class Train(Section):
    """The training loop. A step is `tokens_per_step` real tokens, however many processes share it.

    `seed` draws the adapter and the order of samples, so that another one trains on the same split; the run's by default.
    """

    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    num_train_epochs: Annotated[float, Field(gt=0, le=1000)] = 2
    max_steps: Positive | None = None
    tokens_per_step: Positive = 2048
    micro_batch_tokens: Positive | None = None
    max_length: Positive = 2048
    packing: bool = True
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Annotated[float, Field(ge=0)] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    lora: Lora = Lora()
    loss: Loss = Loss()
    bf16: bool | Literal["auto"] = "auto"
    gradient_checkpointing: bool = False
    eval_steps: Positive | None = 50
    save_steps: Positive | None = 50
    save_total_limit: Annotated[int, Field(ge=2)] = 2
    load_best_model_at_end: bool = True
    early_stopping_patience: Positive | None = None
    logging_steps: Positive = 1
    num_processes: Positive | None = None
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = "none"


class OnPolicy(Section):
    """Rounds after training in which the student answers, and learns what the teacher would have said at each token.

    A round asks `prompts` of the training prompts, cuts each answer off at `max_new_tokens`, lets the teacher read them
    once, and trains one epoch towards its distributions by `divergence`, with what else `train` says.
    """

    rounds: Annotated[int, Field(ge=0, le=100)] = 0
    prompts: Positive = 256
    max_new_tokens: Positive = 128
    temperature: Annotated[float, Field(gt=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl"] = "jsd"
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-4


class Evaluation(Section):
    """How models are compared, on what machine their time is priced, and against whose list price (rows of prices.yaml)."""

    suites: tuple[Annotated[str, Field(min_length=1, max_length=4000)], ...] = ()
    max_new_tokens: Positive | None = None
    slots: Positive | None = None
    samples: Annotated[int, Field(ge=100, le=1_000_000)] = 10_000
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.05  # of non-inferiority, a share of the items
    machine: str | None = None
    prices: File | None = None
    utilisation: Annotated[float, Field(gt=0, le=1)] = 0.5  # of a paid hour that a machine works
    requests_per_month: Positive = 100_000
    teacher_price: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    judge: Teacher | None = None  # any responder; it is used only after its probes

    @field_validator("judge")
    @classmethod
    def _can_be_asked(cls, value: Teacher | None) -> Teacher | None:
        if value is not None and value.kind == "recorded":
            raise ValueError("a judge is local, endpoint or canned")
        return value


class Terms(Section):
    """What allows training on the teacher's answers, where configs/terms.yaml does not; a copy of an agreement."""

    basis: Annotated[str, Field(min_length=3, max_length=500)] | None = None
    agreement: File | None = None


class Publish(Section):
    """What the release is called and under which licence."""

    model_name: str | None = None
    licence: str | None = None
    language: str = "en"

    @field_validator("model_name")
    @classmethod
    def _plain_name(cls, value: str | None) -> str | None:
        if value is not None and not MODEL.fullmatch(value):
            raise ValueError("a model's name is NAME or OWNER/NAME")
        return value


class Config(Section):
    """One experiment."""

    name: str
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    runs: File = Path("runs")
    store: File | None = None
    template_date: str = "2026-01-01"
    corpus: Corpus
    prompts: Prompts = Prompts()
    teacher: Teacher
    terms: Terms = Terms()
    filters: Filters = Filters()
    signals: Signals = Signals()
    student: Student
    train: Train = Train()
    on_policy: OnPolicy = OnPolicy()
    evaluation: Evaluation = Evaluation()
    publish: Publish = Publish()

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            raise ValueError(
                "a name is letters, digits, '.', '_' and '-', and begins with a letter or digit"
            )
        return value

    @field_validator("template_date")
    @classmethod
    def _a_date(cls, value: str) -> str:
        try:
            return date.fromisoformat(value).isoformat()
        except ValueError:
            raise ValueError("a date is written YYYY-MM-DD") from None

    @property
    def captures(self) -> bool:
        """Tell whether the teacher's distributions over its answers are captured before training."""
        return bool(self.train.loss.soft) and self.train.loss.teacher == "cached"

    @property
    def distributions(self) -> bool:
        """Tell whether any stage needs the teacher's distributions, cached or live."""
        return bool(self.train.loss.soft) or self.on_policy.rounds > 0

    @property
    def train_seed(self) -> int:
        """Return the seed of the training: its own, else the run's."""
        return self.seed if self.train.seed is None else self.train.seed

    @model_validator(mode="after")
    def _sampled(self) -> "Config":
        loss, own = self.train.loss, self.on_policy
        parts = [*(loss.soft if self.captures else ()), *([own.divergence] if own.rounds else ())]
        other = [name for name in parts if name != "forward_kl"]
        if self.signals.method == "sampled" and (other or (parts and loss.temperature != 1)):
            what = other[0] if other else f"temperature {loss.temperature:g}"
            raise ValueError(
                f"signals.method sampled is right for ce and forward_kl at temperature 1 only, not for {what}"
            )
        return self

    @model_validator(mode="after")
    def _captured_from_a_server(self) -> "Config":
        if not self.distributions or self.soft_teacher().kind != "endpoint":
            return self
        own, loss, fix = self.signals, self.train.loss, "name a local model in signals.model"
        if not self.captures or self.on_policy.rounds:
            what = "on_policy has rounds" if self.on_policy.rounds else "train.loss.teacher is live"
            raise ValueError(f"{what}, which needs a local teacher: {fix}")
        if own.temperatures or loss.temperature != 1:
            raise ValueError(f"an endpoint tells distributions at temperature 1 only: {fix}")
        if own.method == "sampled":
            raise ValueError(f"no endpoint gives what signals.method sampled draws from: {fix}")
        return self

    @model_validator(mode="after")
    def _came_with_answers(self) -> "Config":
        if not (self.distributions and self.signals.from_answers):
            return self
        if self.teacher.kind != "endpoint" or not self.teacher.extra_body.get("logprobs"):
            raise ValueError(
                "signals.from_answers needs teacher.kind: endpoint and teacher.extra_body: "
                "{logprobs: true, top_logprobs: 20}"
            )
        return self

    @model_validator(mode="after")
    def _captured(self) -> "Config":
        if not self.distributions:
            return self
        loss, kept = self.train.loss, (1.0, *self.signals.temperatures)
        if self.soft_teacher().kind not in ("local", "endpoint"):
            asking = "train.loss has soft parts" if loss.soft else "on_policy has rounds"
            raise ValueError(
                f"{asking}, which a local teacher must read: name one in signals.model"
            )
        if (self.captures or self.on_policy.rounds) and loss.temperature not in kept:
            raise ValueError(
                f"train.loss.temperature {loss.temperature:g} is not captured: add it to signals.temperatures"
            )
        return self

    @property
    def buys_signals(self) -> bool:
        """Tell whether a server is asked to read the answers again, for their distributions."""
        served = self.soft_teacher().kind == "endpoint"
        return self.captures and served and not self.signals.from_answers

    def soft_teacher(self) -> Teacher:
        """Return the teacher whose distributions are captured: that of `signals`, else the one that answers."""
        own = self.signals
        if own.model is None:
            return own.endpoint or self.teacher
        return Teacher(model=own.model, revision=own.revision, dtype=own.dtype)

    def reader(self) -> tuple[str, str | None]:
        """Return the model, and its revision, that this machine reads for distributions: of a server's its tokenizer."""
        teacher, own, student = self.soft_teacher(), self.signals, self.student
        if teacher.kind != "endpoint":
            return teacher.model, teacher.revision
        if own.tokenizer:
            return own.tokenizer, own.revision
        return student.model, student.revision

    def store_folder(self) -> Path:
        """Return the folder of the store that all runs share."""
        return self.store or self.runs / ".store"

    def resolved(self) -> dict[str, Any]:
        """Return the whole tree as plain JSON values."""
        return self.model_dump(mode="json")
