"""What training reads of a config: student, losses, loop, own answers, soft labels, on-policy, and
the search for its settings."""

from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from distill.config.teachers import EndpointTeacher
from distill.config.values import (
    ModelName,
    Positive,
    Revision,
    Section,
    TemplateVariables,
    Trust,
    Weight,
)

if TYPE_CHECKING:
    from distill.config.tree import Config

SoftLoss = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl"]
SOFT: tuple[SoftLoss, ...] = get_args(SoftLoss)
Arm = Literal["text", "reverse_kl", "forward_kl"]  # a loss alone; the last at temperature 2


class Signals(Section):
    """What is stored of the teacher's token distributions, for the losses that need them."""

    method: Literal["nucleus", "sampled"] = "nucleus"
    """`nucleus` stores the most probable ids; `sampled` draws, which is unbiased on any text, but
    for `ce` and `forward_kl` at temperature 1 alone."""
    samples: Annotated[int, Field(ge=1, le=255)] = 50
    """Samples a token, of method `sampled`."""
    p: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Probability mass that the stored ids of a token hold, of method `nucleus`."""
    k: Annotated[int, Field(ge=1, le=1024)] = 64
    """Ids stored for a token at most, of method `nucleus`. Servers often list 20 at most."""
    temperatures: tuple[Annotated[float, Field(gt=0, le=100)], ...] = ()
    """Further temperatures to store, beside 1, for `train.loss.temperature`."""
    model: ModelName | None = None
    """Local model that reads the answers in the teacher's place: NAME, Hub id or ./FOLDER."""
    revision: Revision | None = None
    """Branch, tag or commit of `model`, or of `tokenizer`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights of `model` in memory."""
    endpoint: EndpointTeacher | None = None
    """Server, kind: endpoint, that reads the answers and returns prompt_logprobs, as vLLM."""
    from_answers: bool = False
    """Takes the log-probabilities that came with answers, see `teacher.extra_body`."""
    tokenizer: ModelName | None = None
    """Model whose tokenizer and chat template are the server's; null: the student's."""

    @model_validator(mode="after")
    def _one_reader(self) -> "Signals":
        if sum((bool(self.endpoint), bool(self.model), self.from_answers)) > 1:
            raise ValueError("either model reads the answers, or endpoint, or from_answers is true")
        if self.method == "sampled" and self.temperatures:
            raise ValueError("method sampled is for temperature 1 only: leave temperatures out")
        return self

    @property
    def shape(self) -> dict[str, Any]:
        """Return the settings that shape what is kept."""
        sampled = {"method": self.method, "samples": self.samples}
        nucleus = {"p": self.p, "k": self.k, "temperatures": list(self.temperatures)}
        return sampled if self.method == "sampled" else nucleus


class Student(Section):
    """The small model that learns."""

    model: ModelName
    """Model as NAME of configs/models.yaml, Hub id or ./FOLDER."""
    revision: Revision | None = None
    """Branch, tag or commit on the Hub; null takes that of configs/models.yaml, or the newest."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights; `auto`: bfloat16, where it is missing float16 (GPU), float32 (CPU)."""
    load_in_4bit: bool = False
    """Loads the frozen weights in 4 bits (QLoRA, on a CUDA GPU), for larger models."""
    allow_pickle: bool = False
    """Allows weights in pickle files, which can run code. Convert them to safetensors instead."""
    chat_template_kwargs: TemplateVariables = {}
    """Variables of its chat template, wherever it is used; they win over `reasoning`."""
    trust_remote_code: bool = False
    """Runs Python code that comes with the model. Read it first."""

    @property
    def trust(self) -> Trust:
        """Return what the files of the model are allowed to be."""
        return Trust(self.allow_pickle, self.trust_remote_code)


class Lora(Section):
    """The adapter, in PEFT's words."""

    r: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of the adapter; more learns more and takes more memory."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """Scale of the adapter, which is alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input, against overfitting."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Layers with an adapter: all-linear, a regular expression, a list; not embedding or head."""


