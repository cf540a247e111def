"""Our GGUF files, opened by llama.cpp itself: it cuts texts into the same ids, and sees the same
next tokens, as transformers with the folder that they were made from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from distill.config.teachers import Engines
from distill.errors import DistillError
from distill.models.gguf_file import CL100K, write_gguf
from distill.responders.engines import EngineServer, require_engine
from tests.support import families
from tests.support.engines import python_of
from tests.support.tiny import SPECIAL, TEMPLATE

LICENSE = Path("LICENSE").read_text()  # a text that never changes
CORPUS = [LICENSE[n : n + 2500] for n in range(0, len(LICENSE), 2500)]
TEXTS = [
    *("Hello, world", " leading", "trailing ", "a  b   c", "tab\there", "line\n\nbreak\r\n end"),
    *("I've 12345 of 3.14, you'LL see", "{\"key\": [1, 22, 333]}", "x = y**2  # \u00e9t\u00e9"),
    *("\u4f60\u597d\u4e16\u754c", "\u0928\u092e\u0938\u094d\u0924\u0947"),
    *("\u05e9\u05dc\u05d5\u05dd", "\U0001f680 \U0001f999\U0001f999", "\u1000\u0301"),
    *("<0x0A>", "<|im_start|>user\nhi<|im_end|>\n", "", "0", "\n", "   "),
]  # fmt: skip
GLOBAL = ["sliding_attention"] * 5 + ["full_attention"]
SHAPES: dict[str, dict[str, Any]] = {  # as many layers as the family's pattern has
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
    "gemma3-text": {"num_hidden_layers": 6, "layer_types": GLOBAL},
    "phi3": {"sliding_window": 500},
}


def train(
    cut: Any, normalizer: Any = None, pieces: bool = False, ignore: bool = False
) -> Tokenizer:
    """Train a small vocabulary on the license: of bytes as GPT-2's, or of pieces."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=pieces, unk_token="<unk>" if pieces else None))
    steps = [cut] if cut else []
    if pieces:
        tokenizer.normalizer = normalizer
        special = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
        alphabet = list[str]()
        decoder = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(decoder)
    else:
        last = cut is None
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=last))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
        special, alphabet = SPECIAL, pre_tokenizers.ByteLevel.alphabet()
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tree = json.loads(tokenizer.to_str())
    tree["model"]["ignore_merges"] = ignore
    if pieces:  # what trains has no other way to say that a byte is no special token
        tree["added_tokens"] = [
            t for t in tree["added_tokens"] if not t["content"].startswith("<0x")
        ]
    return Tokenizer.from_str(json.dumps(tree))


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


SPACES = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "gpt-2": lambda: train(None),
    "digits": lambda: train(pre_tokenizers.Digits(individual_digits=True)),
    "qwen2": lambda: train(split(CL100K % "")),
    "llama3": lambda: train(split(CL100K % "{1,3}"), ignore=True),
    "llama2": lambda: train(None, SPACES, pieces=True),
    "gemma": lambda: train(None, normalizers.Replace(" ", "\u2581"), pieces=True),
}


def make(folder: Path, tokenizer: Tokenizer, family: str = "qwen2.5", **changes: Any) -> Path:
    """Save a tiny random model with a tokenizer of its own."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|im_start|>",
        pad_token="<|endoftext|>",
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    kind, own, _ = families.FAMILIES[family]
    sizes = {**families.SIZES, "hidden_size": 64, "intermediate_size": 96}
    ids = {"eos_token_id": fast.eos_token_id, "bos_token_id": fast.bos_token_id}
    text = {**sizes, **own, **ids, "vocab_size": len(fast) + 5, "pad_token_id": None, **changes}
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **text), dtype=torch.float32
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.mul_(20 if "embed_tokens" in name else 6)
    model.half().float().save_pretrained(folder)  # so that float16 in the file changes nothing
    fast.save_pretrained(folder)
    return folder


def opened(file: Path) -> EngineServer:
    python_of("llama.cpp")  # else the test is skipped
    command, options = require_engine("llama.cpp", Engines()), ["--threads", "1"]
    options += ["--cache-type", "f32"]
    return EngineServer("llama.cpp", command, file, "m", 1, 512, options)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_texts_are_cut_into_the_same_ids(kind: str, tmp_path: Path) -> None:
    family = {"llama2": "llama3", "gemma": "gemma3-text"}.get(kind, "qwen2.5")  # picks its class
    folder = make(tmp_path / "m", TOKENIZERS[kind](), family, **SHAPES.get(family, {}))
    write_gguf(folder, tmp_path / "m.gguf", "F16", "m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    server = opened(tmp_path / "m.gguf")
    try:
        for text in [*TEXTS, *(part for page in CORPUS for part in page.split("\n\n")[:40])]:
            theirs = server.post("/tokenize", content=text, add_special=True, parse_special=True)
            assert theirs.json()["tokens"] == tokenizer(text).input_ids, repr(text)
        messages = [{"role": "user", "content": "Why?"}]
        theirs = server.post("/apply-template", messages=messages).json()["prompt"]
        assert theirs == tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
    finally:
        server.close()


@pytest.mark.parametrize(
    "family", ["llama3", "qwen2.5", "qwen3", "gemma3-text", "phi3", "phi4", "smollm3"]
)
def test_the_next_tokens_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    kind = "gemma" if family == "gemma3-text" else "gpt-2"
    folder = make(tmp_path / "m", TOKENIZERS[kind](), family, **SHAPES.get(family, {}))
    write_gguf(folder, tmp_path / "m.gguf", "F16", "m")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    server, compared = opened(tmp_path / "m.gguf"), 0
    try:
        for text in [page[200:500] for page in CORPUS[:4]]:
            ids = tokenizer(text).input_ids[:90]
            with torch.inference_mode():
                ours = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            asked = {"prompt": ids, "max_tokens": 1, "logprobs": 10, "temperature": 0}
            reply = server.post("/v1/completions", **asked).json()
            listed = reply["choices"][0]["logprobs"]
            if listed is None:  # the likeliest token has no text
                continue
            top = listed["content"][0]["top_logprobs"]
            theirs = {one["id"]: one["logprob"] for one in top}
            assert max(abs(p - ours[i].item()) for i, p in theirs.items()) < 0.02
            assert ours.max() - ours.min() > 3  # the distribution says something
            compared += 1
        assert compared > 2
    finally:
        server.close()


def test_what_llama_cpp_computes_otherwise_is_refused(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["gpt-2"]()
    refused = {
        "granite": ("granite", {}),
        "layer_types": ("gemma3-text", {}),
        "no_rope_layers": ("smollm3", {}),
        "rope_type dynamic": ("qwen2.5", {"rope_parameters": {
            "rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    }  # fmt: skip
    for what, (family, changes) in refused.items():
        folder = make(tmp_path / family, tokenizer, family, **changes)
        with pytest.raises(DistillError, match=what):
            write_gguf(folder, tmp_path / "m.gguf", "F16", "m")
        assert not (tmp_path / "m.gguf").exists()
