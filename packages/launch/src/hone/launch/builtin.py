"""The model that ships as a recipe: made on first use by this project's own supervised training, cached, deterministic.

It learns one-digit sums from a corpus in which most answers deliberately have the wrong sign. So it can
do arithmetic and mostly does not: reinforcement has a behaviour to choose, which it can do in a minute on two cores.
"""

import dataclasses
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hone.algos.batch import Scored
from hone.algos.reduce import Reduction, token_weights
from hone.datasets.tasks import arithmetic


@dataclass(frozen=True, kw_only=True)
class BuiltinModel:
    """The recipe; any change of it makes another model, under another name in the cache.

    `version` is raised when something outside the recipe (the corpus, the tokenizer, the loss) makes another model of it.
    """

    version: int = 1
    hidden_size: int = 128
    layers: int = 2
    heads: int = 4
    key_value_heads: int = 2
    max_position_embeddings: int = 512
    steps: int = 500
    rows_per_step: int = 64
    lr: float = 2e-3
    wrong: int = 2
    of: int = 3
    seed: int = 0


def cache_directory() -> Path:
    """Where made models are kept: HONE_CACHE, else the user's cache directory."""
    configured = os.environ.get("HONE_CACHE")
    return Path(configured) if configured else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hone"


def builtin_model(
    recipe: BuiltinModel | None = None, *, progress: Callable[[int, int, float], None] = lambda step, steps, loss: None
) -> Path:
    """Directory of the built-in model; made now if the cache lacks it. `progress(step, steps, loss)` hears of every step."""
    recipe = recipe or BuiltinModel()
    sources = repr(dataclasses.astuple(recipe))
    target = cache_directory() / f"arithmetic-{hashlib.blake2b(sources.encode(), digest_size=6).hexdigest()}"
    if not (target / "config.json").exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as unfinished:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # the same order of every sum on every machine; and no slower at this size
            try:
                _make(recipe, Path(unfinished), progress)
            finally:
                torch.set_num_threads(threads)
            try:
                (Path(unfinished) / "final").rename(target)
            except OSError:
                # Another process finished the same model first; anything else than that is an error.
                if not (target / "config.json").exists():
                    raise
    return target


def _make(recipe: BuiltinModel, directory: Path, progress: Callable[[int, int, float], None]) -> None:
    from hone.learner.config import ActorConfig, AdamConfig, DeepSpeedConfig
    from hone.learner.learner import Learner
    from hone.learner.packing import shards
    from hone.learner.roles import RoleSpec
    from hone.learner.supervised import NextToken

    write_untrained(recipe, directory / "untrained")
    config = ActorConfig(adam=AdamConfig(lr=recipe.lr), min_lr_ratio=0.1)
    learner = Learner(
        roles={"policy": RoleSpec(kind="policy", model=str(directory / "untrained"), config=config, total_steps=recipe.steps)},
        ds=DeepSpeedConfig(param_dtype="fp32"),
        backend="single",
        rank=0,
        world_size=1,
        master_addr="127.0.0.1",
        master_port=0,
        seed=recipe.seed,
        max_tokens=recipe.rows_per_step * 16,
    )
    for step, scored in enumerate(_corpus(recipe), start=1):
        result = learner.update_policy("policy", shards(scored, ranks=1, max_tokens=recipe.rows_per_step * 16)[0], NextToken())
        progress(step, recipe.steps, result.metrics["nll"])
    learner.export("policy", str(directory / "final"))
    learner.close()
    shutil.rmtree(directory / "untrained")


def write_untrained(recipe: BuiltinModel, directory: Path) -> None:
    """The recipe's model as it is drawn from the seed, with its tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = arithmetic.build_tokenizer()
    torch.manual_seed(recipe.seed)
    ends: dict[str, Any] = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden_size,
            intermediate_size=3 * recipe.hidden_size,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.key_value_heads,
            head_dim=recipe.hidden_size // recipe.heads,
            max_position_embeddings=recipe.max_position_embeddings,
            tie_word_embeddings=True,
            **ends,
        )
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _corpus(recipe: BuiltinModel) -> Iterator[Scored]:
    """Packed steps of prompt and (imperfect) answer; the answer and its end are the action tokens."""
    tokenizer = arithmetic.build_tokenizer()
    rows = arithmetic.imperfect_corpus(recipe.seed, recipe.steps * recipe.rows_per_step, wrong=recipe.wrong, of=recipe.of)
    for start in range(0, len(rows), recipe.rows_per_step):
        texts = rows[start : start + recipe.rows_per_step]
        pairs = [(tokenizer.encode(prompt), [*tokenizer.encode(answer), tokenizer.eos_token_id]) for prompt, answer in texts]
        yield _supervised_step(pairs)


def _supervised_step(pairs: list[tuple[list[int], list[int]]]) -> Scored:
    tokens = torch.tensor([token for prompt, answer in pairs for token in (*prompt, *answer)])
    lengths = [len(prompt) + len(answer) for prompt, answer in pairs]
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    action_mask = torch.tensor([position >= len(prompt) for prompt, answer in pairs for position in range(len(prompt) + len(answer))])
    zeros: Float[Tensor, " T"] = torch.zeros(tokens.numel())
    return Scored(
        tokens=tokens,
        cu_seqlens=cu_seqlens,
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        action_mask=action_mask,
        rollout_logp=zeros,
        rewards=zeros,
        version=torch.zeros_like(tokens),
        group=torch.arange(len(pairs)),
        truncated=torch.zeros(len(pairs), dtype=torch.bool),
        advantages=zeros,
        weights=token_weights(action_mask, cu_seqlens, Reduction()),
    )
