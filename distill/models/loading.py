"""Load models and tokenizers by reference: the one place that does, for teacher, student and judge.

Loading reads safetensors only and runs no code of a model's author, unless the config trusts it.
What is not in the files is an error and not a random number (`models.weights`).
"""

import importlib.util
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from distill.config.values import SAFE, Trust
from distill.errors import DistillError, Exit, one_line
from distill.models.chat_template import Reasoning, fix_template
from distill.models.devices import device, pick_dtype, raise_device_error
from distill.models.registry import fetch, is_folder, read_object, text_config
from distill.models.weights import add_adapter, require_intact, require_values

# Where the part for text lies in a model that has others, and what the others are called
TEXT_PART = {
    r"^language_model\.model\.": "model.",
    r"^model\.language_model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}
OTHER_PARTS = re.compile(r"(^|\.)(vision|visual|audio|multi_modal|embed_vision|embed_audio|mtp)")

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from distill.config.learning import Student


def check_files(folder: Path, trust: Trust = SAFE) -> None:
    """Refuse pickled weights, code of the model's author, and paths that lead out of the folder.

    Raises DistillError (exit 7) naming the flag that would allow it, where one does.
    """

    def refuse(where: Path, what: str, fix: str) -> NoReturn:
        raise DistillError(Exit.TRAINING, where, what, fix)

    if not trust.pickle and not list(folder.glob("*.safetensors")):
        fix = "convert them to safetensors; of a student, or set student.allow_pickle: true"
        refuse(folder, "has no weights, or as pickle alone, which can run code", fix)
    if (folder / "adapter_config.json").is_file():
        what = "holds an adapter too, which transformers would add without a word"
        refuse(folder, what, "merge it, or move adapter_config.json and its weights elsewhere")
    names = ("config.json", "tokenizer_config.json", "model.safetensors.index.json")
    for path in filter(Path.is_file, map(folder.joinpath, names)):
        content = read_object(path)
        if "auto_map" in content and not trust.code:
            from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

            kind = text_config(read_object(folder / "config.json")).get("model_type")
            if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:  # else it names an older copy
                fix = "read that code; then a student may run it (student.trust_remote_code: true),"
                fix += " and a teacher behind a server of its own (teacher.kind: endpoint)"
                refuse(path, "auto_map wants to run code of the model's author", fix)
        # transformers 5.23 would follow names that leave the folder (#47176, #46279)
        files = {key: value for key, value in content.items() if key.endswith("_file")}
        if not isinstance(shards := content.get("weight_map", {}), dict):
            refuse(path, "weight_map is no mapping of tensors to files", "fetch the model again")
        for key, value in {**files, **shards}.items():
            if isinstance(value, str) and Path(value).name != value:
                refuse(path, f"{key} names {value!r}, outside the folder", "do not use it")


def context_length(model_config: "PreTrainedConfig") -> int:
    """Return how many tokens a model sees; a converted tokenizer's own limit is absurd.

    Raises DistillError (exit 7) where the config states none.
    """
    length = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(length, int) or length < 1:
        where, what = f"model {model_config.name_or_path}", "its config states no context length"
        raise DistillError(Exit.TRAINING, where, what, "set max_position_embeddings there")
    return length


def load_model(
    reference: str,
    dtype: str = "auto",
    revision: str | None = None,
    trust: Trust = SAFE,
    load_in_4bit: bool = False,
    on_cpu: bool = False,
) -> "PreTrainedModel":
    """Load a causal language model for inference, on the GPU if there is one and not `on_cpu`.

    Raises DistillError: as `fetch` and `check_files`; exit 7 where the files are no causal language
    model, or not all of one, or its weights are no numbers.
    """
    folder, options = fetch(reference, revision, trust), dict[str, Any]()
    if load_in_4bit:  # NF4, doubly quantised (QLoRA, arXiv 2305.14314)
        from transformers import BitsAndBytesConfig

        require_4bit()
        kind = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        kind |= {"load_in_4bit": True, "bnb_4bit_compute_dtype": pick_dtype()}
        options["quantization_config"] = BitsAndBytesConfig(**kind)
    if (place := device()).type == "cuda" and not on_cpu:
        options["device_map"] = {"": place}  # straight to the GPU, without a copy in main memory
    model = _read(reference, folder, trust, dtype=pick_dtype(dtype), **options)
    require_values(f"model {reference}", model.named_parameters())
    return model.eval()


def require_4bit() -> None:
    """Stop where weights cannot be loaded in 4 bits; raises DistillError (exit 7)."""
    import torch

    if not torch.cuda.is_available() or importlib.util.find_spec("bitsandbytes") is None:
        what = "needs an NVIDIA GPU and bitsandbytes"
        fix = "pip install 'distill[cuda]' on such a machine, or leave it out"
        raise DistillError(Exit.TRAINING, "student.load_in_4bit", what, fix)


def load_merged(
    reference: str,
    adapter: Path,
    dtype: "torch.dtype",
    revision: str | None = None,
    trust: Trust = SAFE,
) -> "PreTrainedModel":
    """Load a model with an adapter added to it, in main memory: one that is trained fits there too.

    The base stays in the type of its files; weight by weight, the product is added in float32 and
    the sum cast once to `dtype`. What a model computes anew when it is loaded, its rotary
    frequencies, stays in float32, as in a model that is loaded in `dtype`. Raises DistillError as
    `load_model` does, and (exit 7) where the adapter does not fit.
    """
    from peft.tuners.lora import LoraLayer

    base = _read(reference, fetch(reference, revision, trust), trust, dtype="auto")
    require_values(f"model {reference}", base.named_parameters())
    model = add_adapter(base, adapter)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            weight: Any = layer.get_base_layer().weight
            weight.data = weight.data.float()
            layer.merge(safe_merge=True)
            weight.data = weight.data.to(dtype)
    model = model.unload().eval()
    stored = model.state_dict().keys()
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if name in stored and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


def check_model(reference: str, trust: Trust = SAFE) -> None:
    """Refuse a folder that does not hold the model of its config.json, long before it is needed.

    What the Hub and models.yaml name has a hash, and is not read here. Raises DistillError as
    `load_model` does.
    """
    if not is_folder(reference):
        return
    folder = fetch(reference)
    tree = read_object(folder / "config.json")
    if settings := tree.get("quantization_config") or text_config(tree).get("quantization_config"):
        from transformers.quantizers.auto import AutoHfQuantizer

        with read_by_library(reference, "its quantised weights cannot be used here"):
            # its package is missing, or the machine has no such kernels
            quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
            quantizer.validate_environment(device_map={"": device()}, weights_only=True)
        return  # which names such weights have is known once they are unpacked
    from safetensors import safe_open

    # on the meta device only the names and shapes are read
    names = _read(reference, folder, trust, device_map={"": "meta"}).state_dict().keys()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:  # pyright: ignore[reportGeneralTypeIssues]
            stored = ((name, file.get_tensor(name)) for name in names & set(file.keys()))
            require_values(f"model {reference}", stored)


def decoder_config(folder: Path, trust: Trust) -> tuple["PreTrainedConfig", bool]:
    """Return the config of a folder's causal language model, and whether it is a part of another.

    Of a model for pictures or sound too it is the part for text, as a model of its own: this is
    trained, evaluated and published (transformers, vLLM and llama.cpp load `gemma3_text` as it is).
    """
    from transformers import AutoConfig
    from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES

    tree = read_object(folder / "config.json")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust.code, local_files_only=True)
    text = config.get_text_config()
    if text is config or text.model_type not in CONFIG_MAPPING_NAMES:
        return config, False
    for key in ("tie_word_embeddings", "quantization_config"):  # said of the model at large
        if key in tree and key not in text_config(tree):
            setattr(text, key, tree[key])
    return text, True


