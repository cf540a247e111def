"""The local responder: a transformers model on this machine answers planned batches.

Requests are divided into plans before anything is generated; the same plan on the same machine
gives the same bytes. Of the model's own generation config only the end tokens are used: no penalty,
no top-k. A sampled row has a generator of its own, so that it does not depend on what shares the
batch. Legend: B rows, K ids, V vocabulary.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.config.values import SAFE, Trust
from distill.errors import DistillError, Exit, one_line
from distill.models.arithmetic import LIMITS, fitting_rows, row_bytes
from distill.models.chat_template import (
    DATE,
    Reasoning,
    control_tokens,
    encode_prompt,
    encode_text,
    find_turn,
    template_hash,
)
from distill.models.devices import device, device_name, free_memory, pick_dtype, release_memory
from distill.models.loading import context_length, load_merged, load_model, load_tokenizer
from distill.models.registry import check_base, folder_facts, identity
from distill.reasoning import PAIRS, split_reasoning
from distill.records import Message, Stop, Usage, digest
from distill.responders.local.continuous_batching import (
    BatchRow,
    ContinuousBatch,
    answer_padded,
    continuous_attention,
)
from distill.responders.responder import Plan, Raw, Request
from distill.storage.files import sha256_file
from distill.storage.progress import say

MOST_TOO_LONG = 0.01  # of the prompts; more are a fault of the settings
PLAN_TOKENS = 49_152  # of a plan's answers, where that is more than its batches: what a kill costs
QUESTION = (Message(role="user", content="?"),)  # for looking at the chat template
TOP_IDS = 256  # sorted first for top-p; the whole vocabulary only where these do not suffice


class LocalResponder:
    """Answers with a causal language model; `model` may be a function that loads it when needed."""

    engine = "distill"

    def __init__(
        self,
        model: PreTrainedModel | Callable[[], PreTrainedModel],
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        origin: str,
        date: str,
        concurrency: int | None = None,
        old_origin: str | None = None,
    ) -> None:
        self.tokenizer, self.model, self.origin, self.date = tokenizer, name, origin, date
        self.concurrency, self._model = concurrency, model
        self.old_origin = old_origin  # by which an earlier distill stored the answers of a folder
        self.logprobs = False  # whether an answer's mean log-probability is recorded with it
        self.most_rows: int | None = None  # at once, after an out-of-memory
        self._padded = False  # whether it was said

    @classmethod
    def load(
        cls,
        reference: str,
        dtype: str = "auto",
        revision: str | None = None,
        date: str = DATE,
        concurrency: int | None = None,
        adapter: Path | None = None,
        trust: Trust = SAFE,
        template: Mapping[str, Any] | None = None,
        reasoning: Reasoning | None = None,
    ) -> "LocalResponder":
        """Make the responder of a model by reference, with a PEFT adapter merged in if any.

        The weights are loaded at the first request; what names the origin is known without them.
        """
        tokenizer = load_tokenizer(reference, revision, trust, template, reasoning)
        facts = {"weights": identity(reference, revision), "dtype": str(pick_dtype(dtype))}
        if adapter:
            check_base(adapter, reference, revision)
            facts["adapter"] = sha256_file(adapter / "adapter_model.safetensors")
        facts["template"] = template_hash(tokenizer, date)
        more = folder_facts("weights", reference)
        origin, old_origin = digest({**facts, **more}), digest(facts) if more else None

        def load_weights() -> PreTrainedModel:
            if adapter is None:
                return load_model(reference, dtype, revision, trust)
            merged: Any = load_merged(reference, adapter, pick_dtype(dtype), revision, trust)
            return merged.to(device())

        name = Path(reference).name
        return cls(load_weights, tokenizer, name, origin, date, concurrency, old_origin)

    @cached_property
    def network(self) -> PreTrainedModel:
        """Return the model, loaded now if it was not."""
        return self._model if isinstance(self._model, PreTrainedModel) else self._model()

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Return the ids that end an answer: the model's, the tokenizer's, and the template's."""
        generation = getattr(self.network, "generation_config", None)
        stops = set(end_of_turn(self.tokenizer, self.date))
        for stated in (self.network.config, generation, self.tokenizer):
            ids: Any = getattr(stated, "eos_token_id", None)
            stops |= {*(ids if isinstance(ids, list) else [ids])} - {None}
        return frozenset(stops)

    @cached_property
    def _opened(self) -> str:
        """Return the mark of the thought that the template's own prompt opens, or nothing."""
        turn = find_turn(self.tokenizer, QUESTION, self.date, thought=True)
        return "" if turn.opening else next((o for o, c in PAIRS if c in turn.closing), "")

    def ask(self, requests: Sequence[Request]) -> Iterator[Raw]:
        """Yield one raw answer for each request, plan by plan."""
        return (raw for plan in self.plan(requests) for raws in self.ask_plan(plan) for raw in raws)

    def plan(self, requests: Sequence[Request]) -> list[Plan]:
        """Divide requests into plans of one sampling, the longest prompts first.

        Prompts that leave no room for their answer are a plan of their own, which fails. Raises
        DistillError (exit 3) naming one where they are several, and more than one in a hundred.
        """
        lengths = {request: len(self._encode(request)) for request in requests}
        reasons = {request: self._too_long(request, tokens) for request, tokens in lengths.items()}
        excess = {request: what for request, what in reasons.items() if what}
        if excess:
            request, what = next(iter(excess.items()))
            where = f"prompt {request.prompt_id} ({request.messages[-1].content[:40]!r})"
            if len(excess) > max(1, MOST_TOO_LONG * len(requests)):
                fix = "make corpus.chunk.max_chars or max_new_tokens smaller"
                what = f"{what}, and so do {len(excess) - 1} more of {len(requests)}"
                raise DistillError(Exit.INPUT, where, what, fix)
            say(f"{len(excess)} of {len(requests)} prompts are too long: {where}: {what}")
        ordered = sorted(
            lengths.keys() - excess.keys(),
            key=lambda r: (r.sampling.model_dump_json(), -lengths[r], r.key, r.sample),
        )
        place = self.network.device
        plans = [Plan(requests=tuple(excess), slots=1)] if excess else []
        room, limits = free_memory(place), LIMITS[place.type]
        while ordered:
            sampling = ordered[0].sampling
            longest = lengths[ordered[0]] + sampling.max_new_tokens
            size = self.concurrency or fitting_rows(room, self._row_bytes(longest), place.type)
            most = max(PLAN_TOKENS // sampling.max_new_tokens, size * limits.batches)
            alike = [request for request in ordered[:most] if request.sampling == sampling]
            plans.append(Plan(requests=tuple(alike), slots=min(size, len(alike))))
            ordered = ordered[len(alike) :]
        return plans

    def fits(self, plan: Plan) -> bool:
        """Tell whether a plan that is recorded can be run so: by the settings, on a GPU by memory.

        Main memory is never asked: there an unfinished plan ends with the bytes that it began.
        """
        most, longest = self.concurrency or plan.slots, 1
        if self.network.device.type == "cuda":
            for request in plan.requests:
                tokens = len(self._encode(request))
                if not self._too_long(request, tokens):
                    longest = max(longest, tokens + request.sampling.max_new_tokens)
            most = min(most, free_memory(self.network.device) // self._row_bytes(longest))
        return plan.slots <= most

    def ask_plan(self, plan: Plan) -> Iterator[list[Raw]]:
        """Yield the raw answers of one plan, those together that finish together.

        Where a GPU's memory does not suffice, what is missing is asked in batches of half the rows,
        in all later plans too. Raises DistillError (exit 7) where not even one row fits.
        """
        assert self.network  # loaded: where the weights alone do not fit, fewer rows do not help
        missing, failed = {request.id: request for request in plan.requests}, list[Raw]()
        for request in plan.requests:
            if what := self._too_long(request, len(self._encode(request))):
                failed.append(Raw.failed(missing.pop(request.id), f"too long: {what}", self.model))
        if failed:
            yield failed
        while missing:
            size = min(plan.slots, self.most_rows or plan.slots)
            try:
                for raws in self._answers(list(missing.values()), size):
                    for raw in raws:
                        del missing[raw.id]
                    yield raws
            except torch.OutOfMemoryError as error:
                if size == 1:
                    what = f"out of GPU memory with one answer at a time: {one_line(error)}"
                    fix = "lower max_new_tokens, free the GPU, or take a smaller model"
                    raise DistillError(Exit.TRAINING, f"model {self.model}", what, fix) from None
                self.most_rows = size // 2
            else:
                return
            release_memory()  # outside of the handler, whose traceback holds the batch
            say(f"{self.model}: out of GPU memory with {size} rows at once, now {self.most_rows}")

    def _answers(self, requests: Sequence[Request], size: int) -> Iterator[list[Raw]]:
        """Yield the raw answers to requests of one sampling, with `size` rows at once."""
        sampling = requests[0].sampling
        rows = [
            BatchRow(index, self._encode(request), sampling.max_new_tokens)
            for index, request in enumerate(requests)
        ]
        generators = [seeded(r.key, r.sample) for r in requests] if sampling.temperature else []

        def choose(logits_BV: torch.Tensor, live: Sequence[BatchRow]) -> list[int]:
            if not sampling.temperature:  # on a CPU max is five times faster than argmax
                ids = logits_BV.max(dim=-1).indices.tolist()
            else:
                of_rows = [generators[row.index] for row in live]
                ids = sample_ids(logits_BV, sampling.temperature, sampling.top_p, of_rows)
            if self.logprobs:
                for row, logprob in zip(live, logprobs_of(logits_BV, ids), strict=True):
                    row.logprob += logprob
            return ids

        with continuous_attention(self.network) as fits:
            if not fits and not self._padded:
                say(f"{self.model}: answers in padded batches, slower: its attention is another")
                self._padded = True
            answer = ContinuousBatch if fits else answer_padded
            for finished in answer(self.network, rows, size, self.stop_ids, choose):
                yield [self._raw(requests[row.index], row) for row in finished]

    def _raw(self, request: Request, row: BatchRow) -> Raw:
        """Return a finished row as the answer to its request."""
        ids = row.answer()
        stop: Stop = "end" if ids[-1] in self.stop_ids else "length"
        text_ids = ids[:-1] if stop == "end" else ids
        plain, full = (
            str(self.tokenizer.decode(text_ids, skip, clean_up_tokenization_spaces=False))
            for skip in (True, False)
        )
        body: dict[str, object] = {"ids": ids, "text": plain}
        if self.logprobs:
            body["mean_logprob"] = row.logprob / len(ids)
        # What marks a thought may be a special token, or stand in the prompt
        if self._opened or full != plain:
            text, thought = split_reasoning(self._opened + full)
            if thought is not None:
                for name in self.tokenizer.all_special_tokens:
                    text = text.replace(name, "")
                body |= {"text": text, "reasoning": thought}
        usage = Usage(
            input_tokens=row.prompt,
            output_tokens=len(ids),
            seconds=row.seconds,
            device=device_name(self.network.device),
        )
        key, sample = request.key, request.sample
        return Raw(key=key, sample=sample, model=self.model, stop=stop, usage=usage, body=body)

    def _encode(self, request: Request) -> list[int]:
        return encode_prompt(self.tokenizer, request.messages, self.date)

    def _too_long(self, request: Request, tokens: int) -> str | None:
        """Return what to say of a prompt of so many tokens that leaves no room for its answer."""
        room, most = context_length(self.network.config), request.sampling.max_new_tokens
        if tokens + most <= room:
            return None
        return f"{tokens} tokens and {most} for the answer exceed the {room} that {self.model} sees"

    def _row_bytes(self, capacity: int) -> float:
        shape, width = self.network.config.get_text_config(), self.network.dtype.itemsize
        heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
        size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
        cache = 2 * shape.num_hidden_layers * heads * size * width
        return row_bytes(cache, shape.vocab_size, width, self.network.device.type, capacity)


def end_of_turn(tokenizer: PreTrainedTokenizerBase, date: str) -> frozenset[int]:
    """Return the control token with which the chat template ends an answer, if there is one."""
    turn = find_turn(tokenizer, QUESTION, date)
    control = set(control_tokens(tokenizer).ids.values())
    return frozenset([i for i in encode_text(tokenizer, turn.end) if i in control][:1])


def seeded(key: str, sample: int) -> torch.Generator:
    """Return the generator of one answer, seeded by its request's key and its sample index."""
    hashed = hashlib.sha256(f"{key} {sample}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(hashed[:8], "big") >> 1)


def logprobs_of(logits_BV: torch.Tensor, ids: Sequence[int]) -> list[float]:
    """Return the log-probability of an id a row, at temperature 1 and in float32."""
    ids_B1 = torch.tensor(ids, device=logits_BV.device)[:, None]
    # a few rows at once, whose copies stay in a processor's cache
    parts = zip(logits_BV.split(4), ids_B1.split(4), strict=True)
    logprobs = [rows.float().log_softmax(-1).gather(1, chosen)[:, 0] for rows, chosen in parts]
    return torch.cat(logprobs).tolist()


def sample_ids(
    logits_BV: torch.Tensor, temperature: float, top_p: float, generators: list[torch.Generator]
) -> list[int]:
    """Sample an id a row from softmax(logits / temperature) in its nucleus, arXiv 1904.09751."""

    def invert(weights_BK: torch.Tensor) -> torch.Tensor:
        """Return where each row's cumulated weights pass its share `uniform` of their sum."""
        cumulated_BK = weights_BK.double().cumsum(-1)
        index_B1 = torch.searchsorted(cumulated_BK, uniform_B1 * cumulated_BK[:, -1:], right=True)
        return index_B1[:, 0].clamp_(max=weights_BK.shape[1] - 1)

    probabilities_BV = torch.softmax(logits_BV.float() / temperature, dim=-1)
    uniform = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
    uniform_B1 = uniform.to(probabilities_BV.device)[:, None]
    if top_p == 1:
        return invert(probabilities_BV).tolist()
    top_BK = probabilities_BV.topk(min(TOP_IDS, probabilities_BV.shape[1]), dim=-1)
    values, ids = top_BK.values, top_BK.indices
    if bool((values.sum(-1) < top_p).any()):
        values, ids = probabilities_BV.sort(dim=-1, descending=True, stable=True)
    before = values.cumsum(-1) - values
    index_B = invert(values.masked_fill(before >= top_p, 0))
    return ids.gather(1, index_B[:, None])[:, 0].tolist()
