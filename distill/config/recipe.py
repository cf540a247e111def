"""What a config says of the search for a recipe, and what its trials change."""

from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from distill.config.learning import SOFT
from distill.config.values import Positive, Section

if TYPE_CHECKING:
    from distill.config.tree import Config

Arm = Literal["text", "reverse_kl", "forward_kl"]  # a loss alone; the last at temperature 2


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
