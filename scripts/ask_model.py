"""Answer conversations greedily with transformers, or with PEFT, and no line of distill.

scripts/interop.py runs it by the Python of each runner's environment: a JSON object comes on
standard input, and the last line of output is `[version, [[ids of the prompt, answer], ...]]`.
"""

import json
import sys
from typing import Any

import torch
import transformers

job = json.load(sys.stdin)
transformers.logging.set_verbosity_error()
version, kind = f"transformers {transformers.__version__}", transformers.AutoModelForCausalLM
tokenizer: Any = transformers.AutoTokenizer.from_pretrained(job["release"])
model: Any = kind.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"]))
if job["adapter"]:
    import peft

    model = peft.PeftModel.from_pretrained(model, job["adapter"])
    version = f"PEFT {peft.__version__}, {version}"
rows = list[Any]()
for turns in job["turns"]:
    asked = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    made = model.eval().generate(
        **asked, do_sample=False, repetition_penalty=1.0, max_new_tokens=job["tokens"]
    )
    ids, plain = asked["input_ids"][0].tolist(), {"clean_up_tokenization_spaces": False}
    rows.append((ids, tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True, **plain)))
print(json.dumps([version, rows]))
