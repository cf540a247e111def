"""Tiny random models of the families that people train, as their configs are published.

Each has the parts that make its family what it is: windows, sinks, caps, multipliers, norms of
queries and keys, layers without positions, experts, linear attention. Composite ones are saved as
their makers save them, with a vision tower.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from tests.support.tiny import make_tokenizer

WINDOW = 8  # keys of a sliding window: shorter than the samples
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "image_size": 16}
PIXTRAL = {**VISION, "num_attention_heads": 2, "head_dim": 8, "patch_size": 8}
HALF_ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
LINEAR = {  # three of Qwen 3.5's layers in four
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8},
    **{"linear_value_head_dim": 8, "head_dim": 16, "num_hidden_layers": 4},
}
GEMMA = {
    **{"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16},
    "layer_types": ["sliding_attention", "full_attention"],
}
# What the configs on the Hub say, in our sizes: model_type, its own fields, and of a composite one
# its vision tower. Source: config.json of the models named.
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "llama3": ("llama", {"rope_parameters": {  # Llama-3.2-1B-Instruct
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}, None),
    "qwen2.5": ("qwen2", {}, None),  # Qwen2.5-0.5B-Instruct: biases of q, k and v
    "qwen3": ("qwen3", {"head_dim": 16}, None),  # Qwen3-0.6B: norms of queries and keys
    "qwen3.5": ("qwen3_5", LINEAR, {  # Qwen3.5-0.8B: linear attention, half rotary, gated
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 8,
        "out_hidden_size": 32, "num_position_embeddings": 16}),
    "gemma3-text": ("gemma3_text", GEMMA, None),  # gemma-3-1b-it
    "gemma3": ("gemma3", GEMMA, {  # gemma-3-4b-it
        **VISION, "num_attention_heads": 2, "patch_size": 8}),
    "mistral3": ("mistral3", {"model_type": "mistral", "head_dim": 8}, PIXTRAL),  # Small-3.1-24B
    "ministral3": ("mistral3", {  # Ministral-3-3B-Instruct-2512
        "model_type": "ministral3", "head_dim": 8}, PIXTRAL),
    "phi3": ("phi3", {"sliding_window": WINDOW}, None),  # Phi-3-mini: qkv in one, a window
    "phi4": ("phi3", {"rope_parameters": HALF_ROTARY}, None),  # Phi-4-mini
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}, None),  # SmolLM3-3B
    "granite": ("granite", {  # granite-3.3-2b-instruct
        "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.2,
        "logits_scaling": 8.0}, None),
    "olmo2": ("olmo2", {}, None),  # OLMo-2-0425-1B-Instruct: norms behind, and of q and k
    "gpt-oss": ("gpt_oss", {  # gpt-oss-20b: sinks, windows, experts
        "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW,
        "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": False, "rope_parameters": {
            "rope_type": "default", "rope_theta": 150000.0}}, None),
}  # fmt: skip


def make_family(folder: Path, family: str) -> Path:
    """Save a tiny model of a family, with a tokenizer without pad token, and return its folder."""
    kind, own, vision = FAMILIES[family]
    tokenizer = make_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    text = {**SIZES, "vocab_size": len(tokenizer) + 5, **ids, "pad_token_id": None, **own}
    model: Any
    torch.manual_seed(0)
    if vision is None:
        config = AutoConfig.for_model(kind, **text)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        tied = {"tie_word_embeddings": True}
        config = AutoConfig.for_model(kind, text_config=text, vision_config=vision, **tied)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # zeros and ones of a fresh model would hide what is forgotten
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "sinks" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif "embed_tokens" not in name:
                parameter.mul_(10)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_bytes())
    settings.pop("pad_token", None)
    path.write_text(json.dumps(settings))
    return folder
