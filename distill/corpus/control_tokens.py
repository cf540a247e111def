"""Corpus text is data: texts that chat templates use as control tokens are broken up before any prompt is made.

This is the first of two guards, and knows the families by their shape, since the models are not known here;
`distill.models.chat_template` is the second, and knows the tokenizer.
"""

import re

from distill.models.chat_template import SEPARATOR

CONTROL_TOKENS = re.compile(
    r"<\|[\w.:/-][\w .:/-]{0,59}\|?>|<[\w.:/-]{1,60}\|>"  # ChatML, Llama 3, Phi, Command, GPT-OSS, Gemma 4
    r"|<\uff5c[^\uff5c<>]{1,60}\uff5c>"  # DeepSeek, with full-width bars
    r"|\[/?(?:INST|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|SYSTEM_PROMPT|gMASK)\]|<</?SYS>>"  # Llama 2, Mistral, GLM
    r"|</?(?:s|bos|eos|pad|unk|sop|mask|start_of_turn|end_of_turn|start_of_image|document)>",  # Gemma; our own fence
    re.IGNORECASE,
)
INSTRUCTIONS = re.compile(
    r"^[^\w\n]*(?:system|assistant|human)\s*:|^#+ *(?:instruction|response)s? *:"
    r"|\b(?:ignore|disregard|forget)\b.{0,30}\b(?:previous|prior|above|earlier)\b.{0,30}\binstructions?\b",
    re.IGNORECASE | re.MULTILINE,
)


def break_up(text: str) -> str:
    """Return the text with a zero-width space inside each control-token text, so that it is plain text."""
    return CONTROL_TOKENS.sub(lambda match: match[0][0] + SEPARATOR + match[0][1:], text)


def looks_like_instructions(text: str) -> bool:
    """Tell whether a text forges a role or gives orders to a model; such documents are counted, not dropped."""
    return INSTRUCTIONS.search(text) is not None
