"""The merged model: adapter and base in one set of weights, added in float32 and cast once, then compared on prompts.

What is compared is what a user will load: the written files, read back, against the adapter that was evaluated.
"""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import kl_div, log_softmax

from distill.errors import DistillError, Exit
from distill.models.registry import check_base, digest_weights, fetch, load_model, pick_dtype
from distill.models.weights import add_adapter
from distill.records import Record
from distill.storage.files import read_json

MAX_KL = 0.01  # nats a token: above it, scores of the adapter are not the merged model's
MAX_TOKENS = (
    64  # answer tokens compared a prompt, so that the logits of eight prompts fit in memory
)


class Conversation(Record):
    """Token ids of a rendered prompt with its answer; `answer` is where the answer begins."""

    ids: tuple[int, ...]
    answer: int


class Fidelity(Record):
    """How far the merged model is from the evaluated adapter, over the answer tokens of a few prompts."""

    prompts: int
    tokens: int
    largest_logit_difference: float
    mean_kl: float
    greedy_agreement: float
    merged_sha256: str | None = None  # of the merged weights in the dtype of the evaluation

    @property
    def same(self) -> bool:
        """Tell whether the adapter's scores may be given as the merged model's."""
        return self.mean_kl <= MAX_KL

    def line(self) -> str:
        """Return the comparison as one line for a reader."""
        return (
            f"merged against adapter, {self.prompts} prompts, {self.tokens} tokens: "
            f"largest logit difference {self.largest_logit_difference:.3g}, "
            f"mean KL {self.mean_kl:.2g} nats a token, "
            f"greedy agreement {self.greedy_agreement:.1%}"
        )


def merge_and_compare(
    reference: str,
    revision: str | None,
    adapter: Path,
    target: Path,
    conversations: Sequence[Conversation],
    dtype: str = "auto",
    **loading: Any,
) -> Fidelity:
    """Write the merged model into `target` and compare it with base and adapter as they were evaluated.

    Its weights are hashed too, in the dtype of the evaluation: those that were evaluated have the same hash. `dtype` is that of the evaluation; `loading` are the flags of `load_model`. One model is in memory at a time.
    Raises DistillError: exit 7 where the adapter belongs to another base, 9 where there is nothing to compare on.
    """
    if not conversations:
        raise DistillError(Exit.PUBLISH, adapter, "no prompts to compare on", "make the dataset")
    check_base(adapter, reference, revision)
    base = load_model(reference, dtype, revision, **loading)
    before = answer_logits(add_adapter(base, adapter), conversations)
    del base
    gc.collect()
    merged = merge(reference, revision, adapter, target, dtype, **loading)
    after = answer_logits(load_model(f"{target.resolve()}", dtype), conversations)
    found = compare(before, after, len(conversations))
    return found.model_copy(update={"merged_sha256": merged})


def merge(
    reference: str,
    revision: str | None,
    adapter: Path,
    target: Path,
    dtype: str = "auto",
    **loading: Any,
) -> str:
    """Add the adapter to the base in float32, cast once to the base's own dtype, and write safetensors.

    Returns the hash of the sum in `dtype`.
    """
    base = load_model(reference, "float32", revision, **loading)
    stored = read_json(fetch(reference, revision) / "config.json")
    merged = add_adapter(base, adapter).merge_and_unload(safe_merge=True)
    found = digest_weights(merged, pick_dtype(dtype))
    name = stored.get("dtype") or stored.get("torch_dtype") or "float32"
    merged = merged.to(getattr(torch, name))
    merged.config.name_or_path = ""  # else the folder of this machine is written into the config
    vars(merged.config).pop("_model_name_or_path", None)  # a GGUF's own title, not a model's id
    merged.save_pretrained(target, max_shard_size="100GB")
    return found


@torch.inference_mode()
def answer_logits(model: Any, conversations: Sequence[Conversation]) -> list[torch.Tensor]:
    """Return, for each conversation, the float32 logits (T, V) that predict its answer's first tokens."""
    model.eval()
    found = []
    for row in conversations:
        ids = torch.tensor([row.ids[: row.answer + MAX_TOKENS]], device=model.device)
        logits = model(input_ids=ids).logits[0, row.answer - 1 : -1]
        found.append(logits.float().cpu())
    return found


def compare(before: list[torch.Tensor], after: list[torch.Tensor], prompts: int) -> Fidelity:
    """Compare logits token by token; KL is that of the adapter's distribution from the merged model's."""
    tokens = sum(len(rows) for rows in before)
    kl = agreed = largest = 0.0
    for old, new in zip(before, after, strict=True):
        p, q = log_softmax(old, -1), log_softmax(new, -1)
        kl += float(kl_div(q, p, reduction="sum", log_target=True))
        agreed += float((old.argmax(-1) == new.argmax(-1)).sum())
        largest = max(largest, float((old - new).abs().max()))
    return Fidelity(
        prompts=prompts,
        tokens=tokens,
        largest_logit_difference=largest,
        mean_kl=max(kl / tokens, 0.0),
        greedy_agreement=agreed / tokens,
    )
