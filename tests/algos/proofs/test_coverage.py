"""The books: which file has each public function's golden number and slow reference, and which table its laws.

Every public function of the package is read from the sources, so a new one fails here until its proofs are entered. The
algorithms, compositions of these functions, have test files of their own.
"""

import ast
import re
from pathlib import Path

import hone.algos.reduce
from hone.algos.conformance import LAWS
from tests.algos.proofs import test_estimators, test_extremes, test_gradchecks
from tests.algos.proofs.losses import ENTRIES

PACKAGE = Path(hone.algos.reduce.__file__).parent
TESTS = Path(__file__).parents[1]
ELSEWHERE = ("algorithms", "checks", "kernels", "offline", "table")
"""Modules that hold no mathematics of their own, or that of others again; they have test files of their own."""

GOLDEN = {
    "test_advantages.py": "gae discounted_returns row_sums spread group_centred group_normalised whiten",
    "test_batch.py": "pack select",
    "test_corrections.py": "log_weights correction_weights sequence_mask_tis off_policy_sequence_mask weights_of_kept "
    "decoupled_surrogate proximal_approximation sample_size_figures effective_sample_size mismatch_figures second_moment_mask "
    "self_normalised",
    "test_covariance_losses.py": "token_covariance clip_cov_loss kl_cov_loss",
    "test_distillation.py": "tempered_logp forward_kl reverse_kl generalised_jsd on_policy_distillation_advantages",
    "test_trust_region.py": "binary_tv binary_kl divergence_mask dppo_loss",
    "test_group_baselines.py": "action_counts group_index leave_one_out length_weighted_centred max_rl pass_at_k "
    "pass_at_k_advantages greedy_baselines greedy_centred group_figures",
    "test_judging.py": "judge optimiser_steps",
    "test_kl.py": "k1 k2 k3 kl_per_token kl_loss weighted_kl_loss log_ratio importance_ratio",
    "test_lambda_schedules.py": "decoupled_gae length_adaptive_lambda length_adaptive_gae",
    "test_package.py": "range_of",
    "test_padding.py": "pack_padded unpack_padded valid_slots",
    "test_policy_losses.py": "clipped_surrogate entropy_bonus",
    "test_preference.py": "anchor_sums kl_anchor kto_loss row_logp row_mean_logp split_pairs pair_weights dpo conservative_dpo robust_dpo "
    "ipo ipo_summed rpo simpo orpo odds_ratio log1mexp bradley_terry log_exp reward_centre",
    "test_process.py": "reward_token_logits reward_token_columns hard_process_loss soft_process_loss",
    "test_reduce.py": "token_weights weighted_sum",
    "test_sequence_losses.py": "gspo_loss gspo_token_loss gmpo_loss",
    "test_shaping.py": "clip_scores overlong_penalty stop_properly rescored update_moments normalise_scores varied_groups groups_in_range",
    "test_soft_losses.py": "reinforce_loss cispo_loss sapo_loss",
    "test_turn_credit.py": "turn_starts turn_gae anchor_centred anchor_normalised gigpo process_normalised",
    "test_value_and_supervised_losses.py": "nll squared_value_loss clipped_value_loss",
    "test_conformance.py": "example from_padded",
    "proofs/test_golden_numbers.py": "rows_of_tokens lumped_student_logp lumped_teacher_logp scaled_advantages upcast on_mask "
    "paired_loss violations",
}
REFERENCE = {
    "test_advantages.py": "gae discounted_returns group_normalised",
    "test_corrections.py": "correction_weights log_weights second_moment_mask self_normalised",
    "test_covariance_losses.py": "token_covariance kl_cov_loss",
    "test_distillation.py": "generalised_jsd forward_kl reverse_kl lumped_student_logp lumped_teacher_logp",
    "test_trust_region.py": "dppo_loss",
    "test_group_baselines.py": "leave_one_out length_weighted_centred max_rl pass_at_k_advantages group_figures",
    "test_kl.py": "k1 k2 k3 kl_per_token",
    "test_lambda_schedules.py": "decoupled_gae length_adaptive_gae",
    "test_policy_losses.py": "clipped_surrogate",
    "test_preference.py": "kto_loss dpo conservative_dpo robust_dpo ipo simpo orpo bradley_terry",
    "test_process.py": "hard_process_loss soft_process_loss",
    "test_reduce.py": "token_weights",
    "test_sequence_losses.py": "gspo_loss gspo_token_loss gmpo_loss",
    "test_shaping.py": "update_moments varied_groups groups_in_range",
    "test_soft_losses.py": "cispo_loss sapo_loss",
    "test_turn_credit.py": "turn_gae anchor_centred anchor_normalised process_normalised",
    "test_value_and_supervised_losses.py": "clipped_value_loss",
    "proofs/test_references.py": "sequence_mask_tis off_policy_sequence_mask proximal_approximation decoupled_surrogate "
    "effective_sample_size sample_size_figures mismatch_figures weights_of_kept binary_tv binary_kl divergence_mask clip_cov_loss "
    "whiten group_centred greedy_centred pass_at_k length_adaptive_lambda overlong_penalty stop_properly clip_scores normalise_scores "
    "rescored gigpo nll entropy_bonus reinforce_loss squared_value_loss on_policy_distillation_advantages kl_loss row_logp "
    "row_mean_logp pair_weights log_exp reward_centre rpo odds_ratio anchor_sums kl_anchor tempered_logp log1mexp",
}
NO_REFERENCE = {
    # One line of arithmetic or none: the golden number says all that a reference would.
    **dict.fromkeys(["upcast", "on_mask", "log_ratio", "importance_ratio", "weighted_sum", "scaled_advantages"], "one operation"),
    **dict.fromkeys(["row_sums", "spread", "rows_of_tokens", "action_counts", "group_index", "turn_starts"], "counts and copies"),
    **dict.fromkeys(["pack", "select", "pack_padded", "unpack_padded", "valid_slots", "split_pairs"], "moves numbers, changes none"),
    **dict.fromkeys(["greedy_baselines", "reward_token_logits", "reward_token_columns"], "looks numbers up, changes none"),
    **dict.fromkeys(["judge", "optimiser_steps", "range_of", "violations", "example", "from_padded"], "no formula"),
    "ipo_summed": "ipo by another name",
    "paired_loss": "the weighted sum of the table, and figures",
    "weighted_kl_loss": "test_kl.py enumerates its expectation, the table has its slope",
}
EXEMPT = {
    "ranges.choices_of": "reads an annotation; test_package.py",
    "ranges.require_valid": "refuses, computes nothing; test_package.py",
    "corrections.check_bounds": "refuses, computes nothing; test_corrections.py",
    "masking.cleared": "on_mask by clearing bits; test_masking.py holds them together",
    "masking.known_exp": "exp whose value is at hand; test_masking.py derives it twice",
    "masking.ones_where": "the bits for it",
    "conformance.plugin.pytest_configure": "pytest's hook; test_conformance.py runs pytest with it",
    "conformance.plugin.pytest_generate_tests": "pytest's hook; test_conformance.py runs pytest with it",
}


