"""Models by reference: a name of configs/models.yaml, a Hub id, or a folder (`./x`, `/x`).

Looking up needs no torch and no network. `fetch` returns a folder of safetensors and tokenizer,
verified and cached; `models.loading` loads it.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from distill.config.tree import Config
from distill.config.values import SAFE, Trust, checked_model
from distill.config.yaml_file import find_config, read_table
from distill.errors import DistillError, Exit, one_line
from distill.models.download import Gguf, converted
from distill.records import Record, digest
from distill.storage.files import sha256_file, write_json
from distill.storage.run_folder import differences

TABLE = Path("configs/models.yaml")
COMMIT = re.compile(r"[0-9a-f]{40}")
# What makes a folder a model beside its weights: transformers reads them, and answers follow
PARTS = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("*.model", "*.tiktoken", "tekken.json", "chat_template.json", "*.jinja"),
    *("additional_chat_templates/*.jinja", "*.index.json", "*.py"),
)
WEIGHTS = ("*.safetensors", "*.bin")
SIZES = {  # of a config.json, and what a `Shape` calls them
    "hidden_size": "hidden",
    "num_attention_heads": "heads",
    "num_hidden_layers": "layers",
    "intermediate_size": "intermediate",
    "vocab_size": "vocab",
    "max_position_embeddings": "context",
}
FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]  # what is taken from the Hub


class Shape(Record):
    """A decoder's size; `parameters` counts the head where it is not `tied` to the embedding."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    context: int
    parameters: int

    @property
    def head(self) -> int:
        """Return the weights of the output head."""
        return self.vocab * self.hidden

    @property
    def body(self) -> int:
        """Return the weights that every token passes: all but embedding and head."""
        return self.parameters - self.head * (1 if self.tied else 2)


class ModelInfo(Record):
    """A row of models.yaml; `gguf` says where a named model's weights are, None for a Hub model."""

    name: str = ""  # its key in the table
    hub_id: str
    revision: str
    license: str
    shape: Shape
    gguf: Gguf | None = None


@cache
def table() -> dict[str, ModelInfo]:
    """Read configs/models.yaml, the user's or the one that ships; raises DistillError (exit 2)."""
    rows = read_table(find_config(TABLE), dict[str, ModelInfo], "correct the row")
    return {name: row.model_copy(update={"name": name}) for name, row in rows.items()}


def lookup(reference: str) -> ModelInfo | None:
    """Return the row of models.yaml for a name or a Hub id, or None."""
    return table().get(reference)


def is_folder(reference: str) -> bool:
    """Tell whether a reference is an explicit folder; else it is a name or a Hub id."""
    return reference.startswith(("./", "/"))


def hub_id(reference: str) -> str | None:
    """Return the Hub id that a published model names as its base, or None for a folder."""
    info = lookup(reference)
    return info.hub_id if info else None if is_folder(reference) else reference


