"""The commands there are; read by the front screen, so nothing heavy is imported here."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Verb:
    """A command: the `section` it is listed under, a `summary` of one line, a `story` of two or three, and examples."""

    section: str
    summary: str
    story: str
    examples: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()
    """Of a command whose options are no settings of a configuration: each with its meaning."""


# Broken where a shell goes on reading, so that it can be pasted from a narrow terminal.
_OWN = """\\
    --actor.model-name-or-path DIR --data.prompt-dataset FILE.jsonl \\
    --data.label-key answer --reward.remote-url reward.py"""

_OWN_ROWS = "--model.model-name-or-path DIR --data.dataset FILE.jsonl"


def _learnt(verb: str, summary: str, story: str) -> Verb:
    """A command that learns from rewards and has a model and a task of its own to try it on."""
    return Verb(
        section="reinforcement learning",
        summary=summary,
        story=f"{story} Without arguments it trains a small model of its own on a built-in task.",
        examples=(f"launch {verb}", f"launch {verb} {_OWN}", f"launch {verb} --config run.toml --train.seed 7 --print-config"),
    )


VERBS = {
    "ppo": _learnt(
        "ppo",
        "clipped surrogate with a critic (PPO)",
        "Samples responses, judges them, and trains the policy on a clipped surrogate whose advantages come from a critic (GAE).",
    ),
    "reinforce": _learnt(
        "reinforce",
        "rewards to go, whitened over the rollout (REINFORCE++)",
        "Neither a critic nor groups: the baseline is the mean of the whole rollout, so one sample of a prompt is enough.",
    ),
    "reinforce_baseline": _learnt(
        "reinforce_baseline",
        "less the group's mean, then whitened (REINFORCE++)",
        "Takes the mean of its prompt's samples off each reward and scales by the deviation of the whole rollout, "
        "so that groups which nearly agree are not blown up.",
    ),
    "rloo": _learnt(
        "rloo",
        "each sample against its prompt's other samples (RLOO)",
        "The baseline of a sample is the mean of its prompt's other samples; the KL penalty is part of what is compared. "
        "The paper clips nothing: let train.batch_size be the samples of a whole rollout, and nothing is.",
    ),
    "grpo": _learnt(
        "grpo",
        "group-relative advantages, no critic (GRPO)",
        "Samples a group of responses for each prompt and trains the policy on how each compares with its group.",
    ),
    "dr_grpo": _learnt(
        "dr_grpo",
        "GRPO without its length and deviation biases (Dr. GRPO)",
        "As grpo, but rewards are not divided by their group's deviation, and the loss is divided by a constant length, "
        "rollout.max_new_tokens unless you say otherwise.",
    ),
    "dapo": _learnt(
        "dapo",
        "GRPO with a higher upper clip, by token, no KL (DAPO)",
        "As grpo, but good tokens may rise further, every token weighs the same, and no reference model is loaded. "
        "The paper's dynamic sampling and overlong penalty are not part of it.",
    ),
    "gspo": _learnt(
        "gspo",
        "one ratio for each response, clipped as a whole (GSPO)",
        "As grpo, but a response is kept or clipped whole, by the geometric mean of its tokens' ratios; the bounds are far narrower.",
    ),
    "cispo": _learnt(
        "cispo",
        "capped ratios, every token keeps its gradient (CISPO)",
        "As grpo, but instead of clipping a token away its ratio is capped and held constant.",
    ),
    "sapo": _learnt(
        "sapo",
        "a soft gate in place of the clip (SAPO)",
        "As grpo, but a token fades as its ratio leaves one, bad tokens faster than good ones.",
    ),
    "gmpo": _learnt(
        "gmpo",
        "geometric mean of a response's token ratios (GMPO)",
        "As grpo, but token ratios are clipped in log space and averaged geometrically, so one wild token moves a response little.",
    ),
    "vapo": _learnt(
        "vapo",
        "PPO, lambda by length, right answers imitated (VAPO)",
        "As ppo, but the lambda of the advantages grows with the response, the critic's targets are the rewards that came, and "
        "responses with a reward above algo.correct_above are imitated. The paper trains the critic alone for 50 steps first: "
        "--critic.freezing-steps 50.",
    ),
    "opo": _learnt(
        "opo",
        "the group baseline of least variance (OPO)",
        "The baseline is the mean of a prompt's rewards weighted by length. Exactly on policy in the paper: "
        "let train.batch_size be the samples of a whole rollout.",
    ),
    "remax": _learnt(
        "remax",
        "each sample against its prompt's greedy response (ReMax)",
        "The baseline of a sample is the reward of the response the policy finds likeliest, which is drawn and judged beside it "
        "and not learnt from; one sample of a prompt is enough. The paper clips nothing: let train.batch_size be the samples of a "
        "whole rollout, and nothing is.",
    ),
    "on_policy_distill": Verb(
        section="distillation",
        summary="a teacher judges every token the policy samples",
        story=(
            "The reference model is the teacher: an advantage is how much likelier it finds a token than the policy does. "
            "Rewards are recorded and not learnt from. The teacher shares the policy's tokenizer and has to be named."
        ),
        examples=(
            "launch on_policy_distill --ref.model-name-or-path TEACHER",
            f"launch on_policy_distill --ref.model-name-or-path TEACHER {_OWN}",
            "launch on_policy_distill --config run.toml --train.seed 7 --print-config",
        ),
    ),
}


def _labelled(verb: str, summary: str, story: str, *examples: str) -> Verb:
    """A command that learns from labelled rows and has a model and rows of its own to try it on."""
    own = f"launch {verb} {_OWN_ROWS}"
    return Verb(
        section="learning from labelled rows",
        summary=summary,
        story=f"{story} Without arguments it trains a small model of its own on rows of a built-in task.",
        examples=(f"launch {verb}", own, *examples),
    )


OFFLINE = {
    "sft": _labelled(
        "sft",
        "imitate answers (supervised fine-tuning)",
        "Trains a model on prompts and answers, on conversations (--data.apply-chat-template), or on documents (--data.pretrain-mode). "
        "What the assistant says is trained on, its end included, and nothing else.",
        "launch sft --data.dataset documents.jsonl --data.pretrain-mode --model.model-name-or-path DIR",
    ),
    "rm": _labelled(
        "rm",
        "a reward model from pairs of answers",
        "Trains a model to score the chosen answer above the rejected one. The result loads as AutoModelForSequenceClassification, "
        "with the mean and deviation of its scores in its configuration.",
        "launch rm --loss log_exp",
    ),
    "prm": _labelled(
        "prm",
        "a process reward model from judged steps",
        "Trains a model to tell at the end of each step whether it was good: a classifier of tokens, or, with --data.reward-tokens, a "
        "language model that says one of two tokens.",
        "launch prm --data.dataset steps.jsonl --data.placeholder-token '<step>' --data.reward-tokens +,- --model.model-name-or-path DIR",
    ),
    "dpo": _labelled(
        "dpo",
        "prefer one answer to another (DPO, IPO, SimPO, ...)",
        "Trains a policy on pairs of answers; --loss chooses among dpo, cdpo, ipo, rpo, simpo and orpo. The reference model is asked once "
        "for every row before training, and what it said is kept for the next run.",
        "launch dpo --loss simpo",
    ),
    "kto": _labelled(
        "kto",
        "learn from answers judged one by one (KTO)",
        "Trains a policy on answers that were found good or bad. Its anchor is measured on prompts joined with other prompts' answers, "
        "which are chosen once for the whole data, so that a batch of any size from two has a true one.",
    ),
    "kd": Verb(
        section="distillation",
        summary="a student learns a teacher's distributions",
        story=(
            "Trains a model towards a teacher's distribution at every token of given answers, mixed with the answers' own likelihood. "
            "The teacher shares the tokenizer and may be of any size. Without arguments a small model learns from another one that "
            "knows a built-in task."
        ),
        examples=(
            "launch kd",
            f"launch kd --teacher.model-name-or-path TEACHER {_OWN_ROWS}",
            "launch kd --teacher.top-k 0 --algo.divergence reverse",
            "launch kd --kd.student-samples   # the student's own samples: launch on_policy_distill",
        ),
    ),
}
"""Commands of the loop over labelled rows."""

_JUDGED = """\\
    --model.model-name-or-path DIR --data.prompt-dataset FILE.jsonl \\
    --data.label-key answer --reward.remote-url reward.py"""

USING = {
    "generate": Verb(
        section="using a model",
        summary="responses to prompts, into a file",
        story=(
            "Draws responses to every prompt with vLLM, or with transformers in this process (--run.backend local), and writes a row for "
            "each, as JSON lines or Parquet. With a reward each is judged; --best-of keeps the best alone. A run that was stopped goes on "
            "where it was when it is started again. Without arguments the built-in model answers a built-in task."
        ),
        examples=(
            "launch generate",
            "launch generate --model.model-name-or-path DIR --data.prompt-dataset FILE.jsonl --out responses.parquet",
            f"launch generate --best-of 8 {_JUDGED}",
        ),
    ),
    "eval": Verb(
        section="using a model",
        summary="how often a model is right (pass@k), per source",
        story=(
            "Draws several responses to every prompt, has them judged, and prints pass@k (the unbiased estimate) for the whole and for "
            "each data source. Report and responses are in the run directory. Without arguments the built-in model is measured on a "
            "built-in task."
        ),
        examples=(
            "launch eval",
            f"launch eval --rollout.n-samples-per-prompt 8 --rollout.temperature 0.8 {_JUDGED}",
            "launch eval --eval.k 1,8 --rollout.n-samples-per-prompt 16",
        ),
    ),
    "chat": Verb(
        section="using a model",
        summary="a conversation with a model in the terminal",
        story=(
            "Answers what is typed, token by token, with vLLM or, with --engine transformers, in this process. What was said is kept and "
            "rendered with the model's chat template; a model without one, or --raw, completes each line as it stands. /help lists the "
            "commands; Ctrl-C stops the answer, Ctrl-D ends. Lines piped in are answered one by one. Without arguments the built-in model "
            "completes sums."
        ),
        examples=(
            "launch chat",
            "launch chat DIR --engine transformers --system 'Answer briefly.'",
            "echo '3+4=' | launch chat --rollout.temperature 0",
        ),
    ),
    "serve-rm": Verb(
        section="using a model",
        summary="a reward model or function behind HTTP",
        story=(
            "Answers POST /get_reward as OpenRLHF's server does, for --reward.remote-url of any training command: a reward model "
            "(--model.model-name-or-path) or a reward function (--reward.remote-url). Listens on loopback; HONE_REWARD_TOKEN in the "
            "environment is the bearer token it asks for. Ctrl-C ends it."
        ),
        examples=(
            "launch serve-rm --model.model-name-or-path runs/rm-20260101-120000/model",
            "launch serve-rm --reward.remote-url reward.py --server.port 5001",
            "launch grpo --reward.remote-url http://127.0.0.1:5000/get_reward   # in another terminal",
        ),
    ),
}
"""Commands that use a model and train none; their settings are in `using_config.py`."""

TOOLS = {
    "export": Verb(
        section="checkpoints",
        summary="a checkpoint's model in Hugging Face format",
        story=(
            "Writes a role of a checkpoint into a new directory that transformers and vLLM load, with its tokenizer; needs no GPU. "
            "CHECKPOINT is a step_N, a directory of them, a run directory, or what --resume takes besides."
        ),
        examples=(
            "launch export runs/ppo-20260101-120000 OUT",
            "launch export runs/ppo-20260101-120000/checkpoints/step_10 OUT --role critic",
            "launch export CHECKPOINT OUT --average     # of a run with --train.enable-ema",
            "launch export CHECKPOINT OUT --model DIR   # the model the run began with, where it has moved",
        ),
    ),
    "merge-lora": Verb(
        section="checkpoints",
        summary="a model with an adapter merged into it",
        story=(
            "Writes a new model directory, with its tokenizer, that needs no adapter any more. The adapter is one that PEFT or a run here "
            "wrote; it says itself whether it is of a policy or of a reward model, whose head it brings."
        ),
        examples=(
            "launch merge-lora MODEL runs/dpo-20260101-120000/model/adapter OUT",
            "launch merge-lora MODEL ADAPTER OUT --param-dtype bf16",
        ),
    ),
    "score": Verb(
        section="checkpoints",
        summary="a reward model, or a function, over a file",
        story=(
            "Writes every row of a file with its score, as JSON lines, or as Parquet where OUT ends in .parquet. MODEL is a reward "
            "model's directory; prompts and answers are read and "
            "rendered as `launch rm` does it. --function judges with a reward file instead: reward_func(queries, prompts, labels)."
        ),
        examples=(
            "launch score runs/rm-20260101-120000/model answers.jsonl scored.jsonl --normalize",
            "launch score MODEL pairs.jsonl scored.jsonl --answer-key chosen --apply-chat-template",
            "launch score --function examples/reward.py examples/sums.jsonl scored.jsonl --label-key answer",
        ),
        options=(
            ("--input-key NAME", "column of the prompts [default: one of the usual names]"),
            ("--answer-key NAME", "column of the answers [default: one of the usual names]"),
            ("--label-key NAME", "column that --function is given as labels [default: none]"),
            ("--apply-chat-template", "render prompts and answers with the tokenizer's chat template"),
            ("--normalize", "scores less the mean and by the deviation in the model's configuration"),
            ("--max-len N", "longest row [tokens, at least 1, default 2048]; a longer answer is cut"),
            ("--batch-size N", "rows read at once [at least 1, default 64]"),
            ("--param-dtype FORMAT", "fp32, bf16 or fp16: number format of the model's weights [default fp32]"),
            ("--function FILE.py", "judge with this reward function, in place of MODEL"),
        ),
    ),
    "template": Verb(
        section="data",
        summary="what a chat template does to sample conversations",
        story=(
            "`template check MODEL` prints whether answers begin where they are asked for, what is trained on, the stop token, the BOS, "
            "what becomes of system messages and thoughts, the thinking toggle, and whether supervised and reinforcement learning see the "
            "same prompt. Needs the tokenizer alone; ends with 3 where something would spoil training."
        ),
        examples=(
            "launch template check DIR",
            "launch template check OWNER/MODEL --data.tokenizer-chat-template chatml",
            "launch template check DIR --data.chat-template-kwargs '{\"enable_thinking\": false}'",
        ),
    ),
}
"""Commands that train nothing."""
