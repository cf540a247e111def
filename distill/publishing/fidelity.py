"""How far two models are apart on the same prompts, by the logits of the answers' tokens.

What a user will load, the files read back, is compared with what was evaluated, where that was
another model.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from distill.formatting import share
from distill.records import Record

MAX_KL = 0.01  # nats a token: above it, the scores of one model are not the other's
MAX_TOKENS = 64  # of an answer, so that the logits of eight prompts fit in memory


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
    largest_margin: float = 0.0  # nats between the two top-1 tokens where an answer first differs

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

    KL is that of the first model's distribution from the second's. The margin is how much more
    probable the first model finds its own top-1 token than the second's, at the first token of a
    prompt where these differ: small where the two differ by rounding only.
    """
    kl = agreed = largest = margin = 0.0
    for old_TV, new_TV in zip(before, after, strict=True):
        p_TV, q_TV = log_softmax(old_TV, -1), log_softmax(new_TV, -1)
        kl += float(kl_div(q_TV, p_TV, reduction="sum", log_target=True))
        differs_T = old_TV.argmax(-1) != new_TV.argmax(-1)
        agreed += float((~differs_T).sum())
        largest = max(largest, float((old_TV - new_TV).abs().max()))
        if differs_T.any():
            first = int(differs_T.int().argmax())
            ours, theirs = int(old_TV[first].argmax()), int(new_TV[first].argmax())
            margin = max(margin, float(p_TV[first, ours] - p_TV[first, theirs]))
    tokens = sum(len(rows) for rows in before)
    return Fidelity(
        prompts=len(before),
        tokens=tokens,
        largest_logit_difference=largest,
        mean_kl=max(kl / tokens, 0.0),
        greedy_agreement=agreed / tokens,
        largest_margin=margin,
    )
