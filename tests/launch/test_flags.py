"""The command line: names, values, aliases; every fault found, none swallowed."""

import pytest

from hone.algos.algorithms.correction import Correction
from tests.launch.asking import only, settled, typed


@pytest.mark.parametrize("name", ["--rollout.batch-size", "--rollout.batch_size"])
@pytest.mark.parametrize("join", [" ", "="])
def test_hyphens_and_underscores_and_the_equals_sign_are_one_spelling(name: str, join: str) -> None:
    answer = settled(f"ppo {name}{join}16")
    assert answer.config.rollout.batch_size == 16
    assert answer.sources["rollout.batch_size"] == f"flag {name}"


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("--data.apply-chat-template", True),
        ("--data.no-apply-chat-template", False),
        ("--no-data.apply-chat-template", False),
        ("--data.apply_chat_template True", True),
        ("--data.apply-chat-template false", False),
        ("--data.apply-chat-template=True", True),
    ],
)
def test_a_switch_can_be_written_in_every_usual_way(words: str, value: bool) -> None:
    assert settled(f"ppo {words}").config.data.apply_chat_template is value


def test_the_last_of_two_equal_flags_wins_as_scripts_expect() -> None:
    assert settled("ppo --train.seed 1 --train.seed 2").config.train.seed == 2


def test_numbers_text_tuples_and_none() -> None:
    config = settled(
        "ppo --actor.adam.lr 3e-5 --actor.adam.betas 0.8 0.99 --ckpt.save-steps -1 --algo.value-clip none --data.input-key q"
    ).config
    assert config.actor.adam.lr == 3e-5
    assert config.actor.adam.betas == (0.8, 0.99)
    assert config.ckpt.save_steps == -1
    assert config.algo.value_clip is None
    assert config.data.input_key == "q"


def test_openrlhf_names_that_live_elsewhere_are_translated() -> None:
    algo = settled("ppo --actor.eps-clip 0.3 --actor.dual_clip 3 --actor.entropy-coef 0.01 --critic.value-clip 0.7").config.algo
    assert (algo.clip.low, algo.clip.high, algo.clip.dual, algo.entropy_coef, algo.value_clip) == (0.3, 0.3, 3.0, 0.01, 0.7)
    algo = settled("grpo --actor.eps-clip-low-high 0.1 0.28").config.algo
    assert (algo.clip.low, algo.clip.high) == (0.1, 0.28)


def test_openrlhfs_correction_threshold_is_both_bounds() -> None:
    words = "--algo.correction.level token --algo.correction.mode mask --algo.advantage.is_correction_threshold 0.5 5.0"
    correction = settled(f"reinforce {words}").config.algo.correction
    assert correction == Correction(level="token", mode="mask", low=0.5, high=5.0)


def test_debug_is_short_for_run_debug() -> None:
    assert settled("ppo --debug").config.run.debug is True


@pytest.mark.parametrize(
    ("words", "what", "mend"),
    [
        # spec C.3 row 5
        ("--train.batch-size abc", "expected int, got `abc`", "default is 128"),
        ("--train.batch-size 2.5", "expected int, got `2.5`", "at least 1"),
        ("--train.batch-size", "expected int, got nothing", ""),
        ("--train.max-steps x", "expected int or None, got `x`", ""),
        ("--train.batch-size 0", "0 is out of range; it must be at least 1", ""),
        ("--actor.adam.lr nan", "nan is out of range; it must be in [0, 1)", ""),
        ("--actor.adam.betas 0.9", "expected 2 values (float float), got `0.9`", ""),
        ("--actor.adam.betas 0.9 1", "1.0 is out of range; it must be in [0, 1)", "each in [0, 1)"),
        # row 10
        ("--algo.kl.estimator k4", "expected one of k1, k2, k3, got `k4`", ""),
        ("--data.apply-chat-template maybe", "expected True or False, got `maybe`", ""),
        ("--data.no-apply-chat-template True", "takes no value, got `True`", ""),
        ("--train.batch-size 3 4", "unexpected argument `4`", ""),
        ("train.batch_size=32", "unexpected argument `train.batch_size=32`", "--train.batch-size 32"),
        ("-train.seed 3", "unknown option -train.seed", "--train.seed"),
        ("--config", "--config takes one FILE, got nothing", ""),
        ("--print-config yes", "--print-config takes no value, got `yes`", ""),
        ("--actor.eps-clip-low-high 0.1", "expected float, got nothing", ""),
        ("--run.dir \udcff", "expected text or None", ""),
    ],
)
def test_a_bad_value_says_what_was_expected_and_what_came(words: str, what: str, mend: str) -> None:
    problem = only(typed(f"ppo {words}"))
    assert what in problem.what
    assert mend in problem.mend
    assert problem.where


