"""The inference engines that can be started for a model, and the commands that start them."""

from typing import Literal

from distill.config.values import Section

Engine = Literal["distill", "vllm", "llama.cpp"]


class EngineCommand(Section):
    """How an engine is started."""

    command: str | None = None
    """Command that starts it, up to the model; null takes the program on the PATH, else the
    environment that scripts/engines.sh makes."""


class Engines(Section):
    """How inference engines are started, which live in environments of their own."""

    vllm: EngineCommand = EngineCommand()
    """vLLM's server, such as `/opt/vllm/bin/vllm serve`."""
    llama_cpp: EngineCommand = EngineCommand()
    """llama.cpp's server, such as `/opt/llama.cpp/llama-server`."""
