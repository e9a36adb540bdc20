"""From a settled configuration and prepared prompts to the plan the parts are built from."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import transformers

from hone.datasets.tokenizer import template_hash
from hone.launch.config import PolicyGradientConfig
from hone.launch.parts import Plan
from hone.launch.prompts import PromptData
from hone.learner.errors import ModelError
from hone.learner.vision import sees
from hone.rollout.agents.loading import Agent
from hone.rollout.endpoint.rollout import Caller, Calling
from hone.rollout.executor import Executor, Group, Judge, SingleTurn
from hone.rollout.filtering import Filtering, Varied, WithinRange
from hone.rollout.multi_turn import MultiTurn
from hone.rollout.pictures import Placeholders
from hone.rollout.sampling import reads_text
from hone.rollout.tolerance import tolerance
from hone.rollout.types import Engine, Prompt


def in_full(model: str) -> str:
    """A model directory by its full path, for processes that start elsewhere; a hub id as it is."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.is_dir() else model


def stop_ids(model: str, tokenizer: "transformers.PreTrainedTokenizerBase") -> tuple[int, ...]:
    """The ids that end a response: the tokenizer's and those of the model's generation config; every engine gets the same."""
    try:
        of_model = transformers.GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        of_model = None  # a model need not come with one; transformers says so with an OSError and nothing finer
    found = [of_model] if isinstance(of_model, int) else list(of_model or ())
    own = tokenizer.eos_token_id
    return tuple(sorted({*found, *(() if own is None else (int(str(own)),))}))


def vocabulary(models: Mapping[str, str], tokenizer: "transformers.PreTrainedTokenizerBase", *, trained: str = "policy") -> int:
    """Ids that the tokenizer and every model know. Raises ModelError where a role's is not the `trained` one's."""
    sizes = {role: int(transformers.AutoConfig.from_pretrained(model).get_text_config().vocab_size) for role, model in models.items()}
    for role, size in sizes.items():
        if size != sizes[trained]:
            raise ModelError(
                f"the {role} knows {size} token ids and the {trained} {sizes[trained]}: {models[role]} and {models[trained]} are of "
                "different vocabularies; all roles read the same ids, so name models that share a tokenizer"
            )
    if len(tokenizer) > sizes[trained]:
        raise ModelError(
            f"the tokenizer of {models[trained]} knows {len(tokenizer)} ids, its model only {sizes[trained]}: a token was "
            "added and the model not resized; call model.resize_token_embeddings(len(tokenizer)) and save both again"
        )
    return len(tokenizer)


def models_of(config: PolicyGradientConfig, model: str) -> dict[str, str]:
    """Role -> model, of the roles this algorithm needs; a critic and a reference without one of their own begin as the policy's `model`."""
    models = {"policy": model}
    if "values" in config.algo.needs:
        models["critic"] = in_full(config.critic.model_name_or_path or model)
    if "ref_logp" in config.algo.needs:
        models["reference"] = in_full(config.ref.model_name_or_path or model)
    return models


def make_plan(
    config: PolicyGradientConfig,
    *,
    model: str,
    prompts: PromptData,
    steps: int,
    judge: Judge | Agent | Caller,
    logs: Path,
    scratch: Path,
    on_start: Callable[[str, str], None],
    on_phase: Callable[[str, float | None], None],
    on_event: Callable[..., None],
    on_rejected: Callable[[Group, str], None],
    on_failed: Callable[[Prompt, str], None],
    on_retried: Callable[[Prompt, str], None],
    more: Callable[[], Prompt | None],
) -> Plan:
    """The roles this algorithm needs, how long their schedules are, and how prompts become judged samples."""
    models = models_of(config, model)

    def executor(engine: Engine, engine_version: str, prompts_per_call: int) -> Executor:
        inner, rollout = acting(engine, engine_version, prompts_per_call), config.rollout
        if rollout.dynamic_filtering == "off":
            return inner
        low, high = rollout.dynamic_filtering_range
        verdict = Varied() if rollout.dynamic_filtering == "variance" else WithinRange(low=low, high=high)
        batches = rollout.dynamic_filtering_batches
        return Filtering(executor=inner, verdict=verdict, more=more, dropped=on_rejected, most_batches=batches)

    def acting(engine: Engine, engine_version: str, prompts_per_call: int) -> Executor:
        common: dict[str, Any] = {
            "engine": engine,
            "tokenizer": prompts.tokenizer,
            "config": config.rollout,
            "run_seed": config.train.seed,
            "max_len": config.data.max_len,
            "engine_version": engine_version,
            "tokenizer_hash": prompts.tokenizer_hash,
            "template_hash": prompts.template_hash,
            "greedy": "greedy_scores" in config.algo.needs,
            "tolerance": tolerance(config.rollout, config.reward, dropped=on_failed, retried=on_retried),
        }
        if isinstance(judge, Caller):
            # Its conversations are rendered with the chat template, however the rows are.
            chat = dataclasses.replace(config.data, apply_chat_template=True, input_template=None)
            common["template_hash"] = template_hash(prompts.tokenizer, config=chat) if judge.served is not None else ""
            common |= {"stop_ids": stop_ids(model, prompts.tokenizer), "stops_at_text": reads_text(config.rollout)}
            return Calling(agent=judge.agent, judge=judge.judge, served=judge.served, placeholders=_placeholders(model), **common)
        if isinstance(judge, Agent):
            deadline, turns = config.reward.timeout_s, config.rollout.max_turns
            settings = {"max_turns": turns, "step_timeout_s": deadline, "placeholders": _placeholders(model)}
            return MultiTurn(environment=judge.make, where=judge.where, **settings, **common)
        return SingleTurn(judge=judge, prompts_per_call=prompts_per_call, **common)

    samples = config.rollout.batch_size * config.rollout.n_samples_per_prompt
    return Plan(
        config=config,
        models=models,
        optimiser_steps=steps * math.ceil(samples / config.train.batch_size) * config.train.max_epochs,
        vocabulary=vocabulary(models, prompts.tokenizer),
        hidden_size=int(transformers.AutoConfig.from_pretrained(model).get_text_config().hidden_size),
        eos_token_ids=stop_ids(model, prompts.tokenizer),
        executor=executor,
        source=prompts.steps,
        logs=logs,
        scratch=scratch,
        canary_images=prompts.with_images,
        on_start=on_start,
        on_phase=on_phase,
        on_event=on_event,
    )


def _placeholders(model: str) -> Placeholders | None:
    """For images that an environment or an agent shows; None where the model reads text only."""
    config = transformers.AutoConfig.from_pretrained(model)
    return Placeholders(transformers.AutoImageProcessor.from_pretrained(model), image_token=config.image_token_id) if sees(config) else None
