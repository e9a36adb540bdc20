"""A whole run on real Ray, vLLM and DeepSpeed whose engine serves the adapter over the model it started with."""

from pathlib import Path

import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hone.launch.observe.run_directory import read_metrics
from tests.launch.conftest import MADE_UP, SHORT_IS_GOOD, save_model, write_reward, write_rows
from tests.launch.running import started


def test_a_run_that_sends_only_the_adapter_samples_what_it_learns(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", tokenizer, kind="qwen3", tied=True)
    arguments = [
        *("grpo", "--actor.model-name-or-path", str(model), "--data.prompt-dataset", str(write_rows(tmp_path / "rows.jsonl", MADE_UP))),
        *("--data.input-key", "question", "--data.label-key", "answer"),
        *("--reward.remote-url", str(write_reward(tmp_path / "reward.py", SHORT_IS_GOOD))),
        *("--rollout.batch-size", "4", "--rollout.n-samples-per-prompt", "2", "--train.batch-size", "8"),
        *("--rollout.max-new-tokens", "8", "--data.max-len", "512", "--vllm.kv-cache-gib", "0.25", "--run.threads", "1"),
        *("--ds.lora.rank", "4", "--actor.adam.lr", "1e-2", "--vllm.sync-adapters-only", "--train.max-steps", "4"),
        *("--ds.zero-stage", "3", "--actor.num-gpus-per-node", "2"),
    ]
    with started(arguments, tmp_path / "run") as run:
        output = run.finish(limit_s=280)
    assert run.process.returncode == 0, output
    steps, _ = read_metrics(tmp_path / "run")
    assert len(steps) == 4
    for step in steps:
        assert step["mismatch/logp_abs_diff_max"] <= 1e-4 and step["sync/canary_abs_diff_max"] <= 1e-4
    tokens = torch.arange(3, 12)[None]
    base = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        before = base(input_ids=tokens).logits
        after = PeftModel.from_pretrained(base, tmp_path / "run" / "model" / "adapter")(input_ids=tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")(input_ids=tokens).logits
    assert float((after - before).abs().max()) > 1e-3  # it did learn, so what was served did change
    assert_close(after, merged, rtol=1e-4, atol=1e-4)