def _public() -> dict[str, str]:
    """Module and name of every public function -> its name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] in ELSEWHERE or any(part.startswith("_") and part != "__init__" for part in parts):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                found[f"{module}.{node.name}"] = node.name
    return found


LAW_NAMES = {law.__name__ for laws in LAWS.values() for law in laws.values()}
PUBLIC = {label: name for label, name in _public().items() if label not in EXEMPT}
MATHEMATICS = {label: name for label, name in PUBLIC.items() if not label.startswith("conformance.") or name not in LAW_NAMES}


def _entered(book: dict[str, str]) -> dict[str, str]:
    """Name -> file, each name once."""
    pairs = [(name, file) for file, names in book.items() for name in names.split()]
    assert len({name for name, _ in pairs}) == len(pairs)
    return dict(pairs)


def _mentions(file: str, name: str) -> bool:
    return re.search(rf"\b{name}\b", (TESTS / file).read_text()) is not None


def test_the_sources_were_read():
    assert len(PUBLIC) > 100 and "advantages.gae" in PUBLIC
    assert len(set(MATHEMATICS.values())) == len(MATHEMATICS)  # a name is enough to tell a function


def test_every_function_has_a_golden_number():
    book = _entered(GOLDEN)
    missing = [label for label, name in MATHEMATICS.items() if name not in book]
    assert not missing, f"derive a golden number by hand, and enter its test file in GOLDEN: {missing}"
    assert not [f"{file} does not mention {name}" for name, file in book.items() if not _mentions(file, name)]


def test_every_function_has_a_slow_reference_or_a_reason():
    book = _entered(REFERENCE)
    missing = [label for label, name in MATHEMATICS.items() if (name in book) == (name in NO_REFERENCE)]
    assert not missing, f"enter the file that compares it with a reference, or say why none does: {missing}"
    assert not [f"{file} does not mention {name}" for name, file in book.items() if not _mentions(file, name)]


def test_every_loss_is_in_the_table_of_laws():
    # A function that answers with a Loss and takes weights.
    losses = set()
    for path in PACKAGE.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.returns is not None:
                arguments = {argument.arg for argument in node.args.args}
                if ast.unparse(node.returns) == "Loss" and "weights" in arguments:
                    losses.add(f"{path.stem}.{node.name}")
    tabled = {label.split(":")[0] for label in ENTRIES}
    assert len(losses) > 30
    assert losses == tabled
    assert {label.split(":")[0] for family in test_extremes.FAMILIES for label, *_ in family(100.0, 1e300)} == tabled


NEITHER = {
    *("judge", "optimiser_steps", "range_of", "violations", "example", "from_padded", "pack", "select", "valid_slots", "turn_starts"),
    *("rows_of_tokens", "action_counts", "group_index", "reward_token_columns", "token_weights", "weights_of_kept", "pair_weights"),
    *("pass_at_k", "length_adaptive_lambda", "overlong_penalty", "varied_groups", "groups_in_range", "update_moments", "kl_anchor"),
    *("sample_size_figures", "effective_sample_size", "mismatch_figures", "second_moment_mask", "self_normalised", "group_figures"),
}
"""No gradient, no masked numbers beyond what their own files and the references poison: counts, plumbing, figures of a step."""


def test_every_functions_laws_are_in_one_of_the_tables():
    tables = {entry.split(":")[0] for entry in ENTRIES} | set(test_gradchecks.DIFFERENTIABLE)
    tables |= {entry.split(",")[0] for entry in test_estimators.TABLE}
    missing = [label for label, name in MATHEMATICS.items() if (label in tables) == (name in NEITHER)]
    assert not missing, f"enter it in losses.py, in DIFFERENTIABLE or in test_estimators.py: {missing}"
    assert tables <= set(MATHEMATICS)


def test_every_law_of_the_kit_is_held_to_a_fault():
    laws = {name for label, name in PUBLIC.items() if label.startswith(("conformance.losses.", "conformance.estimators."))}
    assert laws == LAW_NAMES
    assert "def test_every_law_catches_something" in (TESTS / "test_conformance.py").read_text()


def test_the_books_name_nothing_that_is_gone():
    names = set(MATHEMATICS.values())
    assert set(_entered(GOLDEN)) | set(_entered(REFERENCE)) | set(NO_REFERENCE) | NEITHER <= names
