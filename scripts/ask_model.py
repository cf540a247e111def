"""Answer conversations greedily with a library that people use, and no line of distill.

scripts/interop.py runs it by the Python of each runner's environment: a JSON object comes on
standard input, and the last line of output is `[version, [[ids of the prompt, answer], ...]]`.
"""

import json
import sys
from importlib.metadata import version
from typing import Any

job: dict[str, Any] = json.load(sys.stdin)
rows = list[Any]()


def by_transformers() -> str:
    """Ask transformers, or PEFT where an adapter is named; return the version."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    tokenizer: Any = AutoTokenizer.from_pretrained(job["release"])
    dtype, runner = getattr(torch, job["dtype"]), f"transformers {version('transformers')}"
    model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
    if job["adapter"]:
        import peft

        model = peft.PeftModel.from_pretrained(model, job["adapter"])
        runner = f"PEFT {peft.__version__}, {runner}"
    for turns in job["turns"]:
        asked = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        made = model.eval().generate(
            **asked, do_sample=False, repetition_penalty=1.0, max_new_tokens=job["tokens"]
        )
        ids, plain = asked["input_ids"][0].tolist(), {"clean_up_tokenization_spaces": False}
        rows.append((ids, tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True, **plain)))
    return runner


def by_lm_eval() -> str:
    """Ask lm-eval's model of transformers, with its own use of the chat template."""
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    kind: Any = HFLM
    model = kind(pretrained=job["model"], dtype=job["dtype"], device="cpu", batch_size=1)
    texts = [model.apply_chat_template(turns) for turns in job["turns"]]
    how = {"until": [], "max_gen_toks": job["tokens"], "do_sample": False}
    asked = [Instance("generate_until", {}, (text, how), k) for k, text in enumerate(texts)]
    answers = model.generate_until(asked, disable_tqdm=True)
    rows.extend(zip(map(model.tok_encode, texts), answers, strict=True))
    return f"lm-eval {version('lm_eval')}"


def by_mlx() -> str:
    """Ask mlx-lm."""
    import mlx.core as mx  # pyright: ignore[reportMissingImports]
    from mlx_lm import load, stream_generate  # pyright: ignore[reportMissingImports]

    model, tokenizer = load(job["model"])
    model.set_dtype(getattr(mx, job["dtype"]))
    for turns in job["turns"]:
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        made = stream_generate(model, tokenizer, ids, max_tokens=job["tokens"])
        rows.append((ids, tokenizer.decode([r.token for r in made], skip_special_tokens=True)))
    return f"mlx-lm {version('mlx-lm')}"


ask = {"lm-eval": by_lm_eval, "mlx": by_mlx}.get(job["runner"], by_transformers)
print(json.dumps([ask(), rows]))
