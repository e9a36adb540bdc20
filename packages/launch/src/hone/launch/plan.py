"""From a settled configuration and prepared prompts to the plan the parts are built from."""

import math
from collections.abc import Callable
from pathlib import Path

from hone.launch.config import PolicyGradientConfig
from hone.launch.parts import Plan
from hone.launch.prompts import PromptData
from hone.rollout.executor import Judge, SingleTurn
from hone.rollout.types import Engine


def make_plan(
    config: PolicyGradientConfig,
    *,
    model: str,
    prompts: PromptData,
    steps: int,
    judge: Judge,
    logs: Path,
    on_start: Callable[[str, str], None],
    on_phase: Callable[[str, float | None], None],
) -> Plan:
    """The roles this algorithm needs, how long their schedules are, and how prompts become judged samples.

    A critic and a reference without a model of their own begin as the policy.
    """
    models = {"policy": model}
    if "values" in config.algo.needs:
        models["critic"] = config.critic.model_name_or_path or model
    if "ref_logp" in config.algo.needs:
        models["reference"] = config.ref.model_name_or_path or model

    def executor(engine: Engine, engine_version: str, prompts_per_call: int) -> SingleTurn:
        return SingleTurn(
            engine=engine,
            judge=judge,
            tokenizer=prompts.tokenizer,
            config=config.rollout,
            run_seed=config.train.seed,
            max_len=config.data.max_len,
            engine_version=engine_version,
            tokenizer_hash=prompts.tokenizer_hash,
            template_hash=prompts.template_hash,
            prompts_per_call=prompts_per_call,
        )

    samples = config.rollout.batch_size * config.rollout.n_samples_per_prompt
    eos = prompts.tokenizer.eos_token_id
    return Plan(
        config=config,
        models=models,
        optimiser_steps=steps * math.ceil(samples / config.train.batch_size) * config.train.max_epochs,
        vocabulary=len(prompts.tokenizer),
        eos_token_ids=() if eos is None else (int(str(eos)),),
        executor=executor,
        source=prompts.steps,
        logs=logs,
        on_start=on_start,
        on_phase=on_phase,
    )