class Loss(Section):
    """Weights of the parts of the loss; all but `ce` need the teacher's token distributions."""

    ce: Weight = 1.0
    """Weight of the cross-entropy with the answer's tokens; weights need not add up to 1."""
    forward_kl: Weight = 0.0
    """Weight of KL(teacher || student), which covers all that the teacher would say."""
    reverse_kl: Weight = 0.0
    """Weight of KL(student || teacher), which keeps to what the teacher is sure of."""
    jsd: Weight = 0.0
    """Weight of the generalised Jensen-Shannon divergence, between the two."""
    skew_kl: Weight = 0.0
    """Weight of the skew KL: KL from the teacher to a mixture of both."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Weight of the teacher in the mixture of `jsd`."""
    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Weight of the teacher in the mixture of `skew_kl`."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Temperature of teacher and student in all parts but `ce`."""
    teacher: Literal["cached", "live"] = "cached"
    """`cached` reads stored distributions; `live` keeps the teacher in memory, not on disk."""

    @property
    def soft(self) -> dict[str, float]:
        """Return the parts that need the teacher's distributions, with their weights."""
        parts = {name: getattr(self, name) for name in SOFT}
        return {name: weight for name, weight in parts.items() if weight}

    @property
    def parts(self) -> dict[str, float]:
        """Return all parts that have a weight, the cross-entropy first."""
        return {**({"ce": self.ce} if self.ce else {}), **self.soft}

    @model_validator(mode="after")
    def _something(self) -> "Loss":
        if not self.ce and not self.soft:
            raise ValueError("gives every part the weight 0")
        return self


class SelfAnswers(Section):
    """What the student adds to the rows that it is trained on again, from the base."""

    n: Annotated[int, Field(ge=1, le=256)] = 8
    """Answers of the student to a training prompt; more of them solve more prompts."""
    temperature: Annotated[float, Field(gt=0, le=2)] = 0.7
    """Sampling temperature of the student."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling of the student."""
    max_new_tokens: Positive | None = None
    """Tokens of an answer of the student, at most; null takes `teacher.max_new_tokens`."""
    keep: Positive = 4
    """Right answers of the student to a prompt that are trained on, at most; all differ."""
    rounds: Annotated[int, Field(ge=1, le=9)] = 1
    """Rounds; in the next one the student answers that the last one trained."""


class Train(Section):
    """The training loop."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    """Seed of the adapter's first weights and the order of samples; null: the run's seed."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """Peak learning rate, after the warm-up."""
    num_train_epochs: Annotated[float, Field(gt=0, le=1000)] = 2
    """Passes over the training samples."""
    max_steps: Positive | None = None
    """Optimizer steps at most; null trains for all epochs."""
    tokens_per_step: Positive = 2048
    """Tokens of an optimizer step, prompts included, over all processes together."""
    micro_batch_tokens: Positive | None = None
    """Tokens of one forward pass; null takes 2,560, and on a GPU what its memory holds. Lower it
    where memory runs out, in a begun run too: the result is the same but for rounding."""
    max_length: Positive = 2048
    """Tokens of a sample at most; longer ones are left out, counted and named."""
    packing: bool = True
    """Puts several samples into one row, each attending to itself: faster, the same result."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_steps: Annotated[float, Field(ge=0)] = 0.05
    """Warm-up of the learning rate: below 1 a share of all steps, else a count."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of AdamW."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay rate of AdamW's first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay rate of AdamW's second moment."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this norm."""
    lora: Lora = Lora()
    loss: Loss = Loss()
    self_answers: SelfAnswers | None = None
    """Lets the trained student answer its training prompts: what the tasks' checkers find right
    joins the teacher's answers, and training starts again from the base. Asks no teacher."""
    bf16: bool | Literal["auto"] = "auto"
    """Whether the forward pass computes in bfloat16; `auto` goes by `student.dtype`. Adapter and
    optimizer are float32, which a GPU computes without TF32."""
    gradient_checkpointing: bool = False
    """Computes activations again in the backward pass, which takes less memory and more time."""
    eval_steps: Positive | None = 50
    """Steps from one validation by loss to the next; null validates at the end alone."""
    metric_for_best_model: Literal["loss", "checker"] = "loss"
    """What chooses the best checkpoint: `loss` on the teacher's validation answers, or `checker`,
    by the student's own at each epoch's end (not `eval_steps`); then the teacher is not asked what
    the checker alone would read."""
    save_steps: Positive | None = 50
    """Steps from one checkpoint to the next; null saves at the end alone."""
    save_total_limit: Annotated[int, Field(ge=2)] = 2
    """Checkpoints that are kept."""
    load_best_model_at_end: bool = True
    """Takes the adapter of the best validation, not of the last step."""
    early_stopping_patience: Positive | None = None
    """Validations in a row without a better one that end the training; null: none do."""
    logging_steps: Positive = 1
    """Steps from one logged loss to the next."""
    num_processes: Positive | None = None
    """Processes that training must have, or it stops; null takes as many as the launcher starts."""
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """Tracker that gets the losses; needs `pip install 'distill[tracking]'`."""


