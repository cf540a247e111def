"""The experiment's configuration: one YAML file, a strict tree, and overrides such as `train.learning_rate=2e-4`.

Every fault (unknown or duplicate key, wrong type, value out of range, a secret in the file) ends as one line with the
file, the line and the key, before anything is loaded or asked. Config reaches a stage's `main` and stops there.
"""

import difflib
import math
import re
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from distill.errors import DistillError, Exit

MAX_BYTES = 1_000_000  # a config larger than this is a mistake
SECRET = re.compile(
    r"(?:sk-[A-Za-z0-9_-]{16,}|hf_[A-Za-z0-9]{20,}|AIza[0-9A-Za-z_-]{30,}|-----BEGIN [A-Z ]*PRIVATE KEY)"
)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A part of the tree: unknown keys are errors, numbers are not made of strings, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_silent_conversion(cls, value: Any, info: Any) -> Any:
        """Refuse a boolean or a text where a number is meant: pydantic would convert both."""
        kinds = str(cls.model_fields[info.field_name].annotation)
        number = "int" in kinds or "float" in kinds
        if number and isinstance(value, bool) and "bool" not in kinds:
            raise ValueError("a number is needed, not true or false")
        if number and isinstance(value, str) and "str" not in kinds and "Literal" not in kinds:
            raise ValueError(f"a number is needed, not the text {value[:40]!r}")
        return value


def checked_model(value: str) -> str:
    """Accept a Hub id, a name of models.yaml, or an explicit folder (`./x`, `/x`); refuse traversal."""
    if value.startswith(("./", "/")) and "\0" not in value and ".." not in Path(value).parts:
        return value
    if not MODEL.fullmatch(value):
        raise ValueError("a model is NAME, OWNER/NAME, or a folder written as ./FOLDER or /FOLDER")
    return value


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
    path: Path | None = None
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
    """Who answers, and how. `recorded` and `canned` read answers from a file."""

    kind: Literal["local", "canned", "recorded"] = "local"
    model: str = ""
    revision: str | None = None
    answers: Path | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Positive = 512
    n: Positive = 1
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    slots: Positive | None = None
    licence: str | None = None
    dollars: Decimal | None = None

    @field_validator("model")
    @classmethod
    def _model_name(cls, value: str) -> str:
        return value and checked_model(value)

    @model_validator(mode="after")
    def _complete(self) -> "Teacher":
        if self.kind == "local" and not self.model:
            raise ValueError("needs model")
        if self.kind == "canned" and self.answers is None:
            raise ValueError("kind canned needs answers: FILE")
        if self.n > 1 and self.temperature == 0 and self.kind == "local":
            raise ValueError(
                "n above 1 needs a temperature above 0: greedy answers are all the same"
            )
        return self


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
    revision: str | None = None
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
    """Weights of the parts of the loss; they are used as given."""

    ce: Annotated[float, Field(ge=0)] = 1.0


class Train(Section):
    """The training loop. A step is `tokens_per_step` real tokens, however many processes share it."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    num_train_epochs: Annotated[float, Field(gt=0)] = 2
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


class Evaluation(Section):
    """How models are compared, and on what machine their time is priced (a row of prices.yaml)."""

    max_new_tokens: Positive | None = None
    slots: Positive | None = None
    samples: Positive = 10_000
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    machine: str | None = None
    prices: Path | None = None


class Publish(Section):
    """What the release is called and under which licence."""

    model_name: str | None = None
    licence: str | None = None
    language: str = "en"
    gguf: bool = False


class Config(Section):
    """One experiment."""

    name: str
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    runs: Path = Path("runs")
    store: Path | None = None
    template_date: str = "2026-01-01"
    corpus: Corpus
    prompts: Prompts = Prompts()
    teacher: Teacher
    filters: Filters = Filters()
    student: Student
    train: Train = Train()
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

    def store_folder(self) -> Path:
        """Return the folder of the store that all runs share."""
        return self.store or self.runs / ".store"

    def resolved(self) -> dict[str, Any]:
        """Return the whole tree as plain JSON values."""
        return self.model_dump(mode="json")


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: `1e-4` is a number, `on` and `012` are texts, a key stands once, no aliases."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in pairs
        if not tag.endswith((":bool", ":int", ":float", ":timestamp"))
    ]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)|[-+]?\.(?:inf|nan))$"
    ),
    list("-+0123456789."),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    """Build a mapping, and refuse a key that stands twice or is not a text."""
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.MarkedYAMLError(
                problem=f"a key must be a text, not {key!r}", problem_mark=key_node.start_mark
            )
        if key in result:
            raise yaml.MarkedYAMLError(
                problem=f"key {key!r} stands twice", problem_mark=key_node.start_mark
            )
        result[key] = loader.construct_object(value_node, deep=True)
    return result


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse_yaml(text: str, where: object) -> Any:
    """Parse one YAML document safely; raises DistillError with the line of the fault."""
    try:
        if any(
            isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)
        ):
            raise yaml.YAMLError("aliases are not allowed")
        return _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark else where
        raise DistillError(
            Exit.CONFIG, place, getattr(error, "problem", None) or str(error), "write plain YAML"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DistillError(
            Exit.CONFIG, where, f"not readable as YAML: {error}", "write plain YAML"
        ) from None


def read_text(path: Path) -> str:
    """Read a small UTF-8 text file that the user named; raises DistillError where it is none."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DistillError(
                Exit.CONFIG,
                path,
                f"larger than {MAX_BYTES:,} bytes",
                "this is no config; check the path",
            )
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DistillError(
            Exit.CONFIG, path, f"not UTF-8 at byte {error.start}", "save the file as UTF-8"
        ) from None
    except OSError as error:
        raise DistillError(
            Exit.CONFIG, path, error.strerror or str(error), "check the path"
        ) from None


