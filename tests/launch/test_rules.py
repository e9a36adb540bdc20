"""Rules that join settings: each fires on what it is for, names both values and their sources, and says how to mend."""

import pytest

from hone.launch.resolve import resolve
from hone.launch.rules import broken, notes
from tests.launch.asking import crossed, only, resolved, settled

OWN = "--actor.model-name-or-path m --data.prompt-dataset p.jsonl --reward.remote-url r.py"


@pytest.mark.parametrize(
    ("line", "what", "mend"),
    [
        # spec C.3 row 7: 32 x 8 = 256 samples; divisors around 100 are 64 and 128
        (
            "ppo --train.batch-size 100",
            "100 does not divide the 256 samples of a rollout (32 prompts x 8)",
            "nearest --train.batch-size 64 or 128",
        ),
        ("ppo --train.batch-size 512", "512 is more than the 256 samples", "--train.batch-size 256 or a divisor"),
        ("ppo --rollout.n-samples-per-prompt 1", "256 is more than the 32 samples", "--train.batch-size 32"),
        ("ppo --train.batch-size 2 --actor.num-gpus-per-node 4", "4 learner ranks share an optimiser step of 2 samples", "4 or more"),
        # row 8
        ("grpo --rollout.n-samples-per-prompt 1 --train.batch-size 32", "at least 2 samples of a prompt, not 1", "`launch ppo`"),
        ("rloo --rollout.n-samples-per-prompt 1 --train.batch-size 32", "at least 2 samples of a prompt, not 1", "`launch ppo`"),
        ("on_policy_distill", "the reference model is the teacher here, and none is named", "--ref.model-name-or-path DIR"),
        (
            "on_policy_distill --actor.model-name-or-path m --ref.model-name-or-path ./m",
            "the teacher is the policy itself: every advantage would be 0",
            "--ref.model-name-or-path DIR",
        ),
        (
            "ppo --algo.advantage.is_correction_threshold 0.5 5",
            "algo.correction.level off does not read algo.correction.low, algo.correction.high",
            "--algo.correction.level token",
        ),
        ("grpo --algo.correction.normalize", "algo.correction.level off does not read algo.correction.normalize", "or drop"),
        ("grpo --algo.correction.level token --algo.correction.token-cap 3", "level token does not read", "choose another level"),
        ("grpo --algo.correction.level geometric --algo.correction.mode clip", "level geometric does not read", "choose another level"),
        ("grpo --vllm.min-engines 2", "the run needs 2 engines at least and has 1", "--vllm.min-engines 1 or fewer"),
        (
            "grpo --rollout.dynamic-filtering range --rollout.dynamic-filtering-range 1 0",
            "no mean score lies strictly between 1 and 0",
            "--rollout.dynamic-filtering-range LOW HIGH",
        ),
        (
            "ppo --rollout.dynamic-filtering variance --rollout.n-samples-per-prompt 1 --train.batch-size 32",
            "rewards of one sample do not vary",
            "--rollout.n-samples-per-prompt 8",
        ),
        (
            "grpo --rollout.dynamic-filtering-batches 3",
            "rollout.dynamic_filtering off does not read it",
            "--rollout.dynamic-filtering range",
        ),
        # row 22
        ("ppo --rollout.max-new-tokens 512", "512 tokens leaves no room for a prompt within data.max_len 512", "raise --data.max-len"),
        ("ppo --train.max-tokens-per-gpu 511", "a sample of 512 tokens does not fit a micro-batch of 511", "512 or more"),
        ("ppo --algo.kl.use-loss --algo.kl.init-coef 0", "KL penalty in the loss with weight 0", "drop --algo.kl.use-loss"),
        (f"ppo {OWN} --data.input-template Q:", "'Q:' has 0 places {} for the prompt", "write exactly one"),
        (f"ppo {OWN} --data.input-template {{}}{{}}", "has 2 places", ""),
        (f"ppo {OWN} --data.input-template {{}}\\nA:", "holds a backslash and an n", "for a line break, quote it as $'...'"),
        # row 18
        (f"ppo {OWN} --data.input-template {{}} --data.apply-chat-template", "exclude one another", "drop one of them"),
        ("ppo --data.label-key answer", "data.label_key describes a prompt dataset, and there is none", "add --data.prompt-dataset"),
        ("ppo --data.prompt-dataset p.jsonl --reward.remote-url r.py", "the built-in model reads only", "--actor.model-name-or-path DIR"),
        ("ppo --data.prompt-dataset p.jsonl --actor.model-name-or-path m", "your own prompts need a reward", "def reward_func"),
        ("ppo --ds.grad-accum-dtype bf16", "gradients of fp32 parameters cannot be summed in bf16", "--ds.grad-accum-dtype fp32"),
        ("ppo --ds.param-dtype fp16", "ds.param_dtype fp16 needs a GPU here", "--ds.param-dtype fp32"),
        ("ppo --ds.adam-offload --ds.zero-stage 0", "ds.adam_offload needs sharded optimiser states", "--ds.zero-stage 1, 2 or 3"),
        ("ppo --ds.cpu-adam deepspeed", "steps what is offloaded, and ds.adam_offload is off", "add --ds.adam-offload"),
        (
            "ppo --ds.cpu-adam deepspeed --ds.adam-offload --actor.optim muon",
            "is AdamW alone, and actor.optim is muon",
            "--ds.cpu-adam torch",
        ),
        ("ppo --ds.param-offload", "ds.param_offload needs sharded parameters, which ds.zero_stage 2 has not", "--ds.zero-stage 3"),
        ("ppo --ds.zpg 2 --ds.zero-stage 3", "ds.zpg 2 needs ds.zero_stage 3 and a number of ranks that it divides", "or drop --ds.zpg"),
        ("ppo --actor.muon.momentum 0.9", "actor.muon.momentum: actor.optim adam does not read it", "--actor.optim muon"),
        ("ppo --ds.deepcompile --ds.adam-offload", "ds.deepcompile keeps on the device what ds.adam_offload holds", "drop either"),
        ("ppo --ds.deepcompile --ds.lora.rank 4", "ds.deepcompile is for whole models", "--ds.lora.rank 0"),
        ("ppo --ds.deepcompile --ds.zero-stage 3", "there is no GPU here", "--ds.zero-stage 2, or drop --ds.deepcompile"),
        (
            "ppo --run.backend local --ds.zero-stage 0 --ds.overlap-comm",
            "run.backend local has no DeepSpeed, whose ds.overlap_comm is",
            "or --run.backend ray",
        ),
        ("ppo --ckpt.save-steps 0", "neither when nor never", "-1"),
        ("ppo --critic.freezing-steps 40", "the policy would never learn: it stands still for 40 steps of 40", "below 40"),
        ("ppo --placement.engine a/b", "`a/b` is no name for a group", "letters"),
        ("ppo --placement.engine=", "is no name for a group", "letters"),
        (
            "ppo --actor.num-gpus-per-node 2 --critic.num-gpus-per-node 3",
            "roles of group learner share its processes, but ask for different sizes: actor 1 x 2, critic 1 x 3, ref 1 x 2",
            "the same size, or a group of their own",
        ),
        ("ppo --actor.num-gpus-per-node 3 --ds.ring-attn-size 2", "do not fall into rings of 2: actor 3, critic 3, ref 3", "that divides"),
        ("grpo --run.backend local --ds.ring-attn-size 2", "do not fall into rings of 2: actor 1, ref 1", "that divides"),
        (
            "ppo --actor.num-gpus-per-node 3 --ds.tensor-parallel-size 2",
            "do not fall into models over 2 ranks: actor 3, critic 3, ref 3",
            "that divides",
        ),
        (
            "grpo --actor.num-gpus-per-node 2 --ds.tensor-parallel-size 2 --ds.ring-attn-size 2",
            "do not fall into models over 2 ranks in rings of 2: actor 2, ref 2",
            "that divides",
        ),
        (
            "grpo --actor.num-gpus-per-node 2 --ds.tensor-parallel-size 2 --ds.lora.rank 8",
            "ds.lora.rank is not there yet for a model over 2 ranks",
            "--ds.lora.rank 0, or --ds.tensor-parallel-size 1",
        ),
        (
            "grpo --actor.num-gpus-per-node 2 --ds.tensor-parallel-size 2 --actor.optim muon",
            "actor.optim is not there yet for a model over 2 ranks",
            "--actor.optim adam",
        ),
        ("ppo --ds.load-in-4bit", "ds.lora.rank 0 adds no adapters: nothing would train", "--ds.lora.rank 16"),
        ("grpo --ds.load-in-4bit --ds.lora.rank 8 --ds.zero-stage 3", "only make sense whole", "--ds.zero-stage 2"),
        ("ppo --ds.lora.target-modules q_proj", "ds.lora.target_modules without adapters does nothing", "--ds.lora.rank 16"),
        ("ppo --ds.ring-attn-head-stride 2", "ds.ring_attn_head_stride without a ring does nothing", "raise --ds.ring-attn-size"),
        (
            "ppo --ds.ring-attn-impl ring-flash-attn",
            "ds.ring_attn_impl without a ring does nothing",
            "raise --ds.ring-attn-size, or drop --ds.ring-attn-impl",
        ),
        (
            "ppo --actor.num-gpus-per-node 2 --ds.ring-attn-size 2 --train.max-tokens-per-gpu 200 --data.max-len 500",
            "a sample of 500 tokens does not fit a micro-batch of 400",
            "--train.max-tokens-per-gpu 250 or more",
        ),
        ("ppo --run.backend local --ds.zero-stage 3", "nothing to shard with zero_stage 3", "--ds.zero-stage 0"),
        ("ppo --run.backend local --actor.num-gpus-per-node 2", "one process, not 2 ranks (actor, critic, ref)", "--run.backend ray"),
        (
            "ppo --run.backend local --placement.critic gpu2 --critic.num-gpus-per-node 2",
            "one process, not 2 ranks (critic)",
            "--run.backend ray",
        ),
        (
            "grpo --run.backend local --placement.reference gpu2 --ref.num-nodes 3",
            "one process, not 3 ranks (ref)",
            "--run.backend ray",
        ),
        ("ppo --vllm.sync-backend nccl", "moves weights between GPUs, and none is visible", "auto"),
        ("ppo --vllm.sync-backend file --vllm.sync-delta", "vllm.sync_backend file sends all of them", "--vllm.sync-backend shared_memory"),
        ("ppo --vllm.sync-adapters-only", "ds.lora.rank 0 trains none", "--ds.lora.rank 16"),
        ("ppo --vllm.sync-adapters-only --ds.lora.rank 4 --vllm.sync-delta", "nothing for vllm.sync_delta to leave out", "drop one"),
        (
            "ppo --run.backend local --ds.zero-stage 0 --vllm.dtype bf16",
            "vllm.dtype: run.backend local has its engine",
            "--run.backend ray",
        ),
        ("ppo --run.backend local --ds.zero-stage 0 --vllm.sync-backend file", "copies the weights over", "--run.backend ray"),
    ],
)
def test_a_broken_rule_is_named_once(line: str, what: str, mend: str) -> None:
    problem = only(crossed(line))
    assert what in problem.what
    assert mend in problem.mend
    assert problem.where
    assert problem.code == 2


