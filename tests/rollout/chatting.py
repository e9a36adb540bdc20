"""Chat models small enough to make here: tokenizers of letters with templates of several kinds, and a model that writes by habit.

The model is a bigram by construction (one-hot embeddings, the habits in its head), with small random layers between: what follows
a token is known, every token has some chance, and it trains. It answers with digits, or first with a call of the tool `add`.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from hone.algos.batch import SamplerContract
from hone.rollout.endpoint.messages import ToolCall
from hone.rollout.endpoint.openai_wire import read_chat
from hone.rollout.endpoint.rendering import Renderer
from hone.rollout.endpoint.session import Budget, Session
from hone.rollout.endpoint.templates import served_template
from hone.rollout.endpoint.tree import Node, Segment
from hone.rollout.engines.scripted import ScriptedEngine
from hone.rollout.pictures import Placeholders

LETTERS = [chr(code) for code in range(32, 127)] + ["\n"]
CALL, FIRST, SECOND, LAST, CALLED = "<tool_call>", '{"name": "add", "arguments": {"a": ', ', "b": ', "}}", "</tool_call>"
END, PAD = "<|im_end|>", "<|pad|>"
SPECIAL = [PAD, "<|im_start|>", END, "<|user|>", "<|assistant|>", "<|observation|>", "<think>", "</think>"]
PIECES = [CALL, FIRST, SECOND, LAST, CALLED]

# Written in pieces: nothing but what stands in them is rendered.
_CALLS = (
    '{% for call in message.tool_calls or [] %}<tool_call>{"name": "{{ call.function.name }}", '
    '"arguments": {{ call.function.arguments | tojson }}}</tool_call>{% endfor %}'
)
CHATML = "".join(
    (
        "{% if tools %}<|im_start|>system{{ '\\n' }}",
        "Tools: {% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>{{ '\\n' }}{% endif %}",
        "{% for message in messages %}",
        "{% if message.role == 'tool' %}",
        "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{{ '\\n' }}{% endif %}",
        "<tool_response>{{ message.content }}</tool_response>",
        "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>{{ '\\n' }}{% endif %}",
        "{% else %}",
        "<|im_start|>{{ message.role }}{{ '\\n' }}{{ message.content }}",
        _CALLS,
        "<|im_end|>{{ '\\n' }}",
        "{% endif %}",
        "{% endfor %}",
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}",
    )
)
"""ChatML with Hermes' calls; neighbouring answers of tools are merged into one turn."""

THINKING = CHATML.replace(
    "{{ message.content }}" + _CALLS,
    "{% if message.reasoning_content and loop.last %}<think>{{ message.reasoning_content }}</think>{% endif %}{{ message.content }}"
    + _CALLS,
)
"""The same, but thoughts are shown on the last reply only."""

NO_CLOSE = "".join(
    (
        "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}",
        "{% for message in messages %}",
        "{% if message.role == 'tool' %}<|observation|>{{ message.content }}",
        "{% else %}<|{{ message.role }}|>{{ '\\n' }}{{ message.content }}" + _CALLS + "{% endif %}",
        "{% endfor %}",
        "{% if add_generation_prompt %}<|assistant|>{{ '\\n' }}{% endif %}",
    )
)
"""As GLM's: nothing closes a reply but the next role's marker."""

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]},
    },
}