def shape_of(reference: str) -> Shape:
    """Return the shape of a model of the table, or of a folder; raises DistillError (exit 2)."""
    if info := lookup(reference):
        return info.shape
    if is_folder(reference):
        return shape_from_config(read_object(fetch(reference) / "config.json"))
    what = "its shape is not known"
    raise DistillError(Exit.CONFIG, f"model {reference}", what, "add it to configs/models.yaml")


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a config.json that describes the decoder, or all of it."""
    parts = (config.get(name) for name in ("text_config", "llm_config", "language_config"))
    return next((part for part in parts if isinstance(part, dict)), config)


def shape_from_config(config: dict[str, Any]) -> Shape:
    """Derive the shape of a Llama or Qwen2 decoder (gated MLP, grouped queries).

    What a config leaves to its class, as that of gemma-3-4b-it does, is the class's default. Raises
    DistillError (exit 7) naming what is not there, or is no size.
    """
    text = text_config(config)
    kind = text.get("model_type") or config.get("model_type")
    if any(key not in text for key in SIZES):
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        if kind and kind in CONFIG_MAPPING:  # defaults alone: a file's sizes can be any
            text = {**CONFIG_MAPPING[kind]().get_text_config().to_dict(), **text}
    sizes = dict[str, int]()
    for key, name in SIZES.items():
        if not isinstance(size := text.get(key), int | float):
            what, fix = f"states no {key}", "check it, or use another model"
            raise DistillError(Exit.TRAINING, f"config.json of a {kind}", what, fix)
        sizes[name] = int(size)
    hidden, heads, inner = sizes["hidden"], sizes["heads"], sizes["intermediate"]
    kv_heads = text.get("num_key_value_heads") or heads
    head_dim = text.get("head_dim") or hidden // (heads or 1)
    queries, keys = heads * head_dim, kv_heads * head_dim
    biases = queries + 2 * keys if kind == "qwen2" else 0
    block = 2 * hidden * queries + 2 * hidden * keys + biases + 3 * hidden * inner + 2 * hidden
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", True))
    matrices = sizes["vocab"] * hidden * (1 if tied else 2)
    sizes |= {"kv_heads": kv_heads, "head_dim": head_dim}
    sizes["parameters"] = sizes["layers"] * block + hidden + matrices
    return Shape.model_validate({**sizes, "tied": tied})


def fetch(
    reference: str, revision: str | None = None, trust: Trust = SAFE, weights: bool = True
) -> Path:
    """Return the folder of a model's weights and tokenizer, downloaded where the cache lacks it.

    Without `weights` those of the Hub are left there, and only what stands beside them is fetched.
    Raises DistillError: exit 2 for a name or folder that is not there, 3 where no place could give
    the files.
    """
    where = f"model {reference[:60]}"
    try:
        checked_model(reference)
    except ValueError as error:
        raise DistillError(Exit.CONFIG, where, "is not a reference", str(error)) from None
    if is_folder(reference):
        if not (Path(reference) / "config.json").is_file():
            what = "is no model folder: config.json is missing"
            raise DistillError(Exit.CONFIG, reference, what, "check the path")
        return Path(reference)
    info = lookup(reference)
    if info and info.gguf:
        if revision not in (None, info.revision):  # the name is one file
            what, fix = f"is one file, not revision {revision}", f"name the Hub id {info.hub_id}"
            raise DistillError(Exit.CONFIG, where, what, fix)
        return converted(info.name, info.gguf)
    near = difflib.get_close_matches(reference, table(), n=1, cutoff=0.75)
    if "/" not in reference and near:  # a misspelt name of the table, before the Hub is asked
        raise DistillError(Exit.CONFIG, where, "no such name", f"did you mean {near[0]}?")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [*FILES, *["*.bin"] * trust.pickle, *["*.py"] * trust.code]
    patterns = [pattern for pattern in patterns if weights or pattern not in WEIGHTS]
    version = revision_of(reference, revision)
    try:  # HF_HUB_OFFLINE and HF_ENDPOINT are honoured
        return Path(snapshot_download(reference, revision=version, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        what = f"could not be fetched from the Hub: {one_line(error)}"
        names = ", ".join(name for name in table() if "/" not in name)
        fix = f"check id and network, or use one of {names}"
        raise DistillError(Exit.INPUT, where, what, fix) from None


def models_of(config: Config) -> list[tuple[str, str | None, Trust]]:
    """Return what a run loads here as models or tokenizers: reference, revision and trust."""
    teacher, student = config.teacher, config.student
    models = [(student.model, student.revision, student.trust)]
    if teacher.runs_here:
        models.append((teacher.model, teacher.revision, SAFE))
    if config.distributions and config.reader()[0] != student.model:
        models.append((*config.reader(), SAFE))
    return models


def revision_of(reference: str, revision: str | None) -> str | None:
    """Return the revision of a model: the one that is given, or that of the table."""
    info = lookup(reference)
    return revision or (info.revision if info else None)


def identity(reference: str, revision: str | None = None) -> str:
    """Return what pins a model's weights: their hash, or a commit of the Hub.

    A named model's is that of its GGUF, so it is known before anything is fetched. In a folder more
    can change than the weights: see `folder_facts`.
    """
    if is_folder(reference):
        hashes = _hashes(fetch(reference), WEIGHTS)
        if len(hashes) == 1:
            return next(iter(hashes.values()))
        return hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()
    info, pinned = lookup(reference), revision_of(reference, revision)
    if info and info.gguf:
        return info.gguf.sha256
    if pinned and COMMIT.fullmatch(pinned):
        return pinned
    # a snapshot's folder is named by its commit
    return fetch(reference, revision, weights=False).name


def parts(reference: str) -> dict[str, str]:
    """Return by name the hashes of a folder's files beside its weights; {} for a pinned model."""
    return _hashes(fetch(reference), PARTS) if is_folder(reference) else {}


def folder_facts(role: str, reference: str) -> dict[str, str]:
    """Return the weights and files of a model in a folder, for a fingerprint; {} if it is pinned.

    `role` is what the model does there; `run_folder.unnamed` knows the same form.
    """
    files = {f"{role} file {name}": sha256 for name, sha256 in parts(reference).items()}
    return {role: identity(reference), **files} if files else {}


def folder_digest(folder: Path, weights: bool = True) -> str:
    """Return one hash of a folder's model: of its weights, and of each file beside them."""
    return digest(_hashes(folder, ("*.safetensors", *PARTS) if weights else PARTS))


def _hashes(folder: Path, patterns: Iterable[str]) -> dict[str, str]:
    """Return the hashes of a folder's files by name; unchanged ones are read once a process."""
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    hashes = {}
    for path in sorted(paths):
        facts = path.stat()
        sha256 = _file_hash(path.resolve(), facts.st_size, facts.st_mtime_ns)
        hashes[path.relative_to(folder).as_posix()] = sha256
    return hashes


@cache
def _file_hash(path: Path, size: int, mtime_ns: int) -> str:
    return sha256_file(path)


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file of a model; raises DistillError (exit 7) where it holds no object."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise DistillError(Exit.TRAINING, path, "is not a JSON object", "fetch the model again")
    return content


def check_base(adapter: Path, reference: str, revision: str | None = None) -> None:
    """Refuse an adapter that was trained on another model; raises DistillError (exit 7).

    One that knows a folder by its weights alone, as an earlier distill wrote it, is held to these.
    """
    path = adapter / "base.json"
    if not path.is_file():
        raise DistillError(Exit.TRAINING, adapter, "does not say what it was trained on", "retrain")
    base, current, files = read_object(path), identity(reference, revision), parts(reference)
    if base.get("identity") != current:
        what = f"was trained on {str(base.get('identity'))[:12]}, {reference} is {current[:12]}"
        raise DistillError(Exit.TRAINING, adapter, what, "name the base that it was trained on")
    if changes := differences(base.get("files", files), files):
        what = f"was trained on {reference} as it was before: {'; '.join(changes)}"
        raise DistillError(Exit.TRAINING, adapter, what, "restore these files, or train again")


def record_base(adapter: Path, reference: str, revision: str | None = None) -> dict[str, object]:
    """Write, and return, which base an adapter belongs to: its names, and what pins it."""
    base: dict[str, object] = {
        "name": Path(reference).name if is_folder(reference) else reference,
        "hub_id": hub_id(reference),
        "revision": revision_of(reference, revision),
        "identity": identity(reference, revision),
    }
    if files := parts(reference):
        base["files"] = files
    write_json(adapter / "base.json", base)
    return base
