"""A model whose answers another engine computes: vLLM or llama.cpp, started at the first request.

A prompt goes to the engine as token ids, rendered and encoded as our own engine does it: so
template, dates and control tokens in a corpus are the same whoever answers.
"""

import os
import secrets
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.config.teachers import Engine, Engines, LocalTeacher
from distill.config.values import SAFE, Trust
from distill.errors import DistillError
from distill.models.chat_template import encode_prompt, template_hash
from distill.models.devices import pick_dtype
from distill.models.download import cache_folder
from distill.models.gguf_file import write_gguf
from distill.models.loading import context_length, decoder_config, load_model, load_tokenizer
from distill.models.registry import fetch, folder_facts, identity
from distill.records import digest
from distill.responders.engines import (
    UNCUT,
    EngineServer,
    context_for,
    engine_version,
    require_engine,
    settled,
)
from distill.responders.local.local_model import LocalResponder, end_of_turn
from distill.responders.responder import Encoded, Raw, Request
from distill.storage.progress import say

CONCURRENCY = 16  # where the config says none


class EngineResponder:
    """Answers with a model that an engine serves, `concurrency` requests at once.

    llama.cpp serves it as a GGUF in float16, which is kept in the cache unless `passing`.
    """

    def __init__(
        self,
        engine: Engine,
        engines: Engines,
        reference: str,
        revision: str | None,
        dtype: str,
        tokenizer: PreTrainedTokenizerBase,
        date: str,
        concurrency: int | None = None,
        name: str | None = None,
        passing: bool = False,
        trust: Trust = SAFE,
    ) -> None:
        self.engine: Engine = engine
        self.tokenizer, self.date, self.passing = tokenizer, date, passing
        self.concurrency = concurrency or CONCURRENCY
        self.fresh = False  # whether llama.cpp reads a prompt anew that it has just read
        self.command = require_engine(engine, engines)
        self.version = engine_version(tuple(self.command))
        self.model = name or Path(reference).name
        self.dtype = "f16" if engine == "llama.cpp" else f"{pick_dtype(dtype)}"[len("torch.") :]
        self.origin = digest(
            {
                "engine": engine,
                "weights": identity(reference, revision),
                "dtype": self.dtype,
                "template": template_hash(tokenizer, date),
                **folder_facts("weights", reference),
            }
        )
        self.folder = fetch(reference, revision, trust)
        self.gguf = cache_folder() / "gguf" / f"{self.origin[:24]}-F16.gguf"
        self.most = context_length(decoder_config(self.folder, trust)[0])
        self._load = partial(load_model, reference, dtype, revision, trust)
        self.server: EngineServer | None = None
        self.context = self.rows = 0  # of the server

    @cached_property
    def network(self) -> PreTrainedModel:
        """Return the model, loaded here: for what is read from its weights, not for answers."""
        return self._load()

    def ask(self, requests: Sequence[Request]) -> Iterator[Raw]:
        """Yield one raw answer for each request as it comes; one that is too long fails.

        Raises DistillError (exit 4) with the end of its log where the engine fails: what it had
        answered before is kept by whoever asks.
        """
        prompts, longest = list[Encoded](), 0
        for request in requests:
            ids = tuple(encode_prompt(self.tokenizer, request.messages, self.date))
            length = len(ids) + request.sampling.max_new_tokens
            if length > self.most:
                what = f"too long: {length:,} tokens of prompt and answer, of {self.most:,}"
                yield Raw.failed(request, what, self.model)
            else:
                prompts.append(Encoded(**request.model_dump(), ids=ids))
                longest = max(longest, length)
        if not prompts:
            return
        server = self.serve(context_for(longest, self.most))
        fields = self.sampled_from_all()
        responder = server.responder(self.model, self.concurrency, fields, "completions")
        try:
            for raw in responder.ask(prompts):
                if raw.error and "sha256" not in raw.body:
                    raise server.failure(f"does not answer: {raw.error}")
                model = f"{self.model} ({self.engine} {self.version})"
                yield raw.model_copy(update={"model": model})
        except DistillError as error:
            if server.process.poll() is None:
                raise
            raise server.failure(f"ended while it answered: {error.what}") from None

    def sampled_from_all(self) -> dict[str, object]:
        """Return the fields that turn off what an engine cuts from a distribution by itself, and
        the use of prompts that it has read at another time."""
        if self.engine == "llama.cpp":
            return {**UNCUT, "cache_prompt": not self.fresh}
        ends = sorted(end_of_turn(self.tokenizer, self.date))
        return {"stop_token_ids": ends, "cache_salt": secrets.token_hex(8)}

    def serve(self, context: int) -> EngineServer:
        """Return the engine, started or started anew where its context is too short."""
        enough = self.context >= context and self.rows >= self.concurrency
        if self.server and self.server.process.poll() is None and enough:
            return self.server
        if self.server:
            self.server.close()
        self.context, self.rows, options = context, self.concurrency, list[str]()
        if self.engine == "vllm":
            options = ["--dtype", self.dtype]
            if (gpus := torch.cuda.device_count()) > 1:  # a copy of the model on each
                options += ["--data-parallel-size", f"{gpus}"]
        elif not self.gguf.is_file():
            self.write_gguf()
        model = self.folder if self.engine == "vllm" else self.gguf
        named = (self.engine, self.command, model, self.model)
        self.server = EngineServer(*named, self.rows, context, options)
        return self.server

    def write_gguf(self) -> None:
        """Write the model as a GGUF in float16."""
        say(f"{self.model}: converting to GGUF (once)")
        self.gguf.parent.mkdir(parents=True, exist_ok=True)
        work = self.gguf.with_name(f".{self.gguf.name}.{os.getpid()}")
        try:
            write_gguf(self.folder, work, "F16", self.model)
            work.rename(self.gguf)
        finally:
            work.unlink(missing_ok=True)

    def close(self) -> None:
        """End the engine, if it was started."""
        if self.server:
            self.server.close()
        self.server = None
        if self.passing:
            self.gguf.unlink(missing_ok=True)


def make_local(
    teacher: LocalTeacher, engines: Engines, date: str
) -> LocalResponder | EngineResponder:
    """Make the responder of a model that runs here, in our own engine or another."""
    reference, template = (teacher.model, teacher.revision), teacher.chat_template_kwargs
    engine, size = settled(teacher.engine, engines), teacher.concurrency
    if engine == "distill":
        model = (teacher.model, teacher.dtype, teacher.revision)
        return LocalResponder.load(*model, date, size, template=template)
    tokenizer = load_tokenizer(*reference, template=template)
    return EngineResponder(engine, engines, *reference, teacher.dtype, tokenizer, date, size)
