"""A model's folder in the words of other runners: transformers 4.57, vLLM, llama.cpp, mlx-lm.

transformers 5 writes the tokenizer and the positions anew, in names that older readers do not know:
they fail, or quietly compute with a rotary base of 10,000. So the base's own files go into the
folder as they are, and config.json says the same in both spellings. What transformers 5 then reads
is looked at: the folder is what was trained.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.config.values import Trust
from distill.models.loading import decoder_config, load_tokenizer
from distill.models.registry import parts, read_object
from distill.storage.files import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

OTHERS = ("config.json", "generation_config.json")  # the model's own, as are code and index
CODE = (".py", ".index.json")
VARIED = "I've 12345 of 3.14, you'LL see\n\n  x = y**2\t été 你好 नमस्ते 🚀   {\"a\": [1, 22]}  end "
BESIDE_SCALING = ("rope_theta", "partial_rotary_factor")  # fields of their own before version 5


def write_tokenizer(tokenizer: "Tokenizer", base: Path, folder: Path, trust: Trust) -> None:
    """Write a tokenizer of `base` into a model's folder, by the base's files byte for byte.

    tokenizer_config.json differs from the base's where the chat template does, or where only
    transformers 5 reads it. Its files may be read as another tokenizer than was trained with:
    beside the part for text of a base, or without the class that transformers 5 has for a family.
    Then it is written as it is, without a class of its own if possible.
    """
    plain = load_tokenizer(f"{base.resolve()}", trust=trust)
    same, copied = plain.chat_template == tokenizer.chat_template, list[Path]()
    for form in ("of the base", "of no class", "of transformers 5"):
        tokenizer.save_pretrained(folder)
        for name in parts(f"{base.resolve()}") if form == "of the base" else ():
            template = name.endswith(".jinja") or name == "chat_template.json"
            if name not in OTHERS and not name.endswith(CODE) and (same or not template):
                copied.append(folder / name)
                copied[-1].parent.mkdir(exist_ok=True)
                shutil.copyfile(base / name, copied[-1])
        path = folder / "tokenizer_config.json"
        settings = read_object(path)
        if settings.get("tokenizer_class") == "TokenizersBackend" or form == "of no class":
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # as it was called before
            # which gives models `token_type_ids` too, unless it is told
            settings.setdefault("model_input_names", list(tokenizer.model_input_names))
        if isinstance(settings.get("extra_special_tokens"), list):
            settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
        if "chat_template" in settings and not same:
            settings["chat_template"] = tokenizer.chat_template
        if not trust.code:  # what was ignored here is not asked of who loads it next
            settings.pop("auto_map", None)
        if settings != read_object(path):
            write_json(path, settings)
        if _is_written(tokenizer, folder, trust):
            return
        for file in copied:
            file.unlink(missing_ok=True)


def _is_written(tokenizer: "Tokenizer", folder: Path, trust: Trust) -> bool:
    """Tell whether a folder has the tokenizer, and its tokenizer.json alone cuts texts as it does.

    transformers 5 has a class for some families that passes over what the file says (Qwen 2).
    """
    from tokenizers import Tokenizer as Plain

    def does(one: "Tokenizer") -> tuple[object, ...]:
        backend = getattr(one, "backend_tokenizer", None)
        how = backend.to_str() if backend else (type(one), one.get_vocab())
        return how, one.chat_template, one.special_tokens_map

    if does(load_tokenizer(f"{folder.resolve()}", trust=trust)) != does(tokenizer):
        return False
    backend, file = getattr(tokenizer, "backend_tokenizer", None), folder / "tokenizer.json"
    if backend is None or not file.is_file():
        return True
    both = (backend, Plain.from_file(f"{file}"))
    ours, alone = (one.encode(VARIED, add_special_tokens=False).ids for one in both)
    return ours == alone


def respell_config(folder: Path, trust: Trust) -> None:
    """Let config.json say in the older spelling too what transformers 5 has written.

    It stays as it is where transformers 5 would then read anything otherwise.
    """

    def reading() -> dict[str, Any]:
        tree = decoder_config(folder, trust)[0].to_dict()
        (tree.get("rope_parameters") or {}).pop("type", None)  # the older name of rope_type
        return {key: value for key, value in tree.items() if not key.startswith("_")}

    path = folder / "config.json"
    tree, before = read_object(path), reading()
    older: dict[str, Any] = {"torch_dtype": tree["dtype"]} if tree.get("dtype") else {}
    rope = tree.get("rope_parameters") or {}
    if local := rope.get("sliding_attention"):  # Gemma 3: one base a kind of layer
        older["rope_local_base_freq"] = local["rope_theta"]
        period = [*tree["layer_types"], "full_attention"].index("full_attention") + 1
        wide = [kind == "full_attention" for kind in tree["layer_types"]]
        if wide == [number % period == 0 for number in range(1, len(wide) + 1)]:
            older["sliding_window_pattern"] = period
    rope = rope.get("full_attention", rope)
    older |= {key: rope[key] for key in BESIDE_SCALING if rope.get(key) is not None}
    kind = rope.get("rope_type", "default")
    scaling = {key: value for key, value in rope.items() if key not in BESIDE_SCALING}
    if kind == "longrope" and tree.get("model_type") == "phi3":  # which wants just these
        scaling = {"type": kind, **{k: rope[k] for k in ("short_factor", "long_factor")}}
    if rope:  # said of the default as well: gpt-oss of version 4 has another where nothing is said
        older["rope_scaling"] = None if kind == "default" else scaling
    write_json(path, {**tree, **older})
    after = reading()
    if any(after.get(key) != value for key, value in before.items()):
        write_json(path, tree)
