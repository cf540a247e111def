"""The model as the loss sees it: a packed batch goes in, the sum of its loss comes out.

The head is applied inside this module's forward, so that wrapping it (DDP, FSDP) covers all of it.
Where an architecture cannot take packed rows, batches are padded; a probe on the model decides.

Shape suffixes: N tokens of a row, S supervised positions, B samples, T longest sample, D hidden
size, V vocabulary, P parts of a loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from distill.errors import DistillError, Exit
from distill.models.arithmetic import READ_TOKENS
from distill.models.devices import raise_device_error, release_memory, send
from distill.training.attention import NAME, why_apart
from distill.training.batches import Example, Segment, micro_batches, pack, padded_batches
from distill.training.fused_layers import fuse
from distill.training.losses import Live, SoftTargets, cross_entropy, evaluate_targets, soft_loss

if TYPE_CHECKING:  # what learns needs torch and PEFT alone
    from transformers import PreTrainedTokenizerBase

    from distill.records import AnswerLoss, Pair
    from distill.training.soft_labels.labels import CachedLabels, LiveLabels

Passed = TypeVar("Passed")
PROBE = (range(7), range(3, 10)), range(7, 19)  # ids of the probe's samples; the first in two ways


@dataclass(frozen=True)
class Batch:
    """A row of samples: ids, positions and segments; where, what and how heavily to predict.

    Index `indices_S` of the row predicts `targets_S`, a token of the sample `owners_S`, or -1 where
    that has soft labels alone.
    """

    ids_N: Tensor
    positions_N: Tensor
    segments: tuple[Segment, ...]
    indices_S: Tensor
    targets_S: Tensor
    weights_S: Tensor
    owners_S: Tensor
    soft: SoftTargets | Live | None = None

    @classmethod
    def make(
        cls, examples: Sequence[Example], sharing: bool = False, device: torch.device | str = "cpu"
    ) -> "Batch":
        """Pack examples; of none at all, a process's idle turn, make a row that weighs nothing."""
        if not examples:
            zero = torch.zeros(1, dtype=torch.long, device=device)
            return cls(zero, zero, (Segment(0, 1),), zero, zero, zero.float(), zero)
        learned = [[i for i, w in enumerate(e.weights) if w and i] for e in examples]
        pairs = zip(learned, examples, strict=True)
        prompts = [answer[0] if answer else len(e.input_ids) for answer, e in pairs]
        row = pack([e.input_ids for e in examples], prompts, sharing)
        positions = [torch.arange(s.end - s.start) + s.position() for s in row.segments]
        tokens = [(n, i) for n in range(len(examples)) for i in learned[n]]
        # Token i of a sample is predicted at its token i - 1.
        columns = [(row.indices[n][i - 1], examples[n].target(i), n) for n, i in tokens]
        columns_S3 = send(torch.tensor(columns, dtype=torch.long).view(-1, 3), device)
        weights_S = torch.tensor([examples[n].weights[i] for n, i in tokens], dtype=torch.float32)
        ids_N, positions_N = torch.tensor(row.ids), torch.cat(positions)
        ids_N, positions_N, weights_S = (send(t, device) for t in (ids_N, positions_N, weights_S))
        indices_S, targets_S, owners_S = columns_S3.unbind(1)
        segments = tuple(row.segments)
        return cls(ids_N, positions_N, segments, indices_S, targets_S, weights_S, owners_S)


