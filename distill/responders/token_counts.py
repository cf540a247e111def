"""Counts tokens with the teacher's own tokenizer, where the cache has it; nothing is downloaded."""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from distill.models import download, registry
from distill.records import Response
from distill.responders.responder import Request

PIECE = re.compile(r"\S{1,16}")  # a token at least
REPEATED = re.compile(r"(\S)\1{3,}")  # one token may be a long line


@cache
def token_counter(model: str) -> Callable[[str], int] | None:
    """Return what counts a text's tokens as `model` does; None without its tokenizer here."""
    rows = [row for row in registry.table().values() if model in (row.name, row.hub_id)]
    folders = [download.converted_folder(row.name, row.gguf) for row in rows if row.gguf]
    local = registry.is_folder(model)
    paths = [folder / "tokenizer.json" for folder in ([Path(model)] if local else folders)]
    if not local:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        with suppress(HFValidationError):  # what a server calls a model need be no name of the Hub
            cached = try_to_load_from_cache(registry.hub_id(model) or model, "tokenizer.json")
            paths += [Path(cached)] if isinstance(cached, str) else []
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def least_tokens(request: Request, model: str) -> int:
    """Return how many tokens a server reads of a request at least, to notice one that cuts it.

    A tenth less than the tokenizer of `model` counts; without it, one a word, or 16 characters.
    """
    texts = [message.content for message in request.messages if message.role != "assistant"]
    if count := token_counter(model):
        return sum(count(text) for text in texts) * 9 // 10
    return sum(len(PIECE.findall(REPEATED.sub(r"\1", text))) for text in texts) * 19 // 20


def recounted(
    responses: Sequence[Response], requests: Sequence[Request], model: str
) -> list[Response]:
    """Return the responses with estimated usage counted by the tokenizer of `model`, if it is here.

    It stays marked as estimated: the account of what was paid does not use it.
    """
    counted = list[Response]()
    for response, request in zip(responses, requests, strict=True):
        if response.usage.estimated and (count := token_counter(model)):
            tokens = {
                "input_tokens": sum(count(message.content) for message in request.messages),
                "output_tokens": count((response.reasoning or "") + response.text),
            }
            usage = response.usage.model_copy(update=tokens)
            response = response.model_copy(update={"usage": usage})
        counted.append(response)
    return counted
