"""Write a model folder as one GGUF file, for llama.cpp and what is built on it (Ollama, LM Studio).

Weights come from the folder's safetensors, one tensor in memory at a time, the vocabulary from its
`tokenizer.json`, both by the names of the `gguf` library. What llama.cpp computes otherwise than
transformers, and this module does not know how to say, is an error (exit 3) before anything is
written: llama.cpp's own converter reads the same folder.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gguf
import numpy as np
import torch
from gguf.lazy import LazyNumpyTensor
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from distill.errors import DistillError, Exit
from distill.storage.files import disk_errors

Quantisation = Literal["F16", "Q8_0"]
BY_HAND = "convert it with llama.cpp's convert_hf_to_gguf.py, which reads this folder"
SPACE = "\u2581"  # SentencePiece's mark of a space
BLOCK = 32  # values that Q8_0 stores with one scale
NO_WORD = -1e6  # the score of what is never made by merging
CASES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
CL100K = CASES + (
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's name of what cuts a text into words, by the pattern in tokenizer.json; "" is the
# pattern of GPT-2, which the ByteLevel step has built in.
CUTS = {
    (): "gpt-2",
    ("Digits",): "smollm",
    (CL100K % "",): "qwen2",
    (CL100K % "{1,3}",): "llama-bpe",
}


class Family(NamedTuple):
    """How llama.cpp's form of a family differs from that of transformers."""

    arch: gguf.MODEL_ARCH
    rotates_pairs: bool = False  # rows of q and k stand in pairs, not in halves
    norm_offset: float = 0.0  # what the family adds to a norm's weight when it computes
    windowed: bool = False  # llama.cpp knows its sliding window


FAMILIES = {
    "gemma3_text": Family(gguf.MODEL_ARCH.GEMMA3, norm_offset=1.0, windowed=True),
    "llama": Family(gguf.MODEL_ARCH.LLAMA, rotates_pairs=True),
    "mistral": Family(gguf.MODEL_ARCH.LLAMA, rotates_pairs=True),
    "phi3": Family(gguf.MODEL_ARCH.PHI3),
    "qwen2": Family(gguf.MODEL_ARCH.QWEN2),
    "qwen3": Family(gguf.MODEL_ARCH.QWEN3),
    "smollm3": Family(gguf.MODEL_ARCH.SMOLLM3, rotates_pairs=True),
}