def tokenizer(template: str | None = CHATML, *, end: str = END) -> PreTrainedTokenizerFast:
    """One id a letter; markers and the pieces of a call are ids of their own."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, "<unk>", *PIECES, *LETTERS])}
    base = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    base.decoder = decoders.Fuse()
    base.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in [*SPECIAL, "<unk>"]])
    base.add_tokens([AddedToken(token, special=False, normalized=False) for token in PIECES])
    return PreTrainedTokenizerFast(
        tokenizer_object=base, eos_token=end, pad_token=PAD, unk_token="<unk>", chat_template=template, clean_up_tokenization_spaces=False
    )


HABITS: Mapping[str, Mapping[str, float]] = {
    "\n": {CALL: 5.0, **{str(digit): 1.5 for digit in range(10)}},
    CALL: {FIRST: 8.0},
    FIRST: {str(digit): 6.0 for digit in range(10)},
    **{str(digit): {SECOND: 4.0, LAST: 4.0, END: 3.0} for digit in range(10)},
    SECOND: {str(digit): 6.0 for digit in range(10)},
    LAST: {CALLED: 8.0},
    CALLED: {END: 8.0},
}


def write_chat_model(directory: Path, template: str = CHATML) -> Path:
    """A model with these habits and its tokenizer, as a user's directory would hold them."""
    letters = tokenizer(template)
    torch.manual_seed(0)
    width = 128
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(letters),
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=2048,
            initializer_range=0.02,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=letters.eos_token_id,
            pad_token_id=letters.pad_token_id,
        )
    )
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.eye(len(letters), width))
        habits = torch.full((len(letters), len(letters)), -5.0)
        habits[:, letters.convert_tokens_to_ids(END)] = 2.0
        for before, after in HABITS.items():
            for token, logit in after.items():
                habits[letters.convert_tokens_to_ids(before), letters.convert_tokens_to_ids(token)] = logit
        head = model.get_output_embeddings().weight
        head.zero_()
        # Behind the final norm a one-hot of width w has length sqrt(w).
        head[:, : len(letters)] = habits.T / width**0.5
    model.save_pretrained(directory)
    letters.save_pretrained(directory)
    return directory


@dataclass
class Talk:
    """An episode at a session whose engine says `replies`, one a call; what was said is kept in `messages`."""

    replies: Sequence[str]
    template: str | None = CHATML
    history: Any = "verbatim"
    end: str = END
    stop_tokens: Sequence[str] = (END,)
    calls: int = 100
    max_len: int = 4000
    new_tokens: int = 200
    version: int = 0
    stops_at_text: bool = False
    sees: Callable[[PreTrainedTokenizerFast], Placeholders] | None = None
    sampler: Mapping[str, Any] = field(default_factory=dict)
    session: Session = field(init=False)
    engine: ScriptedEngine = field(init=False)

    def __post_init__(self) -> None:
        self.letters = tokenizer(self.template, end=self.end)
        stops = self.letters.convert_tokens_to_ids(list(self.stop_tokens))
        left = list(self.replies)
        self.engine = ScriptedEngine(script=lambda _: self.ids(left.pop(0)), version=self.version)
        served = served_template(self.letters, stop_ids=stops)
        self.renderer = Renderer(self.letters, closers=()) if served is None else served.renderer
        self.session = Session(
            engine=self.engine,
            renderer=self.renderer,
            served=served,
            stop_ids=stops,
            history=self.history,
            budget=Budget(calls=self.calls, new_tokens=self.new_tokens, max_len=self.max_len, timeout_s=60.0),
            prompt_id="p",
            step=1,
            sample=0,
            run_seed=7,
            contract=SamplerContract(
                temperature=0.7, top_p=1.0, top_k=0, seed=7, engine="scripted", tokenizer="", template="", **self.sampler
            ),
            greedy=False,
            stops_at_text=self.stops_at_text,
            placeholders=None if self.sees is None else self.sees(self.letters),
        )

    def ids(self, text: str) -> list[int]:
        return self.letters.encode(text, add_special_tokens=False)

    def text(self, ids: Sequence[int]) -> str:
        return self.letters.decode(list(ids), skip_special_tokens=False)

    async def asked(self, body: dict[str, Any]) -> list[Node]:
        nodes = await self.session.answer(read_chat(body)[0])
        for node in nodes:
            self.session.tree.deliver(node)
        return nodes

    def ask(self, *messages: dict[str, Any], **body: Any) -> Node:
        return asyncio.run(self.asked({"messages": list(messages), **body}))[0]

    def segments(self) -> list[Segment]:
        return self.session.tree.segments()[0]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, *calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **({"tool_calls": list(calls)} if calls else {})}


def answered(call: dict[str, Any] | ToolCall, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call["id"] if isinstance(call, dict) else call.id, "content": text}


def echoed(node: Node) -> dict[str, Any]:
    """A reply as a client sends it back."""
    calls = [{"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in node.reply.tool_calls]
    return assistant(node.reply.content, *calls)


def wrote(a: int, b: int) -> str:
    """The text of a call of `add`."""
    return f"{CALL}{FIRST}{a}{SECOND}{b}{LAST}{CALLED}"
