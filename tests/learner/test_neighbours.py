"""A row of a pack and its neighbours: what they are, and where they stand, changes nothing of it, forward or backward."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedModel

from hone.algos.batch import Packed, select
from hone.learner.heads import ValueHead
from hone.learner.model import CriticModel, PolicyModel, load_critic, load_policy
from tests.learner.one_step import MODELS
from tests.learner.tiny import make_batch, save_config

LENGTHS = [7, 12, 1, 20, 9]
CPU = torch.device("cpu")


@pytest.fixture(params=MODELS)
def models(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PolicyModel, CriticModel]:
    directory = save_config(tmp_path, MODELS[request.param])
    policy = load_policy(directory, dtype=torch.float32, device=CPU)
    critic = load_critic(directory, dtype=torch.float32, device=CPU, value_head_prefix="score")
    nn.init.normal_(next(module for module in critic.modules() if isinstance(module, ValueHead)).weight)
    return policy, critic


def body_of(model: PolicyModel | CriticModel) -> PreTrainedModel:
    return model.causal_lm if isinstance(model, PolicyModel) else model.backbone


def results(model: PolicyModel | CriticModel, batch: Packed, *, spoilt: Tensor | None = None) -> list[Tensor]:
    """Everything the model says of the batch's tokens, and the gradient of its sum at each token's embedding; `spoilt` ones are NaN."""
    embeddings: list[Tensor] = []

    def watch(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        spoiled = output if spoilt is None else output.masked_fill(spoilt[None, :, None], float("nan"))
        embeddings.append(spoiled.detach().requires_grad_())
        return embeddings[-1]

    hook = body_of(model).get_input_embeddings().register_forward_hook(watch)
    inputs = (batch.tokens, batch.position_ids, batch.cu_seqlens, batch.action_mask)
    said = list(model(*inputs, 0.8, True)) if isinstance(model, PolicyModel) else [model(*inputs)]
    hook.remove()
    clean = torch.ones_like(batch.action_mask) if spoilt is None else ~spoilt
    (gradient,) = torch.autograd.grad(sum((one[clean] * torch.arange(1.0, 1 + int(clean.sum()))).sum() for one in said), embeddings[-1:])
    return [*(one.detach() for one in said), gradient[0]]


def test_nan_in_other_rows_changes_nothing(models: tuple[PolicyModel, CriticModel]) -> None:
    batch = make_batch(LENGTHS)
    for model in models:
        for row in range(batch.rows):
            spoilt = batch.row_of_token != row
            alone = results(model, batch), results(model, batch, spoilt=spoilt)
            for whole, got in zip(*alone, strict=True):
                assert got[~spoilt].isfinite().all()
                if whole.dim() == 1:  # an expert multiplies tokens of all rows at once, and another number of them rounds otherwise
                    rounding = 2e-6 if hasattr(body_of(model).config, "num_experts") else 0.0
                    assert_close(got[~spoilt], whole[~spoilt], rtol=0, atol=rounding)
        planted = results(model, batch, spoilt=batch.row_of_token == 1)[0]
        assert planted[(batch.row_of_token == 1) & batch.action_mask].isnan().all(), "nothing was planted"


def test_a_rows_gradient_is_its_own_beside_nan(models: tuple[PolicyModel, CriticModel]) -> None:
    batch = make_batch(LENGTHS)
    for model in models:
        for row in (1, 3):
            spoilt = batch.row_of_token != row
            beside, alone = results(model, batch, spoilt=spoilt), results(model, select(batch, [row]))
            for got, expected in zip(beside, alone, strict=True):
                assert_close(got[~spoilt], expected, rtol=1e-5, atol=1e-5 * max(1e-3, float(expected.abs().max())))


@pytest.mark.parametrize("order", [[4, 3, 2, 1, 0], [1, 4, 0, 3, 2], [2, 3, 4, 0, 1]])
def test_neighbours_in_another_order_change_nothing(models: tuple[PolicyModel, CriticModel], order: list[int]) -> None:
    batch = make_batch(LENGTHS)
    permuted = select(batch, order)
    starts = permuted.cu_seqlens.tolist()
    for model in models:
        here, there = ([*one[:-1]] for one in (results(model, batch), results(model, permuted)))
        for one, other in zip(here, there, strict=True):
            back = torch.cat([other[starts[order.index(row)] : starts[order.index(row) + 1]] for row in range(batch.rows)])
            assert_close(back, one, rtol=1e-6, atol=2e-6)
