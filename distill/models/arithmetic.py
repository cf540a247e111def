"""What a decoder takes by its shape: operations, and bytes of memory stage by stage.

Operations count a multiplication and an addition as two (Kaplan et al., arXiv 2001.08361). With
LoRA the frozen weights get no gradient: 4 a weight, not 6. Bytes are those of tensors alive at a
stage's peak; `width` is the bytes of a number of the type that is computed in.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from distill.models.registry import Shape

Parts = dict[str, float]  # bytes by what they are for
Towards = Literal["tokens", "cached", "live"]  # what a loss is measured against

MIB = 2**20
CONTEXT = 500 * MIB  # of a CUDA process beside its tensors: the context, kernels, libraries
ALLOCATOR = 0.06  # what PyTorch's CUDA allocator holds above what is in use
PREFILL_TOKENS = {"cpu": 512, "cuda": 4096}  # of joining prompts in one step
READ_TOKENS = 2048  # of a forward pass that only reads: capture, losses of an evaluation
MICRO_BATCH_TOKENS = 2560  # of a pass of training at least: a step of the default size is longer
LEAST = 512  # tokens of a micro-batch that is chosen by memory
USABLE = 0.9  # of a GPU's memory, for what is chosen by it
NF4 = 0.52  # bytes of a weight in 4 bits, with its constants (QLoRA, arXiv 2305.14314)
# Of attention on a CPU: queries at a time, for what lies above the diagonal is skipped block by
# block; blocks with up to so many keys save their probabilities, others recompute them
BLOCK, SAVED_KEYS = 128, 512
# Modules with one input, which are one product on a CPU, see `training.fused_layers`
JOINED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
# Bytes of logits, in the model's type, that exist at a time: the head is read twice a block, which
# is dear for blocks of few rows.
BLOCK_BYTES = {"cpu": 64 * MIB, "cuda": 256 * MIB}
# Bytes of float32 logits that become a loss at a time: on a CPU what its cache holds.
STRIP_BYTES = {"cpu": 4 * MIB, "cuda": 64 * MIB}
CAPTURE_BYTES = {"cpu": 32 * MIB, "cuda": 512 * MIB}  # of a capture's float32 logits
# Tensors of a strip's size that a loss has at its peak
STRIPS = {"tokens": 3, "cached": 3, "live": 10}


class BatchLimits(NamedTuple):
    """How much is computed together."""

    rows: int  # of a batch, which keep the device busy
    share: float  # of the free memory that they may take
    batches: int  # of a plan, whose last rows leave the others idle


LIMITS = {"cpu": BatchLimits(64, 0.4, 1), "cuda": BatchLimits(512, 0.8, 8)}


def linear_modules(model: "Shape") -> dict[str, tuple[int, int]]:
    """Return the inputs and outputs of each linear module of a layer."""
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    hidden, inner = model.hidden, model.intermediate
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }


def adapted(model: "Shape", targets: str | Sequence[str]) -> list[str]:
    """Return the linear modules of a layer that get an adapter; `targets` as in PEFT."""
    return [n for n in linear_modules(model) if targets == "all-linear" or n in targets]


def adapter_parameters(model: "Shape", r: int, targets: str | Sequence[str]) -> int:
    """Return the weights of a LoRA adapter of rank `r`; `targets` as in PEFT."""
    sizes = linear_modules(model)
    return r * model.layers * sum(sum(sizes[name]) for name in adapted(model, targets))


def attention_flops(model: "Shape", tokens: float) -> float:
    """Return the operations of causal attention over a text of `tokens`: scores and sums."""
    return 2 * model.layers * model.heads * model.head_dim * tokens**2


def answer_flops(model: "Shape", prompt: float, answer: float) -> float:
    """Return the operations of an answer, or of its loss: only its tokens pass the head."""
    body = 2 * model.body * (prompt + answer)
    return body + 2 * model.head * answer + attention_flops(model, prompt + answer)


def training_flops(
    model: "Shape", adapter: int, prompt: float, answer: float, checkpointing: bool
) -> float:
    """Return the operations of one sample of a LoRA step; the head sees the answer only."""
    tokens, passes = prompt + answer, 6 if checkpointing else 4
    body = (passes * model.body + 6 * adapter) * tokens
    attention = (3.5 + checkpointing) * attention_flops(model, tokens)
    return body + 4 * model.head * answer + attention


def weight_bytes(model: "Shape", width: int, four_bit: bool = False) -> float:
    """Return the bytes of the weights; in 4 bits are the layers, not embedding and head."""
    return width * model.parameters - (width - NF4) * model.body * four_bit


def cache_bytes(model: "Shape", width: int = 2) -> int:
    """Return the bytes of keys and values, a token."""
    return 2 * width * model.layers * model.kv_heads * model.head_dim


def logit_rows(budget: Mapping[str, int], width: int, vocabulary: int, kind: str) -> int:
    """Return the rows of logits, in numbers of `width` bytes, within a budget of bytes."""
    return max(1, budget["cpu" if kind == "cpu" else "cuda"] // (width * vocabulary))


def capture_bytes(
    vocabulary: int, width: int, kind: str, method: str = "nucleus", tempered: bool = False
) -> float:
    """Return what a capture's part of a pass takes at its peak, beside the hidden states.

    `tempered` tells whether the tail's mass is taken at other temperatures too.
    """
    beside = 8 if tempered else 4  # the part before's, by a temperature with their exponentials
    if method == "sampled":  # sums in float64, and on a GPU what is summed, cast to it
        beside = 16 if kind == "cuda" else 8
    rows = min(READ_TOKENS, logit_rows(CAPTURE_BYTES, 4, vocabulary, kind))
    return float(rows * vocabulary * (width + 4 + beside))


def loss_bytes(
    vocabulary: int, width: int, kind: str, towards: Towards = "tokens", positions: float = 1e9
) -> float:
    """Return what a loss takes at its peak beside the hidden states: a block, and its strips."""
    rows = min(positions, logit_rows(BLOCK_BYTES, width, vocabulary, kind))
    strips = STRIPS[towards] * 4 * min(rows, logit_rows(STRIP_BYTES, 4, vocabulary, kind))
    return vocabulary * (width * rows * (2 if towards == "live" else 1) + strips)


def row_bytes(cache: float, vocab: int, width: int, kind: str, tokens: float) -> float:
    """Return what an answer of `tokens`, its prompt included, takes while it is written.

    `cache` are the bytes of keys and values, a token. On a GPU stand beside the logits their
    softmax in float32, and it and its sums in float64.
    """
    return tokens * cache + (vocab * (width + 20) if kind == "cuda" else 0)


def fitting_rows(room: float, row: float, kind: str) -> int:
    """Return how many answers of `row` bytes are written at once in `room` bytes."""
    limits = LIMITS[kind]
    return max(1, min(limits.rows, int(limits.share * max(room, 0.0) // row)))


def layer_bytes(model: "Shape", width: int) -> int:
    """Return what a layer has at its peak for a token without a gradient."""
    return width * (3 * model.hidden + 3 * model.intermediate) + 4 * model.hidden


def answering_bytes(model: "Shape", width: int, kind: str, rows: int, tokens: float) -> Parts:
    """Return the parts of `rows` answers at once, each of at most `tokens` with its prompt."""
    # On a CPU bfloat16 weights stand in memory a second time, in the order of oneDNN.
    copies = 2 if kind == "cpu" and width == 2 else 1
    row = row_bytes(cache_bytes(model, width), model.vocab, width, kind, tokens)
    prompts = min(PREFILL_TOKENS[kind], rows * tokens)
    parts = {"weights": copies * weight_bytes(model, width), "KV cache": rows * row}
    return _with_context(parts | {"activations": prompts * layer_bytes(model, width)}, kind)


def reading_bytes(model: "Shape", width: int, kind: str, logits: float | None = None) -> Parts:
    """Return the parts of reading texts: the losses of an evaluation, or a capture's `logits`."""
    if logits is None:
        logits = loss_bytes(model.vocab, width, kind, "tokens", READ_TOKENS)
    activations = READ_TOKENS * layer_bytes(model, width)
    parts = {"weights": weight_bytes(model, width), "activations": activations, "logits": logits}
    return _with_context(parts, kind)