@contextmanager
def read_by_library(reference: str, problem: str = "could not be loaded") -> Iterator[None]:
    """Turn whatever other people's files make a library raise into DistillError (exit 7).

    Its loading bars and advice are silenced.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        yield
    except Exception as error:
        raise_device_error(error)
        what = f"{problem}: {one_line(error)}"
        raise DistillError(Exit.TRAINING, f"model {reference}", what, "check the model") from None


def _read(reference: str, folder: Path, trust: Trust, **options: Any) -> "PreTrainedModel":
    """Read a causal language model from its files, and nothing that is not in them."""
    from transformers import AutoModelForCausalLM

    check_files(folder, trust)
    if device().type == "cuda":
        from distill.models.grouped_attention import use_grouped_attention

        use_grouped_attention()
    with read_by_library(reference):
        config, composite = decoder_config(folder, trust)
        both: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            use_safetensors=None if trust.pickle else True,
            config=config,
            key_mapping=TEXT_PART if composite else None,
            trust_remote_code=trust.code,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are in the report, and are refused by it
            output_loading_info=True,
            **options,
        )
    model, report = both
    if composite:  # the towers for pictures and sound are left out, and the names are a model's own
        model._weight_conversions = None
        unexpected = filter(lambda name: not OTHER_PARTS.search(name), report["unexpected_keys"])
        report["unexpected_keys"] = set(unexpected)
    require_intact(f"model {reference}", report)
    return model


def load_tokenizer(
    reference: str,
    revision: str | None = None,
    trust: Trust = SAFE,
    template: Mapping[str, Any] | None = None,
    reasoning: Reasoning | None = None,
) -> "PreTrainedTokenizerBase":
    """Load and check a model's tokenizer; its `model_max_length` is the model's context length.

    `template` are variables of its chat template and `reasoning` the policy of who is trained, as
    `chat_template.fix_template` takes them.
    """
    from transformers import AutoTokenizer

    folder = fetch(reference, revision, weights=False)
    check_files(folder, trust._replace(pickle=True))
    with read_by_library(reference, "its tokenizer could not be loaded"):
        config = decoder_config(folder, trust)[0]
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust.code, local_files_only=True
        )
    where = f"tokenizer of {reference}"
    if not tokenizer.chat_template:
        raise DistillError(Exit.TRAINING, where, "has no chat template", "use an instruct model")
    if tokenizer.eos_token_id is None:
        fix = "set eos_token in its tokenizer_config.json"
        raise DistillError(Exit.TRAINING, where, "has no eos_token", fix)
    tokenizer.model_max_length = context_length(config)
    tokenizer.name_or_path = reference
    # A few have more ids than the model has rows (Gemma 3); a text that holds one is refused
    vars(tokenizer)["embeddings"] = config.get_text_config().vocab_size
    if template or reasoning:
        fix_template(tokenizer, template or {}, reasoning)
    return tokenizer


def student_tokenizer(student: "Student", reasoning: Reasoning) -> "PreTrainedTokenizerBase":
    """Load a student's tokenizer with the template of its run."""
    facts = (student.model, student.revision, student.trust)
    return load_tokenizer(*facts, student.chat_template_kwargs, reasoning)
