"""What vLLM makes of exported models, run as `python -m tests.learner.vllm_reads SPEC.json`: one import, one engine after another.

SPEC: {"tokens": [[...], ...], "policies": [directory, ...], "critics": [directory, ...], "out": file}. For each policy and row the
log-probabilities of its tokens but the first, for each critic and row the score before its last token (after the one before that).
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}


def engine(directory: str, **settings: Any) -> Any:
    from vllm import LLM

    size = {"kv_cache_memory_bytes": 2**25, "block_size": 32, "max_model_len": 64}
    return LLM(directory, dtype="float32", enforce_eager=True, **size, **settings)


def main(spec: dict[str, Any]) -> None:
    from vllm import PoolingParams, SamplingParams

    prompts, said = [{"prompt_token_ids": row} for row in spec["tokens"]], {}
    for directory in spec["policies"]:
        llm = engine(directory, skip_tokenizer_init=True)
        outputs = llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False), use_tqdm=False)
        said[directory] = [
            [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], row[1:], strict=True)]
            for output, row in zip(outputs, spec["tokens"], strict=True)
        ]
        del llm
        gc.collect()
    for directory in spec["critics"]:
        llm = engine(directory, runner="pooling")
        before = [{"prompt_token_ids": row[:-1]} for row in spec["tokens"]]
        outputs = llm.classify(before, pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
        said[directory] = [output.outputs.probs[0] for output in outputs]
        del llm
        gc.collect()
    Path(spec["out"]).write_text(json.dumps(said))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