def write_gguf(folder: Path, file: Path, quantisation: Quantisation, name: str) -> None:
    """Write the model of `folder` to `file`, its matrices as `quantisation`, the rest in float32.

    A matrix whose rows are no multiple of 32 stays in float16 in a Q8_0 file, as in llama.cpp's.
    Raises DistillError: exit 3 for a family, tokenizer or setting that this cannot express and for
    a weight beyond float16; 5 where the disk is full.
    """
    config = AutoConfig.from_pretrained(folder).get_text_config()
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise _unlike(folder, f"family {config.model_type}")
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[family.arch])
    writer.add_name(name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{quantisation}"])
    _add_shape(writer, config, family, folder)
    _add_vocabulary(writer, config, folder)
    theirs = gguf.get_tensor_name_map(family.arch, config.num_hidden_layers)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            names = list[str](weights.keys())
            shapes = {name: tuple[int, ...](weights.get_slice(name).get_shape()) for name in names}
        for name, shape in shapes.items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            their_name = theirs.get_name(name, (".weight", ".bias"))
            if their_name is None:
                raise _unlike(folder, f"tensor {name}")
            kind = gguf.GGMLQuantizationType[quantisation]
            if len(shape) == 1:
                kind = gguf.GGMLQuantizationType.F32
            elif quantisation == "Q8_0" and shape[-1] % BLOCK:
                kind = gguf.GGMLQuantizationType.F16
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            pairs = heads.get(name.split(".")[-2], 0) if family.rotates_pairs else 0
            offset = family.norm_offset if name.endswith("norm.weight") else 0.0
            meta = LazyNumpyTensor.meta_with_dtype_and_shape(np.float32, shape)
            read: Any = partial(_read, path, name, pairs, offset)
            values: Any = LazyNumpyTensor(meta=meta, func=read)  # read when it is written
            writer.add_tensor(their_name, gguf.quantize(values, kind), raw_dtype=kind)
    with disk_errors(file):
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _read(path: Path, name: str, pairs: int, offset: float) -> np.ndarray:
    """Return a tensor of the folder as llama.cpp has it, in float32; of `pairs` heads, if any."""
    with safe_open(path, framework="pt") as weights:
        tensor: Tensor = weights.get_tensor(name).float() + offset
    if pairs:  # of each head: halves (2, D / 2) become pairs (D / 2, 2)
        halves = tensor.reshape(pairs, 2, -1, *tensor.shape[1:])
        tensor = halves.transpose(1, 2).reshape(tensor.shape)
    if tensor.ndim > 1 and tensor.abs().max() > torch.finfo(torch.float16).max:
        raise DistillError(Exit.INPUT, name, "has a weight beyond float16", BY_HAND)
    return tensor.contiguous().numpy()


def _unlike(folder: Path, what: str) -> DistillError:
    """Return the error for a model that cannot be expressed."""
    return DistillError(Exit.INPUT, folder, f"{what}: not known to our GGUF converter", BY_HAND)


def _add_shape(
    writer: gguf.GGUFWriter, config: PretrainedConfig, family: Family, folder: Path
) -> None:
    """Write the sizes, positions and windows."""
    heads, hidden, layers = config.num_attention_heads, config.hidden_size, config.num_hidden_layers
    head = getattr(config, "head_dim", None) or hidden // heads
    rope = getattr(config, "rope_parameters", None) or {}
    local = rope.get("sliding_attention", {})
    rope = rope.get("full_attention", rope)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if local:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    everywhere = [int((layer + 1) % 4 != 0) for layer in range(layers)]
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, key, None):
            raise _unlike(folder, key)
    if config.model_type == "smollm3" and config.no_rope_layers != everywhere:
        raise _unlike(folder, "no_rope_layers")
    kinds = list(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    context = config.max_position_embeddings
    if family.windowed:
        sliding = [(layer + 1) % 6 != 0 for layer in range(layers)]
        if [kind == "sliding_attention" for kind in kinds] != sliding:
            raise _unlike(folder, "layer_types")
        writer.add_sliding_window(config.sliding_window)
    elif window and (not kinds or "sliding_attention" in kinds):
        context = min(context, window)  # llama.cpp sees all keys: up to here both are the same
    writer.add_context_length(context)
    if family.arch == gguf.MODEL_ARCH.PHI3:  # which asks for it, and does without it
        writer.add_sliding_window(0)
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "llama3":
        # by what Llama 3.1's rule divides each frequency: long waves by `factor`, short by nothing
        plain = rope["rope_theta"] ** (-torch.arange(0, head, 2, dtype=torch.float64) / head)
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        writer.add_tensor("rope_freqs.weight", (plain / scaled).float().numpy())
    elif kind != "default":
        raise _unlike(folder, f"rope_type {kind}")


def _add_vocabulary(writer: gguf.GGUFWriter, config: PretrainedConfig, folder: Path) -> None:
    """Write tokens, merges, special tokens and the chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not isinstance(tokenizer, TokenizersBackend):
        raise _unlike(folder, "a tokenizer without tokenizer.json")
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model, texts = described["model"], {i: text for text, i in tokenizer.get_vocab().items()}
    if model["type"] != "BPE":
        raise _unlike(folder, f"a tokenizer of type {model['type']}")
    pieces = bool(model["byte_fallback"])  # SentencePiece's form, else that of GPT-2
    added = {token["id"]: token for token in described["added_tokens"]}
    merges: list[list[str]] = model["merges"]
    tokens, kinds = list[str](), list[int]()
    for i in range(config.vocab_size):
        text, kind = texts.get(i, f"[PAD{i}]"), gguf.TokenType.NORMAL
        if i not in texts:
            kind = gguf.TokenType.UNUSED
        elif i in added and text == model.get("unk_token") and pieces:
            kind = gguf.TokenType.UNKNOWN
        elif i in added:
            special = added[i]["special"]
            kind = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
            text = text if special else text.replace(SPACE, " ")
        elif pieces and len(text) == 6 and text.startswith("<0x"):
            kind = gguf.TokenType.BYTE
        tokens.append(text)
        kinds.append(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if pieces:
        # llama.cpp joins the pair whose result has the best score: here, the first merge to make it
        ranks = {"".join(pair): rank for rank, pair in reversed([*enumerate(merges)])}
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([-float(ranks[t]) if t in ranks else NO_WORD for t in tokens])
        steps = json.dumps([described["normalizer"], described["pre_tokenizer"]])
        prefix = '"Prepend"' in steps or '"always"' in steps or '"first"' in steps
        writer.add_add_space_prefix(prefix)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_cut(described, folder))
        merges = merges or [[tokens[-1], tokens[-1]]]  # llama.cpp wants some; this makes no token
        writer.add_token_merges([" ".join(pair) for pair in merges])
    first = tokenizer("a").input_ids[0]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and first == tokenizer.bos_token_id)
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or ())
    for key, token in {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
        "unk": tokenizer.unk_token_id,
        "eot": next((end for end in ends if end != tokenizer.eos_token_id), None),
    }.items():
        if token is not None:
            getattr(writer, f"add_{key}_token_id")(token)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _cut(described: dict, folder: Path) -> str:
    """Return llama.cpp's name for how a tokenizer of GPT-2's kind cuts a text into words."""
    step = described["pre_tokenizer"]
    steps = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    cut = tuple(
        one["pattern"]["Regex"] if one["type"] == "Split" else one["type"]
        for one in steps
        if one["type"] != "ByteLevel"
    )
    if cut not in CUTS or described["normalizer"] not in (None, {"type": "NFC"}):
        raise _unlike(folder, "the tokenizer's way of cutting words")
    return CUTS[cut]
