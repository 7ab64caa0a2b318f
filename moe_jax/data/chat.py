"""The chat format: messages to token ids with the mask of what the model is taught to say.

BOS, then for each message header_start, role, header_end, two newlines, the text as it is, eot. `CHAT_TEMPLATE` is
the same format as the Jinja text that engines read. Only the assistant's text and its eot are trained on, and
special-token text inside a message stays text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_jax.data.corpus import Message
from moe_jax.data.tokenizer import EOT, HEADER_END, HEADER_START, Tokenizer

# Written for MiniJinja as well as Jinja: no methods. A content may be a list of parts, as engines pass it.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{{ '" + HEADER_START + "' + message['role'] + '" + HEADER_END + "\\n\\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{ '" + EOT + "' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{ '" + HEADER_START + "assistant" + HEADER_END + "\\n\\n' }}"
    "{%- endif -%}"
)


def render_ids(
    messages: Sequence[Message], tokenizer: Tokenizer, generation_prompt: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 [S] and mask bool [S], true on the assistant's text and its eot.

    Ids equal those of the rendered template wherever no text looks like a special token. One exception by design:
    the assistant's text is encoded apart from the newlines before it, because at inference those are the prompt.
    """
    ids, mask = [tokenizer.bos], [False]
    for message in messages:
        spoken = message["role"] == "assistant"
        lead = "\n\n" if spoken else "\n\n" + message["content"]
        header = [tokenizer.header_start, *tokenizer.encode(message["role"]), tokenizer.header_end]
        header += tokenizer.encode(lead)
        text = tokenizer.encode(message["content"]) if spoken else []
        ids += [*header, *text, tokenizer.eot]
        mask += [False] * len(header) + [True] * len(text) + [spoken]
    if generation_prompt:
        prompt = tokenizer.encode("assistant"), tokenizer.encode("\n\n")
        ids += [tokenizer.header_start, *prompt[0], tokenizer.header_end, *prompt[1]]
        mask += [False] * (len(ids) - len(mask))
    return np.array(ids, np.int32), np.array(mask, bool)