@pytest.mark.parametrize(
    "line",
    [
        "ppo --train.batch-size 64",
        "ppo --rollout.batch-size 4 --rollout.n-samples-per-prompt 1 --train.batch-size 4",
        "grpo --rollout.n-samples-per-prompt 2 --train.batch-size 64",
        "grpo --algo.kl.init-coef 0",  # use_loss is GRPO's own default
        "ppo --rollout.max-new-tokens 511",
        f"ppo {OWN} --data.input-template {{x}}{{}}{{y}}",
        "ppo --ckpt.save-steps 1",
        "ppo --critic.freezing-steps 39",
        "ppo --actor.num-gpus-per-node 2 --critic.num-gpus-per-node 3 --placement.critic apart",
        "grpo --actor.num-gpus-per-node 2",
        "ppo --run.backend local",
        "reinforce --rollout.n-samples-per-prompt 1 --train.batch-size 32",
        "vapo --rollout.n-samples-per-prompt 1 --train.batch-size 32",
        "on_policy_distill --ref.model-name-or-path t --rollout.n-samples-per-prompt 1 --train.batch-size 32",
        "on_policy_distill --actor.model-name-or-path m --ref.model-name-or-path t",
        "grpo --algo.correction.level token --algo.correction.mode mask --algo.correction.low 0.5 --algo.correction.high 5",
        "grpo --algo.correction.level geometric --algo.correction.token-cap 3 --algo.correction.normalize",
        "grpo --algo.correction.second-moment 0.04 --algo.correction.normalize",
        # no penalty, no reference model
        "ppo --run.backend local --placement.reference gpu2 --ref.num-gpus-per-node 2 --algo.kl.init-coef 0",
    ],
)
def test_what_is_at_the_border_of_a_rule_passes(line: str) -> None:
    assert crossed(line) == []