def merging_bytes(model: "Shape", width: int, adapter: int) -> Parts:
    """Return the parts of adding an adapter to its base, in main memory.

    Weight by weight: one in float32, its product with the adapter, and their sum.
    """
    largest = max(i * o for i, o in linear_modules(model).values())
    weights = weight_bytes(model, width)
    return {"weights": weights, "adapter": 4.0 * adapter, "one weight": 12.0 * largest}


def _with_context(parts: Parts, kind: str) -> Parts:
    """Return the parts with what a CUDA process takes beside its tensors."""
    return parts | {"CUDA": CONTEXT + ALLOCATOR * sum(parts.values())} if kind == "cuda" else parts


class LoraTraining(NamedTuple):
    """What a LoRA training computes; `length` is a sample's, `teacher` the bytes of a live one.

    The weights are in so many `shards`, each on a GPU of its own, and layers gathered in turn.
    """

    model: "Shape"
    r: int
    targets: str | Sequence[str] = "all-linear"
    kind: str = "cuda"
    width: int = 2
    four_bit: bool = False
    checkpointing: bool = False
    towards: Towards = "tokens"
    teacher: float = 0.0
    length: float = 512.0
    dropout: float = 0.0
    shards: int = 1

    def parts(self, tokens: float) -> Parts:
        """Return the parts of a micro-batch of `tokens` at its peak, which the backward begins."""
        model, width, cpu = self.model, self.width, self.kind == "cpu"
        queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
        hidden, inner, names = model.hidden, model.intermediate, adapted(model, self.targets)
        adapter = adapter_parameters(model, self.r, self.targets)
        # Weights, gradients and Adam's two moments in float32, and on a CPU the best so far
        state = adapter * (4 + 4 + 8 + 4 * cpu)
        ranks, fused = self.r * len(names), cpu and not self.dropout
        if fused:
            copies = 0  # of each product [W | sB] the columns beside W, and A below each other
            for group in JOINED:
                sizes = [linear_modules(model)[name] for name in group]
                columns = self.r * sum(name in names for name in group)
                copies += model.layers * columns * (sum(out for _, out in sizes) + sizes[0][0])
            # what `_Attend` and `_Feed` of `training.fused_layers` save for their backward
            layer = width * (4 * hidden + 3 * queries + 3 * keys + 3 * inner + ranks)
            backward = width * (4 * inner + 2 * hidden)
        else:
            copies = adapter
            # two float32 inputs of norms; the inputs of attention and MLP; queries, keys, values
            # and their sums; gate, its activation, up and their product; the adapters' inner ones
            layer = 8 * hidden
            layer += width * (2 * hidden + 2 * queries + 2 * keys + 4 * inner + ranks)
            backward = width * 3 * (inner + hidden)
        if self.dropout:  # of each adapted module its own input and mask, not the shared one
            sizes, mask = linear_modules(model), width if cpu else 1
            layer += sum((width + mask) * sizes[name][0] for name in names)
            groups = [group for group in JOINED if not set(names).isdisjoint(group)]
            # attention keeps its sums, the input of `o_proj`, for itself
            layer -= width * sum(sizes[g[0]][0] for g in groups if g != ("o_proj",))
        if cpu and self.length <= SAVED_KEYS:
            layer += width * model.heads * (self.length + BLOCK) / 2
        saved = model.layers * layer
        if self.checkpointing:  # of each layer its input, and one is made again at a time
            saved, backward = model.layers * width * hidden, layer + backward
        ends = (4 + 2 * width) * hidden  # the last norm's input, its output, and their gradient
        loss = loss_bytes(model.vocab, width, self.kind, self.towards, tokens)
        weights = weight_bytes(model, width, self.four_bit)
        if self.shards > 1:  # embedding and head are gathered for all of a pass, and two layers
            gathered = model.parameters - model.body * (1 - 2 / model.layers)
            weights = min(weights, weights / self.shards + width * gathered)
        parts = {
            "weights": weights,
            "adapter and optimizer": float(state / self.shards + width * copies),
            "activations": tokens * (saved + ends),
            "loss and backward": max(loss, tokens * backward),
        }
        if self.teacher:
            parts["live teacher"] = self.teacher
        return _with_context(parts, self.kind)

    def micro_batch(self, memory: float, tokens_per_step: int) -> int:
        """Return the tokens of a micro-batch: on a GPU what a step has, as far as they fit."""
        if self.kind == "cpu":
            return MICRO_BATCH_TOKENS
        tokens = max(MICRO_BATCH_TOKENS, tokens_per_step * 5 // 4)  # steps are of complete samples
        while tokens > LEAST and sum(self.parts(tokens).values()) > USABLE * memory:
            tokens //= 2
        return max(LEAST, tokens)