@pytest.mark.parametrize(
    ("words", "mend"),
    [
        # rows 2, 3, 4
        ("--actor.learing-rate 1e-6", "did you mean --actor.adam.lr?"),
        ("--actor.lr 1e-6", "use --actor.adam.lr"),
        ("--actor_learning_rate 1e-6", "use --actor.adam.lr"),
        ("--pretrain x", "use --actor.model-name-or-path"),
        ("--init_kl_coef 0.1", "use --algo.kl.init-coef"),
        ("--remote_rm_url x", "use --reward.remote-url"),
        ("--rollout.n-sample-per-promt 3", "did you mean --rollout.n-samples-per-prompt?"),
        ("--n_samples_per_prompt 3", "use --rollout.n-samples-per-prompt"),
        ("--batch-size 3", "did you mean --rollout.batch-size or --train.batch-size?"),
        ("--num_generations 8", "use --rollout.n-samples-per-prompt"),
        ("--actor_rollout_ref.rollout.n 8", "use --rollout.n-samples-per-prompt"),
        ("--colocate_all_models", "--placement.policy"),
        ("--algo.advantage.estimator gae", "the algorithm is the command: `launch ppo`"),
        ("--algo.advantage.estimator group_norm", "`launch grpo`"),
        ("--advantage_estimator reinforce-baseline", "`launch reinforce_baseline`"),
        ("--algorithm.adv-estimator reinforce_plus_plus", "`launch reinforce`"),
        ("--algorithm.adv_estimator remax", "`launch remax`"),
        ("--algorithm.adv_estimator gpg", "one of ppo, reinforce, reinforce_baseline, rloo, grpo, "),
        ("--actor.policy_loss_type gspo", "`launch gspo`"),
        ("--actor.policy_loss_type ppo", "drop it: `launch ppo`, `launch grpo` and most other"),
        ("--actor_rollout_ref.actor.policy_loss.loss_mode geo_mean", "`launch gmpo`"),
        ("--loss_type dapo", "`launch dapo`"),
        ("--importance_sampling_level sequence", "`launch gspo`"),
        ("--algo.advantage.is_correction_enable", "use --algo.correction.level token"),
        ("--algo.advantage.is_correction_type icepop", "use --algo.correction.level token --algo.correction.mode mask"),
        ("--algo.advantage.is-correction-type seq-mask-tis", "use --algo.correction.level geometric"),
        ("--enable_vllm_is_correction", "use --algo.correction.level token"),
        ("--vllm_is_correction_type tis", "use --algo.correction.level token --algo.correction.mode clip"),
        ("--vllm_is_truncated_threshold 0.5 5", "use --algo.correction.low LOW --algo.correction.high HIGH"),
        ("--vllm_importance_sampling_mode sequence_mask", "use --algo.correction.level sequence --algo.correction.mode mask"),
        ("--vllm_importance_sampling_cap 2", "use --algo.correction.high"),
        ("--algorithm.rollout_correction.rollout_is sequence", "use --algo.correction.level sequence"),
        ("--micro_train_batch_size 4", "--train.micro-batch-size"),
        ("--rollout.micro_batch_size 4", "train.max_tokens_per_gpu"),
        ("--zzzzzz", "--help"),
    ],
)
def test_an_unknown_name_is_answered_with_ours(words: str, mend: str) -> None:
    assert mend in only(typed(f"ppo {words}")).mend


@pytest.mark.parametrize("words", ["--logger.wandb.key sekret", "--use_wandb sekret", "--logger.wandb.key=sekret", "--hf_token sekret"])
def test_a_secret_is_refused_and_never_repeated(words: str) -> None:
    # row 27
    problem = only(typed(f"ppo {words}"))
    assert "secret on the command line" in problem.what
    assert "sekret" not in str(problem)


@pytest.mark.parametrize(
    "words", ["--critic.adam.lr 1e-5", "--critic.value-clip 0.2", "--placement.critic other", "--critic_learning_rate 1e-5"]
)
def test_a_setting_of_another_command_says_which(words: str) -> None:
    assert only(typed(f"grpo {words}")).mend == "drop it: it belongs to `launch ppo`"


def test_a_clip_is_no_setting_of_an_algorithm_without_one() -> None:
    assert only(typed("sapo --actor.eps-clip 0.3")).mend == "drop it: it belongs to `launch ppo`"
    assert only(typed("grpo --algo.temperature-negative 1.1")).mend == "drop it: it belongs to `launch sapo`"


def test_every_problem_is_reported_not_only_the_first() -> None:
    problems = typed("ppo --a.b 1 --train.batch-size abc --pretrain x --algo.kl.estimator k4 --train.seed -1 --recipe desktop")
    assert len(problems) == 6