def test_the_place_of_a_rule_is_what_was_said_not_the_defaults() -> None:
    problem = only(crossed("ppo --train.batch-size 100 --rollout.batch_size 32"))
    assert problem.where == "--train.batch-size 100, --rollout.batch_size 32, rollout.n_samples_per_prompt = 8 (recipe laptop)"


def test_gpus_asked_and_visible_stand_in_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    # row 19
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    problem = only(crossed(f"ppo {OWN} --actor.num-gpus-per-node 8", gpus=1))
    head, learner, rollout = problem.what.split("\n")
    assert head == "9 GPUs asked, 1 visible"
    assert learner.split() == ["learner", "8", "policy,", "critic,", "reference"]
    assert rollout.split() == ["rollout", "1", "engine"]
    assert "--placement.engine learner" in problem.mend
    assert crossed(f"ppo {OWN} --placement.engine learner", gpus=1) == []
    assert crossed("ppo --actor.num-gpus-per-node 8 --train.batch-size 256", gpus=0) == []
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert crossed(f"ppo {OWN} --actor.num-gpus-per-node 8", gpus=1) == []


def test_ring_flash_attn_wants_a_gpu_and_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    line = f"ppo {OWN} --actor.num-gpus-per-node 2 --ds.ring-attn-size 2 --ds.ring-attn-impl ring-flash-attn --ds.param-dtype"
    told = only(crossed(f"{line} fp32", gpus=8))
    assert told.what == "ds.ring_attn_impl ring-flash-attn computes in bf16 and fp16 only, not in ds.param_dtype fp32"
    assert told.mend == "--ds.param-dtype bf16, or --ds.ring-attn-impl own"
    assert crossed(f"{line} bf16", gpus=8) == []
    told = only(crossed(f"{line} bf16", gpus=0))
    assert told.what == "ds.ring_attn_impl ring-flash-attn runs on CUDA only, and there is no GPU here"
    assert told.mend == "--ds.ring-attn-impl own"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert crossed(f"{line} bf16", gpus=0) == []


