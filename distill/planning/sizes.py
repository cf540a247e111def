"""What a model's work takes, from its shape alone: weights, floating-point operations and bytes. Imports no torch.

Formulas count a multiplication and an addition as two operations, after Kaplan et al. 2020 (arXiv 2001.08361, section
2.1). With LoRA the frozen weights get no gradient: forward and backward to the inputs, 4 a weight, not 6.
"""

from distill.models.registry import Shape

HEAD_CHUNK = 3 * 32 * 2**20  # bytes: a chunk of float32 logits, its gradient and its bfloat16 copy
ALLOCATOR = 1.06  # what PyTorch's CUDA allocator holds above what is in use


def head_parameters(shape: Shape) -> int:
    """Return the weights of the output head."""
    return shape.vocab * shape.hidden


def body_parameters(shape: Shape) -> int:
    """Return the weights that every token passes: all but embedding and head."""
    return shape.parameters - head_parameters(shape) * (1 if shape.tied else 2)


def adapter_parameters(shape: Shape, r: int, targets: str | tuple[str, ...]) -> int:
    """Return the weights of a LoRA adapter of rank `r`; `targets` as in PEFT."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    hidden, inner = shape.hidden, shape.intermediate
    sizes = {  # in + out of each linear module of a layer
        "q_proj": hidden + queries,
        "k_proj": hidden + keys,
        "v_proj": hidden + keys,
        "o_proj": queries + hidden,
        "gate_proj": hidden + inner,
        "up_proj": hidden + inner,
        "down_proj": inner + hidden,
    }
    modules = sizes if targets == "all-linear" else [name for name in sizes if name in targets]
    head = shape.vocab + shape.hidden if "lm_head" in targets else 0
    return r * (shape.layers * sum(sizes[name] for name in modules) + head)


def attention_flops(shape: Shape, tokens: float) -> float:
    """Return the operations of causal attention over one text of `tokens`: scores and their sums."""
    return 2 * shape.layers * shape.heads * shape.head_dim * tokens**2


def answer_flops(shape: Shape, prompt: float, answer: float) -> float:
    """Return the operations of one answer, or of its loss: the head is applied to the tokens of the answer alone."""
    body = 2 * body_parameters(shape) * (prompt + answer)
    return body + 2 * head_parameters(shape) * answer + attention_flops(shape, prompt + answer)


def training_flops(
    shape: Shape, adapter: int, prompt: float, answer: float, checkpointing: bool
) -> float:
    """Return the operations of one sample of a LoRA step; the head sees supervised positions only."""
    tokens, passes = prompt + answer, 6 if checkpointing else 4
    body = (passes * body_parameters(shape) + 6 * adapter) * tokens
    attention = (3.5 + checkpointing) * attention_flops(shape, tokens)
    return body + 4 * head_parameters(shape) * answer + attention


def cache_bytes(shape: Shape, width: int = 2) -> int:
    """Return the bytes of keys and values, a token, of numbers of `width` bytes."""
    return 2 * width * shape.layers * shape.kv_heads * shape.head_dim


def training_bytes(
    shape: Shape,
    adapter: int,
    r: int,
    tokens: int,
    checkpointing: bool,
    four_bit: bool = False,
    width: int = 2,
) -> float:
    """Return the peak of a LoRA training with micro-batches of `tokens`, computed in numbers of `width` bytes.

    What a layer keeps for its backward: two float32 inputs of the norms; the inputs of attention and MLP; queries,
    keys, values and their sums; gate, its activation, up and their product; the inner activations of seven adapters.
    """
    weights = width * shape.parameters
    if four_bit:  # NF4 with its constants (arXiv 2305.14314) for the layers; embedding, head stay
        weights -= (width - 0.52) * body_parameters(shape)
    masters = adapter * (4 + 4 + 8)  # weights, gradients, Adam's two moments, all float32
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    inner = 2 * shape.hidden + 2 * queries + 2 * keys + 4 * shape.intermediate + 7 * r
    layer = 2 * 4 * shape.hidden + width * inner
    activations = layer * tokens * (1 if checkpointing else shape.layers)
    inputs = width * shape.hidden * tokens * (shape.layers if checkpointing else 1)
    backward = width * 3 * (shape.intermediate + shape.hidden) * tokens
    return ALLOCATOR * (weights + masters + activations + inputs + backward + HEAD_CHUNK)
