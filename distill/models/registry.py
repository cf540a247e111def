"""Models by reference: a name of configs/models.yaml, a Hub id, or an explicit folder (`./x`, `/x`).

Looking up (`lookup`, `shape_of`, `identity` of a named model) needs no torch and no network. `fetch` returns a folder
of safetensors and tokenizer, verified and cached. Loading reads safetensors only and runs no code of a model's author,
unless a flag of the config says so.
"""

import difflib
import hashlib
import json
import os
import re
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from distill.config import checked_model
from distill.config_file import find_config, read_yaml
from distill.errors import DistillError, Exit
from distill.models.download import Gguf, converted
from distill.models.weights import (
    add_adapter,
    require_intact,
    require_values,
    stored_values,
    values_of,
)
from distill.records import Record, digest
from distill.storage.environment import cpu_facts
from distill.storage.files import sha256_file, write_json
from distill.storage.run_folder import differences

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TABLE = Path("configs/models.yaml")
COMMIT = re.compile(r"[0-9a-f]{40}")
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
# What makes a folder a model beside its weights: transformers reads them, and answers and tokens follow from them
PARTS = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("*.model", "*.tiktoken", "tekken.json", "chat_template.json", "*.jinja"),
    *("additional_chat_templates/*.jinja", "*.index.json", "*.py"),
)
FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]  # what is taken from the Hub


class Shape(Record):
    """A decoder's size; `parameters` counts the head only where it is not `tied` to the embedding."""

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


class ModelInfo(Record):
    """A row of models.yaml; `gguf` tells where a named model's weights come from, None for a model of the Hub."""

    name: str
    hub_id: str
    revision: str
    license: str
    shape: Shape
    gguf: Gguf | None = None

    @property
    def sha256(self) -> str | None:
        """Return the hash of the published weights, where the table has it."""
        return self.gguf.sha256 if self.gguf else None

    @property
    def bytes(self) -> int:
        """Return how much is downloaded: the GGUF, or two bytes a parameter."""
        return self.gguf.bytes if self.gguf else 2 * self.shape.parameters


@cache
def table() -> dict[str, ModelInfo]:
    """Read configs/models.yaml: the user's, else the one that ships; raises DistillError (exit 2)."""
    path = find_config(TABLE)
    rows = read_yaml(path, dict[str, ModelInfo])
    try:
        return {name: ModelInfo.model_validate({"name": name, **row}) for name, row in rows.items()}
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise DistillError(
            Exit.CONFIG, path, f"{where}: {fault['msg']}", "correct the row"
        ) from None


def lookup(reference: str) -> ModelInfo | None:
    """Return the row of models.yaml for a name or a Hub id, or None."""
    return table().get(reference)


def is_folder(reference: str) -> bool:
    """Tell whether a reference is an explicit folder; anything else is a name or a Hub id."""
    return reference.startswith(("./", "/"))


def hub_id(reference: str) -> str | None:
    """Return the Hub id that a published model names as its base, or None for a folder."""
    info = lookup(reference)
    return info.hub_id if info else None if is_folder(reference) else reference


def shape_of(reference: str) -> Shape | None:
    """Return the shape of a model of the table, or of a folder by its config.json; None where neither says."""
    info = lookup(reference)
    if info or not is_folder(reference):
        return info.shape if info else None
    path = Path(reference) / "config.json"
    return shape_from_config(_json(path)) if path.is_file() else None


