"""How far the merged model is from the adapter on its base, by the logits of the answers' tokens.

Needed for a run of an earlier distill, which evaluated the adapter and has no merged model: what a
user will load, the files read back, is compared with what was evaluated.
"""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from distill.errors import DistillError, Exit
from distill.formatting import share
from distill.models import loading
from distill.models.weights import add_adapter
from distill.records import Pair, Record
from distill.storage.files import read_records
from distill.storage.run_folder import Run
from distill.training.encode import encode_pairs

MAX_KL = 0.01  # nats a token: above it, the scores of one model are not the other's
MAX_TOKENS = 64  # of an answer, so that the logits of eight prompts fit in memory
COMPARED = 8  # prompts on which merged and adapter are compared


class Conversation(Record):
    """Token ids of a rendered prompt with its answer; `answer` is where the answer begins."""

    ids: tuple[int, ...]
    answer: int


class Fidelity(Record):
    """How far a model is from the one that was evaluated, over answer tokens of a few prompts."""

    prompts: int
    tokens: int
    largest_logit_difference: float
    mean_kl: float
    greedy_agreement: float

    @property
    def same(self) -> bool:
        """Tell whether the scores of one model may be given as the other's."""
        return self.mean_kl <= MAX_KL

    def line(self) -> str:
        """Return the comparison as one line for a reader."""
        return (
            f"{self.prompts} prompts, {self.tokens} tokens: "
            f"largest logit difference {self.largest_logit_difference:.3g}, "
            f"mean KL {self.mean_kl:.2g} nats a token, "
            f"greedy agreement {share(self.greedy_agreement, 1)}"
        )


def compare_with_adapter(run: Run, merged: Path, dtype: str | None) -> Fidelity:
    """Compare the merged model with the adapter on its base, in the type of the evaluation.

    On validation (else training) samples; held-out ones are evaluation's alone. One model is in
    memory at a time. Raises DistillError (exit 9) where there is nothing to compare on.
    """
    config, student = run.config, run.config.student
    folder, trust, dtype = run.path("dataset"), student.trust, dtype or student.dtype
    files = (folder / f"{split}.jsonl" for split in ("validation", "train"))
    pairs = [pair for file in files for pair in read_records(file, Pair)][:COMPARED]
    if not pairs:
        raise DistillError(Exit.PUBLISH, folder, "holds no pairs", "make the dataset")
    tokenizer = loading.load_tokenizer(
        *(student.model, student.revision, trust), student.chat_template_kwargs, config.reasoning
    )
    rows = [
        Conversation(ids=example.input_ids, answer=sum(w == 0 for w in example.weights))
        for example in encode_pairs(
            tokenizer, pairs, config.template_date, config.train.max_length, folder
        )
    ]
    base = loading.load_model(student.model, dtype, student.revision, trust)
    before = answer_logits(add_adapter(base, run.trained("adapter")), rows)
    del base
    gc.collect()
    model = loading.load_model(f"{merged.resolve()}", dtype, trust=trust._replace(pickle=False))
    return compare_models(before, answer_logits(model, rows))


@torch.inference_mode()
def answer_logits(model: Any, conversations: Sequence[Conversation]) -> list[Tensor]:
    """Return the float32 logits (T, V) that predict each answer's first tokens."""
    model.eval()
    rows = []
    for one in conversations:
        ids = torch.tensor([one.ids[: one.answer + MAX_TOKENS]], device=model.device)
        rows.append(model(input_ids=ids).logits[0, one.answer - 1 : -1].float().cpu())
    return rows


def compare_models(before: Sequence[Tensor], after: Sequence[Tensor]) -> Fidelity:
    """Compare the logits (T, V) of two models on the same prompts, the evaluated one first.

    KL is that of the first model's distribution from the second's.
    """
    kl = agreed = largest = 0.0
    for old_TV, new_TV in zip(before, after, strict=True):
        p_TV, q_TV = log_softmax(old_TV, -1), log_softmax(new_TV, -1)
        kl += float(kl_div(q_TV, p_TV, reduction="sum", log_target=True))
        agreed += float((old_TV.argmax(-1) == new_TV.argmax(-1)).sum())
        largest = max(largest, float((old_TV - new_TV).abs().max()))
    tokens = sum(len(rows) for rows in before)
    return Fidelity(
        prompts=len(before),
        tokens=tokens,
        largest_logit_difference=largest,
        mean_kl=max(kl / tokens, 0.0),
        greedy_agreement=agreed / tokens,
    )
