"""The local responder: a transformers model on this machine answers planned batches.

Requests are sorted by length and divided into plans before anything is generated; a plan runs through a stream of slots
(see stream.py), or in padded batches where the architecture needs that. The same plan on the same machine gives the
same bytes. Generation starts from a neutral config: of the model's own, only the end tokens are used.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from distill.config import LocalTeacher
from distill.errors import DistillError, Exit
from distill.models.chat_template import (
    encode_prompt,
    encode_text,
    render,
    special_tokens,
    template_hash,
)
from distill.models.loading import (
    context_length,
    device,
    load_merged,
    load_model,
    load_tokenizer,
    pick_dtype,
)
from distill.models.registry import check_base, folder_facts, identity
from distill.records import Message, Stop, Usage, digest
from distill.responders.local.continuous_batching import Row, Stream, streaming
from distill.responders.local.packed_linear import free_memory
from distill.responders.local.padded_batches import answer_padded
from distill.responders.local.sampling import draw, likeliest, seeded
from distill.responders.responder import Circumstances, Plan, Raw, Request
from distill.storage.files import sha256_file

SLOTS = {"cpu": 64, "cuda": 128}
CACHE_SHARE = 0.4  # of the memory now free, for the cache of keys and values
PLAN_TOKENS = 49_152  # that a plan's answers may take at most: what a kill can cost


class LocalResponder:
    """Answers with a causal language model of transformers; `model` may be a function that loads it when needed."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        origin: str,
        date: str,
        max_batch_size: int | None = None,
        old_origin: str | None = None,
    ) -> None:
        self.tokenizer, self.model, self.origin, self.date = tokenizer, name, origin, date
        self.old_origin = old_origin  # by which an earlier distill stored answers of a folder
        self.max_batch_size, self._given = max_batch_size, model

    @classmethod
    def load(
        cls,
        reference: str,
        dtype: str = "auto",
        revision: str | None = None,
        date: str = "2026-01-01",
        max_batch_size: int | None = None,
        adapter: Path | None = None,
        allow_pickle: bool = False,
        trust_remote_code: bool = False,
    ) -> "LocalResponder":
        """Make the responder of a model by reference, with a PEFT adapter merged in where one is given.

        The weights are loaded at the first request; what names the origin is known without them.
        """
        tokenizer = load_tokenizer(reference, revision, trust_remote_code)
        facts = {"weights": identity(reference, revision), "dtype": str(pick_dtype(dtype))}
        if adapter:
            check_base(adapter, reference, revision)
            facts["adapter"] = sha256_file(adapter / "adapter_model.safetensors")
        facts["template"] = template_hash(tokenizer, date)
        more = folder_facts("weights", reference)
        origin, old_origin = digest({**facts, **more}), digest(facts) if more else None

        def weights_loaded() -> Any:
            if adapter is None:
                return load_model(reference, dtype, revision, allow_pickle, trust_remote_code)
            merged: Any = load_merged(
                reference,
                adapter,
                revision,
                allow_pickle=allow_pickle,
                trust_remote_code=trust_remote_code,
            )
            return merged.to(device=device(), dtype=pick_dtype(dtype))

        name = Path(reference).name
        return cls(weights_loaded, tokenizer, name, origin, date, max_batch_size, old_origin)

    @cached_property
    def network(self) -> Any:
        """Return the model, loaded now if it was not."""
        given: Any = self._given
        return given if isinstance(given, torch.nn.Module) else given()

    def load_weights(self) -> None:
        """Load the model now rather than at the first request."""
        assert self.network is not None

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Return the ids that end an answer: those that the model names, the tokenizer's, and the template's."""
        generation = getattr(self.network, "generation_config", None)
        named: list[Any] = [
            self.network.config.eos_token_id,
            getattr(generation, "eos_token_id", None),
            self.tokenizer.eos_token_id,
        ]
        flat = [i for n in named for i in (n if isinstance(n, list) else [n]) if i is not None]
        return frozenset(flat) | end_of_turn(self.tokenizer, self.date)

    def ask(self, requests: Sequence[Request]) -> Iterator[Raw]:
        """Yield one raw answer for each request, plan by plan."""
        for plan in self.plan(requests):
            yield from self.ask_plan(plan)

    def plan(self, requests: Sequence[Request]) -> list[Plan]:
        """Divide requests into plans of one sampling, the longest prompts first.

        Raises DistillError (exit 3) naming a prompt that leaves no room for its answer.
        """
        lengths = {request: len(self._encode(request)) for request in requests}
        ordered = sorted(
            lengths,
            key=lambda r: (r.sampling.to_line(), -lengths[r], r.key, r.sample),
        )
        plans: list[Plan] = []
        while ordered:
            first = ordered[0].sampling
            longest = lengths[ordered[0]] + first.max_new_tokens
            slots = self.max_batch_size or self._fitting_slots(longest)
            most = max(PLAN_TOKENS // first.max_new_tokens, slots)
            taken = [request for request in ordered[:most] if request.sampling == first]
            plans.append(Plan(requests=tuple(taken), slots=min(slots, len(taken))))
            ordered = ordered[len(taken) :]
        return plans

    def ask_plan(self, plan: Plan) -> Iterator[Raw]:
        """Yield the raw answers of one plan as they finish."""
        rows = [
            Row(index, self._encode(r), r.sampling.max_new_tokens)
            for index, r in enumerate(plan.requests)
        ]
        sampling = plan.requests[0].sampling
        generators = (
            [seeded(r.key, r.sample) for r in plan.requests] if sampling.temperature else []
        )

        def choose(logits_BV: torch.Tensor, live: Sequence[Row]) -> list[int]:
            if not sampling.temperature:
                return likeliest(logits_BV)
            own = [generators[row.index] for row in live]
            return draw(logits_BV, sampling.temperature, sampling.top_p, own)

        with streaming(self.network) as streams:
            answer = Stream if streams else answer_padded
            for row in answer(self.network, rows, plan.slots, self.stop_ids, choose):
                yield self._raw(plan.requests[row.index], row)

    def _encode(self, request: Request) -> list[int]:
        """Return the prompt's ids; raises DistillError (exit 3) where it is too long for its answer to fit."""
        ids = encode_prompt(self.tokenizer, request.messages, self.date)
        room, asked = context_length(self.network.config), request.sampling.max_new_tokens
        if len(ids) + asked > room:
            raise DistillError(
                Exit.INPUT,
                f"prompt {request.prompt_id} ({request.messages[-1].content[:40]!r})",
                f"{len(ids)} tokens and {asked} for the answer exceed the {room} that {self.model} sees",
                "make corpus.chunk.max_chars or max_new_tokens smaller",
            )
        return ids

    def _fitting_slots(self, capacity: int) -> int:
        """Return how many rows of `capacity` tokens the cache can hold, up to what keeps the device busy."""
        device, shape = self.network.device, self.network.config.get_text_config()
        heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
        size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
        row = 2 * shape.num_hidden_layers * heads * size * self.network.dtype.itemsize * capacity
        return max(1, min(SLOTS.get(device.type, 64), int(CACHE_SHARE * self._free()) // row))

    def _free(self) -> int:
        device = self.network.device
        return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()

    def _raw(self, request: Request, row: Row) -> Raw:
        ids = row.answer()
        stop: Stop = "end" if ids[-1] in self.stop_ids else "length"
        shown = ids[:-1] if stop == "end" else ids
        usage = Usage(input_tokens=row.prompt, output_tokens=len(ids), seconds=row.seconds)
        text = self.tokenizer.decode(
            shown, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        body = {"ids": ids, "text": text}
        return Raw(
            key=request.key,
            sample=request.sample,
            model=self.model,
            stop=stop,
            usage=usage,
            body=body,
        )


def make(teacher: LocalTeacher, circumstances: Circumstances) -> LocalResponder:
    """Make the responder of a model that runs here."""
    size, date = teacher.max_batch_size, circumstances.date
    return LocalResponder.load(teacher.model, teacher.dtype, teacher.revision, date, size)


def end_of_turn(tokenizer: Any, date: str) -> frozenset[int]:
    """Return the control token with which the chat template ends an answer, if there is one."""
    question = (Message(role="user", content="?"),)
    asked, whole = render(tokenizer, question, date), render(tokenizer, question, date, "!")
    control = set(special_tokens(tokenizer).values())
    rest = encode_text(tokenizer, whole[len(asked) :]) if whole.startswith(asked) else []
    return frozenset([token for token in rest if token in control][:1])
