"""Tokenizers: loading without surprises, and hashes that say which one, and which template, made a token id."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from hone.datasets.chat import template_text
from hone.datasets.config import DataConfig
from hone.datasets.errors import TokenizerError

if TYPE_CHECKING:
    import transformers

# A folder without any of these gives, for some architectures, an empty tokenizer instead of an error.
VOCABULARY_FILES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")


SEEING = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Model types that images can be shown to: those of `hone.learner.vision.FAMILIES`, which trains them."""


def unknown_id(tokenizer: "transformers.PreTrainedTokenizerBase") -> int | None:
    """The id of characters outside the vocabulary; none where it is that of the beginning or the end, as with OPT and GPT-2."""
    if tokenizer.unk_token_id in (None, tokenizer.bos_token_id, tokenizer.eos_token_id):
        return None
    return int(str(tokenizer.unk_token_id))


def load_tokenizer(path: str) -> "transformers.PreTrainedTokenizerBase":
    """The tokenizer of a model directory, or of a hub id: from the local cache if it is there, else from the hub.

    Never runs code that comes with a model. Raises TokenizerError.
    """
    from huggingface_hub import try_to_load_from_cache

    folder = Path(path).expanduser()
    if path and folder.is_dir():
        if not any(next(folder.glob(pattern), None) for pattern in VOCABULARY_FILES):
            found = ", ".join(sorted(repr(child.name) for child in folder.iterdir())[:8]) or "nothing"
            raise TokenizerError(
                f"{path!r} has no tokenizer files (found {found}); copy tokenizer.json and tokenizer_config.json of the model into it"
            )
        return _load(str(folder), path, local_files_only=True)
    if not path or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise TokenizerError(
            f"the model directory {path!r} does not exist; name a directory with a tokenizer, or a hub id such as 'owner/model'"
        )
    return _load(path, path, local_files_only=isinstance(try_to_load_from_cache(path, "tokenizer_config.json"), str))


def load_processor(path: str) -> "transformers.ProcessorMixin":
    """The processor (tokenizer and image processor) of a vision-language model that is understood here; raises TokenizerError."""
    from transformers import AutoConfig, AutoProcessor

    folder = Path(path).expanduser()
    location = str(folder) if folder.is_dir() else path
    try:
        kind = AutoConfig.from_pretrained(location, trust_remote_code=False).model_type
        if kind not in SEEING:
            raise TokenizerError(
                f"the data has images, and {path!r} is a model of type {kind!r}, which is not shown any here; name one of type "
                f"{', '.join(SEEING)} (--actor.model-name-or-path), or leave the images out (--data.image-key none)"
            )
        return AutoProcessor.from_pretrained(location, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise TokenizerError(
            f"the processor of {path!r} cannot be loaded: {_first_line(error)}; copy preprocessor_config.json (or processor_config.json) "
            "of the model into it, and install hone-datasets[vision]"
        ) from error


def _load(location: str, path: str, *, local_files_only: bool) -> "transformers.PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(location, local_files_only=local_files_only, trust_remote_code=False)
    except OSError as error:
        raise TokenizerError(
            f"no tokenizer at {path!r}: {_first_line(error)}\n"
            "  check the spelling of the name; log in with `hf auth login` if the model is gated; "
            "without a network, download the model beforehand and name its directory"
        ) from error
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise TokenizerError(
                f"the tokenizer of {path!r} is code that comes with the model, and such code is never run; "
                "use a model whose tokenizer is a tokenizer.json"
            ) from error
        raise TokenizerError(
            f"the tokenizer of {path!r} cannot be loaded: {type(error).__name__}: {_first_line(error)}; copy its files from the model again"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def tokenizer_hash(tokenizer: "transformers.PreTrainedTokenizerBase") -> str:
    """A hash of everything that turns text into ids: vocabulary, merges, normaliser, special tokens."""
    from transformers import PreTrainedTokenizerFast

    content: dict[str, object] = {"special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()}}
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # These two are left behind by the last call with padding or truncation and are no part of the tokenizer.
        content["backend"] = {name: part for name, part in backend.items() if name not in ("padding", "truncation")}
    else:
        content["backend"] = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    return _hash(json.dumps(content, sort_keys=True))


def template_hash(tokenizer: "transformers.PreTrainedTokenizerBase", *, config: DataConfig) -> str:
    """A hash of the template in use (the chat template or the input template); empty where prompts are used as they stand."""
    template = template_text(tokenizer, config=config)
    return _hash(template) if template else ""


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=8).hexdigest()
