"""Load models and tokenizers by reference: the one place that does, for teacher, student and judge.

Loading reads safetensors only and runs no code of a model's author, unless a flag of the config says so. What is not
in the files is an error and not a random number (`models.weights`).
"""

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import DistillError, Exit
from distill.models.registry import fetch, first_line, is_folder, read_object
from distill.models.weights import (
    add_adapter,
    require_intact,
    require_values,
    stored_values,
    values_of,
)
from distill.storage.environment import cpu_facts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


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
        content = read_object(folder / name) if (folder / name).is_file() else {}
        if "auto_map" in content and not trust_remote_code:
            raise DistillError(
                Exit.TRAINING,
                folder / name,
                "auto_map wants to run code of the model's author",
                "read that code, then set student.trust_remote_code: true",
            )
        _refuse_outside(folder / name, content)
    index = folder / "model.safetensors.index.json"
    _refuse_outside(
        index, read_object(index).get("weight_map", {}) if index.is_file() else {}, True
    )


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
    if "quantization_config" in read_object(folder / "config.json"):
        return  # which names such weights have is known once they are unpacked
    # on the meta device only the names and shapes are read
    model = _read(reference, folder, device_map={"": "meta"}, **flags)
    require_values(
        f"model {reference}", stored_values(_weight_files(folder), model.state_dict().keys())
    )


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers reads: the one, or those that the index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    return [folder / name for name in sorted(set(read_object(index)["weight_map"].values()))]


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
        what = f"could not be loaded: {first_line(error)}"
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
    config = read_object(folder / "config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"its tokenizer could not be loaded: {first_line(error)}"
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
