"""TRL's own trainers over given rows, in an environment of their own: `python trl_programs.py KIND MODEL ROWS OUT SETTINGS`.

SETTINGS is a JSON object of the trainer's own arguments. Writes [seconds since the start, tokens, loss] of every optimiser step, the
tokens without padding. Knows nothing of this project.
"""

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from datasets import Dataset

TRAINERS = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig)}


class Watch(TrainerCallback):
    """The end of every optimiser step, and what went into it."""

    def __init__(self) -> None:
        self.steps: list[list[float]] = []
        self.tokens, self.loss = 0, 0.0

    def on_step_end(self, args, state, control, **more) -> None:
        """A step is done."""
        self.steps.append([time.perf_counter(), self.tokens, self.loss])
        self.tokens, self.loss = 0, 0.0


def main(kind: str, model: str, rows: str, out: str, settings: str) -> None:
    torch.manual_seed(0)
    trainer_class, config_class = TRAINERS[kind]
    config = config_class(
        output_dir=f"{out}.d",
        num_train_epochs=1,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        warmup_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        train_sampling_strategy="sequential",
        disable_tqdm=True,
        **json.loads(settings),
    )
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    data = Dataset.from_list([json.loads(line) for line in Path(rows).read_text().splitlines()])
    watch = Watch()
    own = {"args": config, "train_dataset": data, "processing_class": AutoTokenizer.from_pretrained(model), "callbacks": [watch]}
    trainer = trainer_class(model=loaded, **own)
    step = trainer.training_step

    def counted(model: torch.nn.Module, inputs: dict[str, torch.Tensor], *more: object) -> torch.Tensor:
        mask = inputs.get("attention_mask")
        watch.tokens += int(inputs["input_ids"].numel() if mask is None else mask.sum())
        loss = step(model, inputs, *more)
        watch.loss += float(loss)
        return loss

    trainer.training_step = counted
    trainer.train()
    Path(out).write_text(json.dumps(watch.steps))


if __name__ == "__main__":
    main(*sys.argv[1:])