class StudentModel(nn.Module):
    """A causal language model whose forward is a batch's loss, by its tokens or soft labels too."""

    def __init__(self, model: Any, packing: bool = True) -> None:
        super().__init__()
        self.model, self.packing = model, packing
        self.labels: CachedLabels | LiveLabels | None = None
        self.attention = model.config._attn_implementation  # as loaded, before rows are packed
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._decoder, self._head = (base.get_decoder(),), (base.get_output_embeddings(),)
        config = base.config.get_text_config()  # Granite divides its logits, Cohere multiplies
        self.scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss summed over supervised tokens in nats; of labels (1 + P,), parts too.

        The parts stand in the order of the settings, before they are mixed.
        """
        head_VD, bias_V = self.head()
        inputs = (self.states(batch), head_VD, batch.targets_S, batch.weights_S)
        if self.labels is None or batch.soft is None:
            return cross_entropy(*inputs, bias_V)[0]
        loss = self.labels.settings
        numbers = (loss.beta, loss.alpha, loss.temperature)
        total, _, parts = soft_loss(*inputs, batch.soft, loss.parts, *numbers, bias_V)
        return torch.stack([total, *(parts[name] for name in loss.parts)])

    @property
    def device(self) -> torch.device:
        """Return where the head is."""
        return self._head[0].weight.device

    def decoder(self) -> Any:
        """Return the model without its head."""
        return self._decoder[0]

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Return the output head's weight (V, D) and its bias."""
        return self._head[0].weight, self._head[0].bias

    def states(self, batch: Batch) -> Tensor:
        """Return what the head is applied to at the batch's supervised positions, (S, D)."""
        return self.scaled(self.hidden(batch)[batch.indices_S])

    def scaled(self, hidden_ND: Tensor) -> Tensor:
        """Put the model's scale of its logits into hidden states, as the head is linear."""
        return hidden_ND if self.scale == 1.0 else hidden_ND * self.scale

    def hidden(self, batch: Batch) -> Tensor:
        """Return the last hidden states (N, D) of the batch's tokens, in their order."""
        if self.packing:
            ids_1N, positions_1N = batch.ids_N[None], batch.positions_N[None]
            row = {"input_ids": ids_1N, "position_ids": positions_1N, "segments": batch.segments}
            return self.decoder()(**row, use_cache=False).last_hidden_state[0]
        rows = [batch.ids_N[segment.start : segment.end] for segment in batch.segments]
        ids_BT = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        ones = [torch.ones_like(row) for row in rows]
        mask_BT = nn.utils.rnn.pad_sequence(ones, batch_first=True)
        states = self.decoder()(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
        # by indices of the host: a mask would wait for a GPU to say how many there are
        T = ids_BT.shape[1]
        indices_N = torch.cat([torch.arange(len(row)) + n * T for n, row in enumerate(rows)])
        return states.last_hidden_state.flatten(0, 1)[send(indices_N, ids_BT.device)]

    def deal(
        self, examples: Sequence[Example], samples: Sequence[int], limit: int, world: int = 1
    ) -> list[list[int]]:
        """Deal some of the examples into micro-batches of about `limit` tokens."""
        lengths = {i: len(examples[i].input_ids) for i in samples}
        if self.packing:
            return micro_batches(samples, lengths, limit, world)
        return padded_batches(samples, lengths, limit)

    def batch(self, examples: Sequence[Example]) -> Batch:
        """Pack examples as this student computes them: on a CPU prefixes are shared."""
        sharing = self.packing and self.device.type == "cpu"
        batch = Batch.make(examples, sharing, self.device)
        if self.labels is None:
            return batch
        soft = self.labels.targets([e.response_id for e in examples], self.device)
        return replace(batch, soft=soft)


@torch.no_grad()
def make_student(
    model: Any, packing: bool = True, fused: bool = False
) -> tuple[StudentModel, list[str]]:
    """Wrap `model`, packing where its architecture allows, with fused layers on request.

    Returns the student and notes for the user. Raises DistillError (exit 7) where the model's
    logits are not its head's output (a cap or a scale behind it).
    """
    plain, before = StudentModel(model, packing=False), model.config._attn_implementation
    decoder, training, size = plain.decoder(), model.training, len(PROBE[1])
    batch, other = (
        Batch.make(
            [Example("", "", tuple(ids), (0.0,) * len(ids)) for ids in (first, PROBE[1])],
            device=plain.device,
        )
        for first in PROBE[0]
    )

    def agrees(student: StudentModel) -> bool:
        """Tell whether packed rows have the states of padded ones, of each sample its own."""
        try:
            states_ND, other_ND = student.hidden(batch), student.hidden(other)
        except (TypeError, ValueError, RuntimeError) as error:
            raise_device_error(error)
            return False  # the model does not pass segments down, or has other attention
        return torch.equal(states_ND[-size:], other_ND[-size:]) and _close(states_ND, expected_ND)

    model.eval()
    try:
        expected_ND = plain.hidden(batch)
        logits = model(input_ids=batch.ids_N[None, :-size], use_cache=False).logits[0]
        states = plain.scaled(expected_ND[:-size])
        if not _close(nn.functional.linear(states, *plain.head()), logits):
            what = "caps its logits behind the head, which this loss does not know"
            where, fix = model.config.model_type, "use another student"
            raise DistillError(Exit.TRAINING, where, what, fix)
        if not packing:
            return plain, []
        model.set_attn_implementation(NAME)
        student = StudentModel(model)
        student.attention = before
        if fused and fuse(decoder):
            if agrees(student):
                return student, []
            for layer in decoder.layers:
                del layer.forward
        if agrees(student):
            return student, attention_notes(student.device, model)
        model.set_attn_implementation(before)
        return plain, [f"{model.config.model_type} cannot take packed rows: batches are padded"]
    finally:
        model.train(training)


def _close(states: Tensor, expected: Tensor) -> bool:
    """Tell whether results agree up to rounding: 30 layers in bfloat16 differ by some percent."""
    allowed = 1e-3 if expected.dtype == torch.float32 else 0.2
    return bool((states - expected).float().norm() <= allowed * expected.float().norm())


def attention_notes(device: torch.device, model: Any) -> list[str]:
    """Return a note where a GPU attends to the segments of a row one after the other."""
    if device.type == "cpu":
        return []
    config = model.config.get_text_config()
    heads, keys = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    why = why_apart(device, model.dtype, heads, keys or heads, size)
    return [f"attention takes a row's samples one by one, which is slower: {why}"] if why else []


@torch.inference_mode()
def answer_loss(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    pairs: "Sequence[Pair]",
    date: str,
    max_length: int,
) -> "list[AnswerLoss]":
    """Return each answer's loss given its prompt; (0, 0, 0) for one above `max_length` tokens."""
    from distill.records import AnswerLoss
    from distill.training.encode import encode_pair

    examples = [encode_pair(tokenizer, pair, date) for pair in pairs]
    lengths = [len(e.input_ids) for e in examples]
    fitting = [i for i, length in enumerate(lengths) if length <= max_length]
    results, before = dict[int, AnswerLoss](), model.config._attn_implementation

    def read(pass_tokens: int) -> None:
        remaining = [i for i in fitting if i not in results]
        for samples in micro_batches(remaining, lengths, pass_tokens):
            batch, (head_VD, bias_V) = student.batch([examples[i] for i in samples]), student.head()
            states_SD = student.states(batch)
            losses_S, hits_S = evaluate_targets(states_SD, head_VD, batch.targets_S, bias_V)
            values_S3 = torch.stack([losses_S, torch.ones_like(losses_S), hits_S.float()], 1)
            sums_B3 = torch.zeros(len(samples), 3, dtype=torch.float64)
            sums_B3.index_add_(0, batch.owners_S.cpu(), values_S3.double().cpu())  # in order
            for sample, (loss, tokens, hits) in zip(samples, sums_B3.tolist(), strict=True):
                results[sample] = AnswerLoss(loss=loss, tokens=int(tokens), hits=int(hits))

    try:
        student, _ = make_student(model)
        Passes("losses").attempt(read)
    finally:
        model.set_attn_implementation(before)
    unread = AnswerLoss(loss=0.0, tokens=0, hits=0)
    return [results.get(i, unread) for i in range(len(pairs))]


class Passes:
    """Passes that only read texts: shorter ones from where a GPU's memory does not suffice."""

    def __init__(self, what: str) -> None:
        self.what, self.tokens = what, READ_TOKENS

    def attempt(self, read: Callable[[int], Passed]) -> Passed:
        """Return what `read` makes of so many tokens a pass."""
        from distill.storage.progress import say

        while True:
            try:
                return read(self.tokens)
            except torch.OutOfMemoryError:
                if self.tokens < READ_TOKENS // 16:
                    raise
            self.tokens //= 4  # outside of the handler, which holds what is in memory
            release_memory()
            say(f"{self.what}: out of GPU memory: {self.tokens} tokens a pass from here on")