class OnPolicy(Section):
    """Rounds after training in which the student learns from the teacher on its own answers."""

    rounds: Annotated[int, Field(ge=0, le=100)] = 0
    """Rounds; 0 does none. Needs a local teacher that shares the student's tokenizer."""
    prompts: Positive = 256
    """Training prompts that the student answers in a round."""
    max_new_tokens: Positive = 128
    """Tokens of an answer of the student, at most."""
    temperature: Annotated[float, Field(gt=0, le=2)] = 1.0
    """Sampling temperature of the student."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling of the student."""
    divergence: SoftLoss = "jsd"
    """Divergence that is trained on; `train.loss` gives beta, alpha and temperature."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-4
    """Peak learning rate of a round, which is one epoch; the rest is as in `train`."""


class Recipe(Section):
    """A search for the settings of training, by what the student's own answers score."""

    mode: Literal["off", "auto"] = "off"
    """`auto` tries learning rates, losses and epochs by the checker on validation prompts, and
    trains with what beats `train` as it stands; the checker then chooses checkpoints too."""
    losses: Annotated[tuple[Arm, ...], Field(min_length=1)] | None = None
    """Losses to try: text, reverse_kl, forward_kl (at temperature 2); null takes the last two only
    where a local teacher tells its distributions."""
    teacher_tokens: Positive | None = None
    """Tokens that the teacher may read and write; a run that could take more buys nothing."""
    dollars: Annotated[Decimal, Field(gt=0, allow_inf_nan=False)] | None = None
    """Dollars that an endpoint may take; the lower of it and `teacher.budget_dollars` holds."""
    hours: Annotated[float, Field(gt=0)] | None = None
    """Hours of the search as the plan estimates them, which fix its trials before the first; no
    clock stops it. null tries all."""
    seeds: Annotated[int, Field(ge=2, le=20)] = 3
    """New seeds on which the best trial is compared with `train` as it stands."""


def tried(config: "Config", loss: Arm | None, rate: float | None, epochs: float) -> "Config":
    """Return the config that trains as a trial does and searches nothing; the default has no loss
    and no rate of its own."""
    train, changes = config.train, dict[str, Any]()
    if loss is not None:
        mix = {**dict.fromkeys(("ce", *SOFT), 0.0), "ce" if loss == "text" else loss: 1.0}
        mix |= {"temperature": 2.0 if loss == "forward_kl" else 1.0, "teacher": "cached"}
        changes = {"loss": train.loss.model_copy(update=mix), "max_steps": None}
        changes |= {"learning_rate": rate, "num_train_epochs": float(epochs)}
        changes["lora"] = train.lora.model_copy(update={"alpha": 2.0 * train.lora.r})
    update = {"train": train.model_copy(update=changes), "recipe": Recipe()}
    return config.model_copy(update=update)
