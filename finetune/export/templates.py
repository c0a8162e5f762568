"""The run's prompt for programs that have templates of their own: a chat template (jinja) and Ollama's Modelfile.

Both take the schema as the system message and the question as the user's. They show the schema as it comes: a run trained
on the compact form (data.schema_format) needs it in that form, which `finetune serve` and `finetune ask` make by themselves.
"""

from __future__ import annotations

from finetune.data.prompts import PromptTemplate

_SCHEMA, _QUESTION = "the schema", "the question"
_CHAT = """\
{%- set said = namespace(schema='', question='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set said.schema = message['content'] | trim -%}
{%- elif message['role'] == 'user' -%}
{%- set said.question = message['content'].split() | join(' ') -%}
{%- endif -%}
{%- endfor -%}
"""


def chat_template(template: PromptTemplate) -> str:
    """The jinja template that renders a system message (the schema) and the last user message (the question) as the prompt."""
    before, between, after = _around(template)
    return (
        f"{_CHAT}{{{{- {_quoted(before)} + said.schema + {_quoted(between)} + said.question + {_quoted(after)} -}}}}\n"
    )


def modelfile(template: PromptTemplate, gguf: str, *, max_new_tokens: int, context_tokens: int) -> str:
    """Ollama's description of a GGUF file beside it. The system message of a request is the schema."""
    before, between, after = _around(template)
    prompt = f"{before}{{{{ .System }}}}{between}{{{{ .Prompt }}}}{after}"
    return (
        "# ollama create MODEL -f Modelfile; then send the schema as `system` and the question as `prompt`\n"
        f"FROM ./{gguf}\n"
        f'TEMPLATE """{prompt}"""\n'
        "PARAMETER temperature 0\n"
        f"PARAMETER num_predict {max_new_tokens}\n"
        f"PARAMETER num_ctx {context_tokens}\n"
        'PARAMETER stop "### "\n'
    )


def _around(template: PromptTemplate) -> tuple[str, str, str]:
    """What stands before the schema, between schema and question, and after the question."""
    dialect = template.dialects[0] if template.dialects else "sqlite"
    plain = PromptTemplate(version=template.version)  # which leaves a schema as it is
    text = plain.render(schema=_SCHEMA, question=_QUESTION, dialect=dialect)
    before, _, rest = text.partition(_SCHEMA)
    between, _, after = rest.partition(_QUESTION)
    return before, between, after


def _quoted(text: str) -> str:
    """A text as a string of jinja."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
