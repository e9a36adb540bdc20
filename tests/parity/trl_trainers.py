"""TRL's own trainers on given rows, in an environment of their own: `python trl_trainers.py KIND MODEL ROWS OUT`.

Writes one object a step, with loss and gradient norm, as TRL logs them. Knows nothing of this project.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from datasets import Dataset

TRAINERS = {
    "sft": (SFTTrainer, SFTConfig),
    "dpo": (DPOTrainer, DPOConfig),
    "kto": (KTOTrainer, KTOConfig),
    "rm": (RewardTrainer, RewardConfig),
}


def main(kind: str, model: str, rows: str, out: str) -> None:
    torch.manual_seed(0)
    trainer_class, config_class = TRAINERS[kind]
    config = config_class(
        output_dir=f"{out}.d",
        per_device_train_batch_size=6,
        num_train_epochs=1,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        warmup_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-8,
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        max_length=64,
        train_sampling_strategy="sequential",
        disable_tqdm=True,
    )
    classes = AutoModelForSequenceClassification if kind == "rm" else AutoModelForCausalLM
    loaded = classes.from_pretrained(model, dtype=torch.float32, **({"num_labels": 1} if kind == "rm" else {}))
    if kind == "rm":  # a fresh head says nothing, as ours does
        torch.nn.init.zeros_(loaded.score.weight)
    data = Dataset.from_list([json.loads(line) for line in Path(rows).read_text().splitlines()])
    trainer = trainer_class(model=loaded, args=config, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(model))
    trainer.train()
    steps = [{"loss": log["loss"], "grad_norm": log["grad_norm"]} for log in trainer.state.log_history if "loss" in log]
    Path(out).write_text(json.dumps(steps))


if __name__ == "__main__":
    main(*sys.argv[1:])