def shape_from_config(config: dict[str, Any]) -> Shape:
    """Derive the shape of a Llama or Qwen2 decoder (gated MLP, grouped queries) from its config.json."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    layers, inner, vocab = (
        config[key] for key in ("num_hidden_layers", "intermediate_size", "vocab_size")
    )
    queries, keys = heads * head_dim, kv_heads * head_dim
    biases = queries + 2 * keys if config["model_type"] == "qwen2" else 0
    block = 2 * hidden * queries + 2 * hidden * keys + biases + 3 * hidden * inner + 2 * hidden
    tied = config.get("tie_word_embeddings", True)
    total = layers * block + hidden + vocab * hidden * (1 if tied else 2)
    return Shape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=inner,
        vocab=vocab,
        tied=tied,
        context=config["max_position_embeddings"],
        parameters=total,
    )


def fetch(reference: str, revision: str | None = None, allow_pickle: bool = False) -> Path:
    """Return the folder of a model's weights and tokenizer, downloading it where the cache lacks it.

    Raises DistillError: exit 2 for a name or folder that is not there, 3 where no place could give the files.
    """
    reference = _checked(reference)
    if is_folder(reference):
        return _existing(Path(reference))
    info = lookup(reference)
    if info and info.gguf:
        _refuse_revision(info, revision)
        return converted(info.name, info.gguf)
    _refuse_near_miss(reference)
    return _from_hub(reference, revision or (info.revision if info else None), allow_pickle)


def _checked(reference: str) -> str:
    """Accept what the config accepts as a model; raises DistillError (exit 2)."""
    try:
        return checked_model(reference)
    except ValueError as error:
        raise DistillError(
            Exit.CONFIG, f"model {reference[:60]!r}", "not a reference", str(error)
        ) from None


def _existing(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise DistillError(
            Exit.CONFIG, folder, "is no model folder: config.json is missing", "check the path"
        )
    return folder


def _refuse_near_miss(reference: str) -> None:
    """Stop at a misspelt name of the table before the Hub is asked for it."""
    near = difflib.get_close_matches(reference, table(), n=1, cutoff=0.75)
    if "/" not in reference and near:
        raise DistillError(
            Exit.CONFIG, f"model {reference}", "no such name", f"did you mean {near[0]}?"
        )


def _refuse_revision(info: ModelInfo, revision: str | None) -> None:
    """Stop where another revision of a named model is asked for: the name is one file."""
    if revision not in (None, info.revision):
        raise DistillError(
            Exit.CONFIG,
            f"model {info.name}",
            f"is one file, not revision {revision}",
            f"name the Hub id {info.hub_id}",
        )


def _from_hub(reference: str, revision: str | None, allow_pickle: bool) -> Path:
    """Download a snapshot from the Hub, or find it in its cache; HF_HUB_OFFLINE and HF_ENDPOINT are honoured."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = [*FILES, "*.bin"] if allow_pickle else FILES
    try:
        return Path(snapshot_download(reference, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        what = f"could not be fetched from the Hub: {_first_line(error)}"
        names = ", ".join(name for name in table() if "/" not in name)
        raise DistillError(
            Exit.INPUT, f"model {reference}", what, f"check id and network, or use one of {names}"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def identity(reference: str, revision: str | None = None) -> str:
    """Return what pins a model's weights: the hash of a named or local model's weights, or a commit of the Hub.

    A named model's is that of its GGUF, so it is known before anything is fetched. In a folder more can change than
    the weights: see `folder_facts`.
    """
    reference = _checked(reference)
    info = lookup(reference)
    if is_folder(reference):
        return _folder_hash(_existing(Path(reference)))
    if info and info.gguf:
        return info.gguf.sha256
    pinned = revision or (info.revision if info else None)
    if pinned and COMMIT.fullmatch(pinned):
        return pinned
    return fetch(reference, revision).name  # a snapshot's folder is named by its commit


def _folder_hash(folder: Path) -> str:
    """Hash the names and contents of a folder's weights; unchanged files are read once a process."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    parts = [
        (f.name, _file_hash(f.resolve(), f.stat().st_size, f.stat().st_mtime_ns)) for f in files
    ]
    if len(parts) == 1:
        return parts[0][1]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def parts(reference: str) -> dict[str, str]:
    """Return the hash of each file beside the weights that makes a folder the model it is, by name.

    It is empty for a model of the Hub or of models.yaml: what pins that one, pins all of its files.
    """
    if not is_folder(reference):
        return {}
    folder = _existing(Path(_checked(reference)))
    found = sorted(path for pattern in PARTS for path in folder.glob(pattern) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): _file_hash(
            path.resolve(), path.stat().st_size, path.stat().st_mtime_ns
        )
        for path in found
    }


def folder_facts(role: str, reference: str) -> dict[str, str]:
    """Return what a model in a folder is, as entries of a fingerprint: its weights, and each further file by name.

    `role` is what the model does there; `run.unnamed` knows the same form. Empty for a model that is pinned.
    """
    if not is_folder(reference):
        return {}
    files = {f"{role} file {name}": found for name, found in parts(reference).items()}
    return {role: identity(reference), **files}


def folder_digest(folder: Path) -> str:
    """Return one hash of a folder's model: of its weights, and of each further file that makes it what it is."""
    place = folder.resolve()
    stats = {p: p.stat() for name in ("*.safetensors", *PARTS) for p in place.glob(name)}
    return digest(
        {
            path.relative_to(place).as_posix(): _file_hash(path, stat.st_size, stat.st_mtime_ns)
            for path, stat in stats.items()
        }
    )


@cache
def _file_hash(path: Path, size: int, mtime_ns: int) -> str:
    return sha256_file(path)


def check_files(folder: Path, allow_pickle: bool = False, trust_remote_code: bool = False) -> None:
    """Refuse weights that are pickles, code of the model's author, and paths that lead out of the folder.

    Raises DistillError (exit 7) naming the flag that would allow it, where one does.
    """
    if not list(folder.glob("*.safetensors")) and not allow_pickle:
        pickles = list(folder.glob("*.bin")) + list(folder.glob("*.pt"))
        what = "has its weights only as pickle, which can run code" if pickles else "has no weights"
        fix = (
            "convert them to safetensors, or set student.allow_pickle: true"
            if pickles
            else "check it"
        )
        raise DistillError(Exit.TRAINING, folder, what, fix)
    if (folder / "adapter_config.json").is_file():
        what = "holds an adapter too, which transformers would add without a word"
        fix = "merge it, or move adapter_config.json and its weights elsewhere"
        raise DistillError(Exit.TRAINING, folder, what, fix)
    for name in ("config.json", "tokenizer_config.json"):
        content = _json(folder / name) if (folder / name).is_file() else {}
        if "auto_map" in content and not trust_remote_code:
            raise DistillError(
                Exit.TRAINING,
                folder / name,
                "auto_map wants to run code of the model's author",
                "read that code, then set student.trust_remote_code: true",
            )
        _refuse_outside(folder / name, content)
    index = folder / "model.safetensors.index.json"
    _refuse_outside(index, _json(index).get("weight_map", {}) if index.is_file() else {}, True)


def _refuse_outside(where: Path, content: dict[str, Any], every: bool = False) -> None:
    """Refuse file names that leave the folder: transformers 5.23 would follow them (#47176, #46279)."""
    for key, value in content.items():
        if (
            (every or key.endswith("_file"))
            and isinstance(value, str)
            and Path(value).name != value
        ):
            raise DistillError(
                Exit.TRAINING, where, f"{key} names {value!r}, outside the folder", "do not use it"
            )


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise DistillError(Exit.TRAINING, path, "is not a JSON object", "fetch the model again")
    return content


def quiet() -> None:
    """Silence the loading bars and advice of transformers; its errors stay."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def pick_dtype(name: str = "auto") -> "torch.dtype":
    """Return the named dtype; `auto` is bfloat16 where the machine computes in it, else float32."""
    import torch

    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        facts = cpu_facts()
        flags = f"{facts.get('flags', '')} {facts.get('Features', '')}".split()  # x86, ARM
        fast = not BF16_FLAGS.isdisjoint(flags)
    return torch.bfloat16 if fast else torch.float32


def device() -> "torch.device":
    """Return this process's GPU, or the CPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def context_length(model_config: Any) -> int:
    """Return how many tokens the model can see, by its config: a converted tokenizer reports an absurd limit."""
    return int(model_config.max_position_embeddings)


def load_model(
    reference: str,
    dtype: str = "auto",
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    load_in_4bit: bool = False,
    on_cpu: bool = False,
) -> "PreTrainedModel":
    """Load a causal language model for inference, on the GPU if there is one and not `on_cpu`.

    Raises DistillError: as `fetch` and `check_files`; exit 7 where the files are no causal language model, or not all
    of one, or its weights are no numbers.
    """
    folder = fetch(reference, revision, allow_pickle)
    extra: dict[str, Any] = {"quantization_config": _four_bit()} if load_in_4bit else {}
    if (place := device()).type == "cuda" and not on_cpu:
        extra["device_map"] = {"": place}  # straight to the GPU, without a copy in main memory
    flags = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    model = _read(reference, folder, dtype=pick_dtype(dtype), **flags, **extra)
    require_values(f"model {reference}", values_of(model))
    return model.eval()


def load_merged(
    reference: str, adapter: Path, revision: str | None = None, **flags: bool
) -> "PreTrainedModel":
    """Load a model with an adapter added to it in float32, in main memory: the caller casts it once.

    Raises DistillError as `load_model` does, and (exit 7) where the adapter does not fit.
    """
    base = load_model(reference, "float32", revision, on_cpu=True, **flags)
    return add_adapter(base, adapter).merge_and_unload(safe_merge=True).eval()


def check_model(
    reference: str, allow_pickle: bool = False, trust_remote_code: bool = False
) -> None:
    """Refuse a folder that does not hold the model of its config.json, long before the model is needed.

    What the Hub and models.yaml name has a hash, and is not read here. Raises DistillError as `load_model` does.
    """
    if not is_folder(reference):
        return
    folder = fetch(reference)
    flags = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    if "quantization_config" in _json(folder / "config.json"):
        return  # which names such weights have is known once they are unpacked
    # on the meta device only the names and shapes are read
    model = _read(reference, folder, device_map={"": "meta"}, **flags)
    require_values(
        f"model {reference}", stored_values(_weight_files(folder), model.state_dict().keys())
    )


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers reads: the one, or those that the index names."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file() or not index.is_file():
        return [whole] if whole.is_file() else []
    return [folder / name for name in sorted(set(_json(index)["weight_map"].values()))]


def _read(
    reference: str,
    folder: Path,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    **how: Any,
) -> Any:
    """Read a causal language model from its files, and nothing that is not in them: the one place that does."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    quiet()
    check_files(folder, allow_pickle, trust_remote_code)
    try:
        both: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            use_safetensors=None if allow_pickle else True,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are in the report, and are refused by it
            output_loading_info=True,
            **how,
        )
        model, report = both
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        what = f"could not be loaded: {_first_line(error)}"
        raise DistillError(Exit.TRAINING, f"model {reference}", what, "check the model") from None
    require_intact(f"model {reference}", report)
    return model


def _four_bit() -> Any:
    """Return the QLoRA quantisation (NF4, doubly quantised, arXiv 2305.14314); raises DistillError without CUDA."""
    import importlib.util

    import torch
    from transformers import BitsAndBytesConfig

    if not torch.cuda.is_available() or importlib.util.find_spec("bitsandbytes") is None:
        raise DistillError(
            Exit.TRAINING,
            "student.load_in_4bit",
            "needs an NVIDIA GPU and bitsandbytes",
            "pip install 'distill[cuda]' on such a machine, or leave it out",
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=pick_dtype(),
    )


def load_tokenizer(
    reference: str, revision: str | None = None, trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """Load and check a model's tokenizer; its `model_max_length` is the model's own context length."""
    from transformers import AutoTokenizer

    quiet()
    folder = fetch(reference, revision)
    check_files(folder, allow_pickle=True, trust_remote_code=trust_remote_code)
    config = _json(folder / "config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"its tokenizer could not be loaded: {_first_line(error)}"
        raise DistillError(Exit.TRAINING, f"model {reference}", what, "check the model") from None
    tokenizer.model_max_length = config["max_position_embeddings"]
    tokenizer.name_or_path = reference
    check_tokenizer(tokenizer, config.get("vocab_size"))
    return tokenizer


def check_tokenizer(tokenizer: Any, vocab_size: int | None = None) -> None:
    """Refuse a tokenizer that cannot train or serve a chat model; raises DistillError (exit 7).

    `vocab_size` is the number of the model's embeddings: an id beyond it means another model's tokenizer.
    """
    where = f"tokenizer of {tokenizer.name_or_path}"
    if not tokenizer.chat_template:
        raise DistillError(Exit.TRAINING, where, "has no chat template", "use an instruct model")
    for name in ("eos", "pad"):
        if getattr(tokenizer, f"{name}_token_id") is None:
            fix = f"set {name}_token in its tokenizer_config.json"
            raise DistillError(Exit.TRAINING, where, f"has no {name}_token", fix)
    if vocab_size is not None and len(tokenizer) > vocab_size:
        what = f"has {len(tokenizer)} tokens, the model {vocab_size} embeddings"
        raise DistillError(
            Exit.TRAINING, where, what, "use the tokenizer that belongs to the model"
        )


def check_base(adapter: Path, reference: str, revision: str | None = None) -> None:
    """Refuse an adapter that was trained on another model; raises DistillError (exit 7).

    The adapter's own record is `base.json` beside its weights, written by `record_base`. One that knows a folder by
    its weights alone, as an earlier distill wrote it, is held to these.
    """
    path = adapter / "base.json"
    if not path.is_file():
        raise DistillError(Exit.TRAINING, adapter, "does not say what it was trained on", "retrain")
    base, found, files = _json(path), identity(reference, revision), parts(reference)
    kept = base.get("identity")
    if kept != found:
        what = f"was trained on {str(kept)[:12]}, {reference} is {found[:12]}"
        raise DistillError(Exit.TRAINING, adapter, what, "name the base that it was trained on")
    if changes := differences(base.get("files", files), files):
        what = f"was trained on {reference} as it was before: {'; '.join(changes)}"
        raise DistillError(Exit.TRAINING, adapter, what, "restore these files, or train again")


def record_base(adapter: Path, reference: str, revision: str | None = None) -> dict[str, Any]:
    """Write, and return, which base an adapter belongs to: name, Hub id, revision, hash of the weights, other files."""
    info = lookup(reference)
    base: dict[str, Any] = {
        "name": reference if not is_folder(reference) else Path(reference).name,
        "hub_id": hub_id(reference),
        "revision": revision or (info.revision if info else None),
        "identity": identity(reference, revision),
    }
    if files := parts(reference):
        base["files"] = files
    write_json(adapter / "base.json", base)
    return base
