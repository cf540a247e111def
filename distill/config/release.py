"""What a config says of the release: the teacher's terms, what is published, and its license."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from distill.config.values import File, ReleaseName, Section
from distill.secret_patterns import NAMES


class Terms(Section):
    """What allows training on the teacher's answers, where configs/terms.yaml does not."""

    basis: Annotated[str, Field(min_length=3, max_length=500)] | None = None
    """What allows it, in your words (agreement, date); stands on the model card."""
    agreement: File | None = None
    """Copy of the license agreement that a release must carry, where the terms ask for one."""


Format = Literal["adapter", "safetensors", "gguf-f16", "gguf-q8_0", "gguf-q4_k_m", "ollama"]


class Publish(Section):
    """What the release holds, what it is called, and its license."""

    formats: Annotated[tuple[Format, ...], Field(min_length=1)] = ("adapter", "safetensors")
    """What the release holds: adapter, safetensors (the merged model), gguf-f16, gguf-q8_0,
    gguf-q4_k_m (for llama.cpp), ollama (a Modelfile, and the gguf-q8_0 that it names)."""

    model_name: ReleaseName | None = None
    """Name of the release as NAME or OWNER/NAME; null takes the repository's, else the run's."""
    license: str | None = None
    """SPDX id of the release's license; null takes that of the base model."""
    corpus_license: str | None = None
    """License of the corpus, which a published data set needs, as an SPDX id; null takes what its
    rows state, and of recorded answers `teacher.license`."""
    language: str = "en"
    """Language of the answers, as a BCP 47 code, for the card."""
    allow_secrets: tuple[str, ...] = ()
    """What looks like a secret and is none, in the release or in this config: forms (sk-key), or
    the first 8 to 64 digits of a text's SHA-256, as messages show it (sha256:0123456789ab)."""

    @field_validator("allow_secrets")
    @classmethod
    def _known_secrets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in NAMES and not re.fullmatch("(?:sha256:)?[0-9a-f]{8,64}", name):
                raise ValueError(f"{name[:40]} is no name of a secret's form and no SHA-256")
        return value