def test_a_rule_keeps_silent_about_a_value_that_was_refused() -> None:
    answer = resolved("ppo --train.batch-size abc --rollout.batch-size 7")
    assert len(answer.problems) == 1
    assert list(broken(answer, 0)) == []


def test_a_combination_a_dataclass_refuses_is_a_problem_of_its_group() -> None:
    problem = only(list(resolved("ppo --algo.reduction.over constant").problems))
    assert problem.what.startswith("algo.reduction: ")
    assert problem.where == "--algo.reduction.over constant"
    assert problem.mend == "add --algo.reduction.length 8, which is rollout.max_new_tokens, or drop --algo.reduction.over"
    problem = only(list(resolved("ppo --recipe none --algo.reduction.over constant").problems))
    assert "--algo.reduction.length 1024" in problem.mend
    problem = only(list(resolved("ppo --algo.reduction.length 64").problems))
    assert problem.mend == "drop --algo.reduction.length, or add --algo.reduction.over constant"
    assert settled("ppo --algo.reduction.over constant --algo.reduction.length 64").config.algo.reduction.length == 64


def test_a_remedy_a_dataclass_knows_is_the_mend() -> None:
    words = "--algo.kl.use-loss --algo.kl.gradient as_written"
    problem = only(list(resolved(f"ppo {words}").problems))
    assert problem.what.endswith("would hold nothing")
    assert problem.mend == "choose gradient 'reverse', or estimator 'k2' or 'k3'"