def key_lines(text: str) -> dict[tuple[str, ...], int]:
    """Map each key's path to its line (from 1) in a YAML text."""
    lines: dict[tuple[str, ...], int] = {}

    def walk(node: yaml.Node | None, path: tuple[str, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                lines[(*path, str(key.value))] = key.start_mark.line + 1
                walk(value, (*path, str(key.value)))

    walk(yaml.compose(text, Loader=yaml.SafeLoader), ())
    return lines


def apply_override(tree: dict[str, Any], override: str) -> tuple[str, ...]:
    """Set `a.b=value` (value in YAML) in `tree`, and return the key's path."""
    name, equals, value = override.partition("=")
    path = tuple(name.strip().split("."))
    if not equals or not all(path):
        raise DistillError(Exit.CONFIG, override, "not an override", "write key.name=value")
    node = tree
    for part in path[:-1]:
        child = node.get(part)
        node[part] = node = child if isinstance(child, dict) else {}
    node[path[-1]] = parse_yaml(value, override)
    return path


def _valid_names(path: tuple[str | int, ...]) -> list[str]:
    """Return the keys that are allowed beside the last part of `path`."""
    model: Any = Config
    for part in path[:-1]:
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        model = next(
            (c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None
        )
    return list(model.model_fields) if model else []


def _explain(error: ValidationError, place: str, lines: dict[tuple[str, ...], int]) -> DistillError:
    """Turn pydantic's first fault into one line with file, line, key and a way out."""
    fault = error.errors()[0]
    path = tuple(
        str(part)
        for part in fault["loc"]
        if str(part).isidentifier() and not str(part).startswith("function-")
    )
    line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
    where, key = f"{place}:{line}" if line else place, ".".join(path)
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], _valid_names(path), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "valid: " + ", ".join(_valid_names(path))
        return DistillError(Exit.CONFIG, where, f"unknown key {key}", hint)
    message = fault["msg"].removeprefix("Value error, ")
    what = f"{key} is missing" if fault["type"] == "missing" else f"{key}: {message}"
    given = "" if isinstance(fault["input"], dict) else f", not {str(fault['input'])[:60]!r}"
    return DistillError(
        Exit.CONFIG, where, what + ("" if "not " in message else given), "correct the value"
    )


def refuse_secrets(value: Any, where: str, path: tuple[str, ...] = ()) -> None:
    """Stop at anything that looks like a key or token; its value is never echoed. Infinite numbers stop too."""
    if isinstance(value, dict):
        for key, child in value.items():
            refuse_secrets(child, where, (*path, str(key)))
    elif isinstance(value, list):
        for child in value:
            refuse_secrets(child, where, path)
    elif isinstance(value, str) and SECRET.search(value):
        raise DistillError(
            Exit.CONFIG,
            where,
            f"{'.'.join(path)} holds a secret",
            "name an environment variable instead",
        )
    elif isinstance(value, float) and not math.isfinite(value):
        raise DistillError(
            Exit.CONFIG, where, f"{'.'.join(path)} is not a finite number", "correct the value"
        )


def find_config(path: Path) -> Path:
    """Return `path`, or the file of that name among those that ship with the package (`configs/NAME`)."""
    if path.exists() or path.is_absolute():
        return path
    for root in (Path(__file__).parent.parent, Path(__file__).parent / "_data"):
        candidate = root / path
        if candidate.is_file():
            return candidate
    return path


def load_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Read, override and check the experiment at `path`; raises DistillError (exit 2) with one clear line."""
    path = find_config(path)
    text = read_text(path)
    tree = parse_yaml(text, path)
    if not isinstance(tree, dict):
        raise DistillError(
            Exit.CONFIG, path, "holds no mapping of keys", "start from one of configs/*.yaml"
        )
    lines = key_lines(text)
    for override in overrides:
        changed = apply_override(tree, override)
        lines = {key: line for key, line in lines.items() if key[: len(changed)] != changed}
    refuse_secrets(tree, str(path))
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, str(path), lines) from None
