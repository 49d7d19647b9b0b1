# SPDX-License-Identifier: Apache-2.0
"""A model directory with a chat template around the shipped checkpoint, which knows no chats."""

import json

from jpaged.models import DEMO

# Turns as text that its tokenizer has tokens for.
TEMPLATE = """{%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'narrator' %}{{ raise_exception('narrators do not talk') }}{% endif %}
{%- if message.role == 'user' %}{{ 'You said: ' + message.content + '\\n' }}
{%- elif message.role == 'assistant' %}{{ message.content + '\\n' }}{% endif %}
{%- endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}"""


def chatty_model(directory, template=TEMPLATE):
    """Makes the directory."""
    directory.mkdir()
    for file in DEMO.iterdir():
        (directory / file.name).symlink_to(file)
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return directory
