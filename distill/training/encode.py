"""From an answer to token ids and loss weights, and the first batch shown as the model will see it.

The ids are those of the rendered prompt, of the answer, and of the template's own end token, which
is supervised too (not of an answer that its length limit cut off). Weights come from lengths, never
from token ids: pad may equal the end token.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from distill.errors import DistillError, Exit
from distill.models.chat_template import (
    cut_marks,
    encode_marked,
    encode_prompt,
    find_turn,
    folds_system,
    unused_mark,
)
from distill.reasoning import join_thought, split_thought
from distill.records import Message, Pair, Prompt, Response, digest
from distill.storage.files import read_records
from distill.storage.progress import console, say
from distill.storage.run_folder import Run
from distill.training.batches import Example

SPLITS = ("train", "validation")  # of a dataset, which training reads
SHOWN_CHARS = 1200  # of a sample's text on the screen


def encode_pair(tokenizer: PreTrainedTokenizerBase, pair: Pair, date: str) -> Example:
    """Tokenise one pair; raises DistillError (exit 7) for a template that training cannot use.

    A thought before the answer, as the filters keep one, is written as the template writes one.
    """
    messages, response = pair.prompt.messages, pair.response
    cut_off = response.stop == "length"
    thought, answer = split_thought(response.text, response.reasoning)
    texts = [*(message.content for message in messages), response.text]
    mark = unused_mark(texts)
    turn = find_turn(tokenizer, messages, date, thought is not None, mark)
    text = turn.opening + cut_marks(thought or "", tokenizer, mark)
    if answer or not cut_off:  # else it was cut off in its thought
        text += turn.closing + cut_marks(answer, tokenizer, mark)
    text += "" if cut_off else turn.end
    answer_ids = encode_marked(tokenizer, text, mark)
    if text.startswith(" "):  # of which a tokenizer of pieces takes the first for its own prefix
        decoded = f"{tokenizer.decode(answer_ids, clean_up_tokenization_spaces=False)}"
        if len(decoded) - len(decoded.lstrip(" ")) < len(text) - len(text.lstrip(" ")):
            answer_ids = encode_marked(tokenizer, f" {text}", mark)
    if not cut_off and not turn.end:
        assert isinstance(tokenizer.eos_token_id, int), "`load_tokenizer` requires one"
        answer_ids.append(tokenizer.eos_token_id)
    if not answer_ids:
        where, fix = f"sample {response.id}", "filter empty answers"
        raise DistillError(Exit.TRAINING, where, "no token to learn", fix)
    prompt_ids = encode_prompt(tokenizer, messages, date)
    ids = (*prompt_ids, *answer_ids)
    weights = (0.0,) * len(prompt_ids) + (1.0,) * len(answer_ids)
    identity = digest({"ids": ids, "weights": weights})
    return Example(identity, response.id, ids, weights, pair.only_signals)


def check_template(
    tokenizer: PreTrainedTokenizerBase,
    date: str,
    conversations: Iterable[Sequence[Message]] = (),
    thought: bool = False,
) -> list[str]:
    """Look whether a template can train and be asked, and return what a reader should know of it.

    For before the first purchase, with the run's tokenizer: one short question, and of
    `conversations` one of each order of roles; with `thought`, answers with one too. Raises
    DistillError (exit 7) naming a template that refuses one, loses an answer, or writes it
    elsewhere than where inference begins.
    """
    question = (Message(role="user", content="What is the capital of France?"),)
    orders = {tuple(m.role for m in messages): messages for messages in conversations}
    answer, why = "Paris </s>.\n\n  <|im_end|><mask> It is.", "The Seine."
    template, folds = f"chat template of {tokenizer.name_or_path}", False
    for messages in (question, *orders.values()):
        for inner in (None, *((why,) if thought else ())):
            text = join_thought(answer, inner) if inner else answer
            names = dict.fromkeys(("id", "request_key", "prompt_id", "model"), "")
            response = Response(**names, sample=0, text=text, stop="end", reasoning=inner)
            prompt = Prompt.make(tuple(messages), "", "")
            example = encode_pair(tokenizer, Pair(prompt=prompt, response=response), date)
            target = [i for i, w in zip(example.input_ids, example.weights, strict=True) if w]
            decoded = tokenizer.decode(target, clean_up_tokenization_spaces=False)
            if "".join(answer.split()) not in "".join(str(decoded).split()):
                what = "with it an answer is not learnt as it stands"
                raise DistillError(Exit.TRAINING, template, what, "use another model")
        folds |= messages[0].role == "system" and folds_system(tokenizer, date)
    line = f"{template}: has no system turn, which goes into the first user turn"
    return [line] if folds else []


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    date: str,
    max_length: int,
    where: object,
) -> list[Example]:
    """Tokenise `pairs` but those longer than `max_length` tokens, which are named on the screen.

    Raises DistillError (exit 7) if none is left.
    """
    examples = [encode_pair(tokenizer, pair, date) for pair in pairs]
    fitting = [example for example in examples if len(example.input_ids) <= max_length]
    if long := [e.response_id for e in examples if len(e.input_ids) > max_length]:
        names = ", ".join(long[:5]) + (f" and {len(long) - 5} more" if len(long) > 5 else "")
        say(f"dropped {len(long)} samples longer than {max_length} tokens: {names}")
    if not fitting:
        what = f"none of {len(examples)} samples is left within {max_length} tokens"
        fix = "raise train.max_length, or loosen the filters"
        raise DistillError(Exit.TRAINING, where, what, fix)
    return fitting


def encode_split(
    tokenizer: PreTrainedTokenizerBase, run: Run, split: str, limit: int
) -> list[Example]:
    """Tokenise a split of the run's dataset; validation may be empty, training may not."""
    path = run.path(f"dataset/{split}.jsonl")
    pairs = read_records(path, Pair) if path.exists() else []
    if not run.config.train.loss.soft:  # as a trial of a search on text may have it
        pairs = [pair for pair in pairs if not pair.only_signals]
    if not pairs and split == "validation":
        return []
    return encode_pairs(tokenizer, pairs, run.config.template_date, limit, path)


def show(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], count: int = 2) -> None:
    """Print the first `count` examples of a batch, supervised tokens in «marks» and in colour."""
    console.print(f"first batch: {len(examples)} samples; «supervised» tokens are marked")
    for example in examples[:count]:
        text, tokens = Text(), zip(example.input_ids, example.weights, strict=True)
        for supervised, run in groupby(tokens, key=lambda token: bool(token[1])):
            part = f"{tokenizer.decode([i for i, _ in run])}"
            if supervised:
                text.append(f"«{part}»", style="bold green")
            else:
                cut = f"{part[:SHOWN_CHARS]} …" if len(part) > SHOWN_CHARS else part
                text.append(cut, style="dim")
        console.print(text, soft_wrap=True)
