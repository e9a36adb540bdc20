"""Chat templates: the tokenizer's own, one of a file, or one that comes with the project; and what is handed to them by name."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hone.datasets.config import Templates
from hone.datasets.errors import DataError, TokenizerError, did_you_mean, shown

if TYPE_CHECKING:
    import transformers

# In the project's words, to the published forms; each marks what the assistant says, its end token included.
BUILTIN: Mapping[str, str] = {
    "chatml": (
        "{%- for message in messages -%}"
        "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
        "{%- if message['role'] == 'assistant' -%}{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
        "{%- else -%}{{- message['content'] + '<|im_end|>' -}}{%- endif -%}{{- '\\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    ),
    "llama3": (
        "{{- bos_token -}}"
        "{%- for message in messages -%}"
        "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}"
        "{%- if message['role'] == 'assistant' -%}{%- generation -%}{{- message['content'] | trim + '<|eot_id|>' -}}{%- endgeneration -%}"
        "{%- else -%}{{- message['content'] | trim + '<|eot_id|>' -}}{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"
    ),
    "gemma": (
        "{{- bos_token -}}"
        "{%- if messages[0]['role'] == 'system' -%}{%- set first = messages[0]['content'] + '\\n\\n' -%}{%- set rest = messages[1:] -%}"
        "{%- else -%}{%- set first = '' -%}{%- set rest = messages -%}{%- endif -%}"
        "{%- for message in rest -%}"
        "{%- if message['role'] == 'assistant' -%}"
        "{{- '<start_of_turn>model\\n' -}}"
        "{%- generation -%}{{- message['content'] | trim + '<end_of_turn>' -}}{%- endgeneration -%}{{- '\\n' -}}"
        "{%- else -%}"
        "{{- '<start_of_turn>user\\n' + (first if loop.first else '') + message['content'] | trim + '<end_of_turn>\\n' -}}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"
    ),
}
FLAG, KWARGS_FLAG = "--data.tokenizer-chat-template", "--data.chat-template-kwargs"


def template_problem(config: Templates) -> DataError | None:
    """What is wrong with the template that a configuration names: no such file or name, or Jinja that does not parse."""
    try:
        if config.tokenizer_chat_template is not None:
            named_template(config.tokenizer_chat_template)
        template_kwargs(config)
    except DataError as error:
        return error
    return None


def named_template(name: str) -> str:
    """The text of a built-in template or of a file. Raises DataError."""
    if name in BUILTIN:
        return BUILTIN[name]
    path = Path(name).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        near = did_you_mean(name, (*BUILTIN, *(str(file) for file in Path().glob("*.jinja"))))
        raise DataError(
            f"{FLAG} {name!r} is neither a file that can be read ({error.strerror}) nor one of {', '.join(BUILTIN)}; name one{near}"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{FLAG} {name!r} is not UTF-8 text (byte {error.start + 1}); name a Jinja template") from error
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        _compile_jinja_template(text)
    except TemplateSyntaxError as error:
        line = text.splitlines()[error.lineno - 1] if error.lineno <= len(text.splitlines()) else ""
        raise DataError(f"{FLAG} {name}:{error.lineno} is no Jinja template: {error.message}; mend the line {shown(line)}") from error
    return text


def template_kwargs(config: Templates) -> dict[str, object]:
    """What the template is called with besides the messages. Raises DataError."""
    text = config.chat_template_kwargs
    if text is None:
        return {}
    try:
        values = json.loads(text)
    except ValueError as error:
        raise DataError(
            f'{KWARGS_FLAG} {shown(text)} is not JSON ({error}); write an object such as {{"enable_thinking": false}}'
        ) from error
    taken = {"messages", "tokenize", "add_generation_prompt", "chat_template", "conversation"}
    if not isinstance(values, dict) or taken & set(values):
        own = ", ".join(sorted(taken & set(values))) if isinstance(values, dict) else type(values).__name__
        raise DataError(
            f'{KWARGS_FLAG} {shown(text)} is no object of the template\'s own names ({own}); write {{"enable_thinking": false}}'
        )
    return values


def template_errors() -> tuple[type[Exception], ...]:
    """What rendering may raise: Jinja's own, and whatever a template's expressions do ({{ 1 / 0 }})."""
    from jinja2.exceptions import TemplateError

    return (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


def use_template(tokenizer: "transformers.PreTrainedTokenizerBase", config: Templates) -> None:
    """Give the tokenizer the template that the configuration names; raises TokenizerError where one is wanted and there is none."""
    if config.tokenizer_chat_template is not None:
        tokenizer.chat_template = named_template(config.tokenizer_chat_template)
    if config.apply_chat_template and tokenizer.chat_template is None:
        raise TokenizerError(
            f"--data.apply-chat-template is on, but the tokenizer of {tokenizer.name_or_path!r} has no chat template; "
            f"use an instruction-tuned model, name one of {', '.join(BUILTIN)} or a file with {FLAG}, put a chat_template.jinja beside "
            "the tokenizer, or use --data.input-template"
        )