def test_notes_tell_what_runs_but_not_as_meant() -> None:
    assert "bf16 is several times slower" in " ".join(notes(settled("ppo --ds.param-dtype bf16"), 0))
    assert list(notes(settled(f"ppo {OWN} --ds.param-dtype bf16", gpus=2), 2)) == []
    assert "ref.model_name_or_path is not read" in " ".join(notes(settled("ppo --algo.kl.init-coef 0 --ref.model-name-or-path m"), 0))
    assert "vllm.num_engines: run.backend local" in " ".join(notes(settled("ppo --run.backend local --vllm.num-engines 2"), 0))


def test_the_constant_length_follows_the_longest_response_unless_one_was_given() -> None:
    def reduced(words: str) -> tuple[object, str]:
        answer = settled(f"dr_grpo {words}")
        return answer.config.algo.reduction.length, answer.sources["algo.reduction.length"]

    assert reduced("") == (8, "as rollout.max_new_tokens")  # the built-in recipe's
    assert reduced("--rollout.max-new-tokens 100") == (100, "as rollout.max_new_tokens")
    assert reduced("--recipe none") == (1024, "default")
    assert reduced("--algo.reduction.over sequence") == (None, "as algo.reduction.over")
    assert reduced("--algo.reduction.length 3000") == (3000, "flag --algo.reduction.length")


def test_a_constant_length_below_the_longest_response_is_noted() -> None:
    def said(words: str) -> str:
        return " ".join(notes(settled(words), 0))

    assert "algo.reduction.length 7 is meant to be the longest response" in said("dr_grpo --algo.reduction.length 7")
    assert "--algo.reduction.length 8" in said("grpo --algo.reduction.over constant --algo.reduction.length 7")
    assert said("dr_grpo --algo.reduction.length 8") == said("dr_grpo") == said("ppo") == ""


def test_a_teacher_is_read_without_a_penalty() -> None:
    assert list(notes(settled("on_policy_distill --ref.model-name-or-path t"), 0)) == []
    assert "ref.model_name_or_path is not read" in " ".join(notes(settled("dapo --ref.model-name-or-path m"), 0))
    assert list(notes(settled("dapo --ref.model-name-or-path m --algo.kl.init-coef 0.1"), 0)) == []


def test_values_with_spaces_reach_a_rule_whole() -> None:
    words = ["--data.input-template", "Question: {} Answer:", *OWN.split()]
    assert list(broken(resolve("ppo", words, gpus=0), 0)) == []


def test_engines_that_drop_their_weights_are_sent_all_of_them() -> None:
    line = "ppo --vllm.enable-sleep --vllm.sleep-level 2 --vllm.sync-delta"
    assert any("vllm.sleep_level 2 drops them" in problem.what for problem in crossed(line))
