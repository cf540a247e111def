"""Live soft labels: the teacher in memory reads each batch as it comes, and the loss takes its whole vocabulary.

For one epoch, or where the disk is dear: nothing is kept, and every epoch costs the teacher's reading again. The
teacher sees its own view of the prompt, as in a capture; tokenizers must be the same, and its terms allow training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distill.config import Config, LocalTeacher, Loss
from distill.models import loading
from distill.records import Example, digest
from distill.responders.terms import require_terms
from distill.storage.fingerprints import MODEL_FILE
from distill.storage.progress import say
from distill.storage.run_folder import Run
from distill.training.soft_labels.cache import open_teacher
from distill.training.soft_labels.capture import read_as_teacher, require_context
from distill.training.soft_labels.labels import read_pairs
from distill.training.student import StudentModel, make_student
from distill.training.targets import Live


@dataclass(frozen=True)
class LiveLabels:
    """A teacher and the examples as it reads them, by answer; `vocabulary` is how many ids the tokenizer makes."""

    teacher: StudentModel
    examples: Mapping[str, Example]
    vocabulary: int
    digest: str
    settings: Loss

    @torch.no_grad()
    def targets(self, answers: Sequence[str], device: Any) -> Live:
        """Read the answers, and return the last hidden states at their supervised positions, with the head."""
        batch = self.teacher.batch([self.examples[name] for name in answers])
        hidden_ND = self.teacher.hidden(batch)[batch.places_S]
        head_VD, bias_V = self.teacher.head()
        return Live(hidden_ND.to(device), head_VD, self.vocabulary, bias_V)


def load_live(config: Config, run: Run, examples: Sequence[Example]) -> LiveLabels:
    """Load the teacher beside the student; its labels are by the ids of the examples' answers.

    Raises DistillError: exit 2 where the tokenizers differ, 3 where an answer is too long for the teacher, 7 where it
    has other tokens under the teacher's template, 10 where the teacher's terms forbid it.
    """
    teacher = config.soft_teacher()
    require_terms(teacher, config.terms.basis)
    tokenizer, facts = open_teacher(config)
    pairs = {pair.response.id: pair for pair in read_pairs(run)}
    reads = [read_as_teacher(tokenizer, pairs[e.response_id], e, config) for e in examples]
    assert isinstance(teacher, LocalTeacher)
    model = loading.load_model(teacher.model, teacher.dtype, teacher.revision)
    reader, notes = make_student(model.eval().requires_grad_(False))
    for note in notes:
        say(f"teacher: {note}")
    require_context(reads, loading.context_length(model.config))
    by_answer = {read.example.response_id: read.example for read in reads}
    # a folder's files are compared by name, in the facts of the training
    shaping = {key: value for key, value in facts.items() if not MODEL_FILE.fullmatch(key)}
    pinned = digest(["live", {**shaping, "p": None, "k": None, "temperatures": None}])
    return LiveLabels(reader, by_answer, len(tokenizer), pinned, config.train.loss)
