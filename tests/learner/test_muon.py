"""Muon against its formula written out, against torch's own, and each of its settings against doing nothing."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hone.learner.checkpoint.pieces import MASTER
from hone.learner.config import ActorConfig, AdamConfig, MuonConfig
from hone.learner.muon import Muon, hidden_matrix, orthogonalised
from hone.learner.optim import Training, optimiser
from tests.learner.engine_ranks import MAX_TOKENS
from tests.learner.processes import free_port, run_ranks
from tests.learner.settings_ranks import take_steps
from tests.learner.tiny import MIXTURE, make_learner, save_config

SETTINGS = MuonConfig(lr=0.05, momentum=0.9, nesterov=True, ns_steps=5, weight_decay=0.1)


def layers(*, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    module = torch.nn.Module()
    module.embed = torch.nn.Embedding(7, 4)
    module.layers = torch.nn.ModuleList([torch.nn.Linear(4, 6), torch.nn.Linear(6, 3)])
    return module


def trained(muon: MuonConfig, *, steps: int = 3, lr: float = 0.01) -> dict[str, torch.Tensor]:
    module = layers()
    config = ActorConfig(optim="muon", muon=muon, adam=AdamConfig(lr=lr), lr_scheduler="constant", lr_warmup_ratio=0.0)
    chosen = optimiser(module.named_parameters(), config)
    for step in range(steps):
        for index, parameter in enumerate(module.parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(10 * step + index))
        Training(config=config, total_steps=10).set_lr(chosen, step)
        chosen.step()
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def written_out(gradients: list[torch.Tensor], weight: torch.Tensor, muon: MuonConfig) -> torch.Tensor:
    """The formula in float64, singular values by the polynomial's own iteration on them: U p(S) V^T."""
    weight, buffer = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for gradient in (one.double() for one in gradients):
        buffer = muon.momentum * buffer + (1 - muon.momentum) * gradient
        update = (1 - muon.momentum) * gradient + muon.momentum * buffer if muon.nesterov else buffer
        left, values, right = torch.linalg.svd(update, full_matrices=False)
        values = values / values.norm()
        for _ in range(muon.ns_steps):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        change = left @ torch.diag(values) @ right
        rows, columns = weight.shape
        weight = weight * (1 - muon.lr * muon.weight_decay) - muon.lr * max(1.0, rows / columns) ** 0.5 * change
    return weight.float()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("momentum", "ns_steps"), [(0.9, 5), (0.0, 3), (0.95, 1)])
def test_the_formula_written_out(nesterov: bool, momentum: float, ns_steps: int) -> None:
    muon = MuonConfig(lr=0.05, momentum=momentum, nesterov=nesterov, ns_steps=ns_steps, weight_decay=0.1)
    found, names = trained(muon), [name for name, _ in layers().named_parameters()]
    for name in ("layers.0.weight", "layers.1.weight"):
        start = dict(layers().named_parameters())[name].detach()
        seeds = [10 * step + names.index(name) for step in range(3)]
        gradients = [torch.randn(start.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        assert_close(found[name], written_out(gradients, start, muon), rtol=1e-4, atol=1e-5)


def test_as_torchs_own_up_to_its_bf16() -> None:
    module, other = layers(), layers()
    mine = Muon([{"params": [module.layers[0].weight], "use_muon": True, **vars(SETTINGS)}])
    theirs = torch.optim.Muon(
        [other.layers[0].weight], lr=SETTINGS.lr, momentum=SETTINGS.momentum, weight_decay=SETTINGS.weight_decay, ns_steps=SETTINGS.ns_steps
    )
    for step in range(3):
        gradient = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        module.layers[0].weight.grad, other.layers[0].weight.grad = gradient.clone(), gradient.clone()
        mine.step()
        theirs.step()
    assert_close(module.layers[0].weight, other.layers[0].weight, rtol=0, atol=3 * SETTINGS.lr * 2**-6)
    assert_close(mine.state[module.layers[0].weight]["momentum_buffer"], theirs.state[other.layers[0].weight]["momentum_buffer"])


@pytest.mark.parametrize(
    "changed",
    [MuonConfig(lr=0.05, momentum=0.5), MuonConfig(lr=0.05, nesterov=False), MuonConfig(lr=0.05, ns_steps=3), MuonConfig(lr=0.02),
     MuonConfig(lr=0.05, weight_decay=0.2)],
    ids=["momentum", "nesterov", "ns_steps", "lr", "weight_decay"],
)  # fmt: skip
def test_every_setting_reaches_the_matrices_and_only_them(changed: MuonConfig) -> None:
    before, after = trained(MuonConfig(lr=0.05)), trained(changed)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"layers.0.weight", "layers.1.weight"}


def test_adamw_has_the_rest_with_its_own_learning_rate() -> None:
    before, after = trained(MuonConfig(), lr=0.01), trained(MuonConfig(), lr=0.02)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"embed.weight", "layers.0.bias", "layers.1.bias"}
    module = layers()
    adamw = torch.optim.AdamW([module.embed.weight], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(3):
        module.embed.weight.grad = torch.randn(7, 4, generator=torch.Generator().manual_seed(10 * step))
        adamw.step()
    assert torch.equal(module.embed.weight, before["embed.weight"])


def test_orthogonal_is_what_comes_out() -> None:
    update = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(update, steps=5))
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3
    assert_close(orthogonalised(update, steps=5).T, orthogonalised(update.T.contiguous(), steps=5))


def test_matrices_of_numbered_layers_are_hidden() -> None:
    matrix, vector = torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(2))
    assert hidden_matrix("model.layers.3.mlp.up_proj.weight", matrix)
    others = {"model.embed_tokens.weight": matrix, "lm_head.weight": matrix, "score.weight": matrix, "model.layers.3.norm.weight": vector}
    assert not any(hidden_matrix(name, parameter) for name, parameter in others.items())


def test_of_a_stack_of_experts_each_is_orthogonalised_by_itself() -> None:
    generator = torch.Generator().manual_seed(3)
    for shape in ((3, 8, 5), (3, 5, 8)):
        stack, gradients = torch.randn(shape, generator=generator), torch.randn(2, *shape, generator=generator)
        settings = {"lr": 0.02, "momentum": 0.9, "nesterov": True, "ns_steps": 5, "weight_decay": 0.1, "use_muon": True}
        whole, alone = nn.Parameter(stack.clone()), [nn.Parameter(one.clone()) for one in stack]
        ours, each = Muon([{"params": [whole], **settings}]), Muon([{"params": alone, **settings}])
        for step in gradients:
            whole.grad = step.clone()
            for one, gradient in zip(alone, step, strict=True):
                one.grad = gradient.clone()
            ours.step()
            each.step()
        assert_close(whole.detach(), torch.stack([one.detach() for one in alone]), rtol=1e-5, atol=1e-6)


def test_experts_matrices_are_muons_and_convolutions_are_not() -> None:
    stack = nn.Parameter(torch.zeros(2, 3, 4))
    assert hidden_matrix("model.layers.0.mlp.experts.gate_up_proj", stack)
    assert not hidden_matrix("model.layers.0.mixer.conv1d.weight", stack)


@pytest.mark.timeout(600)
def test_two_ranks_step_experts_as_plain_torch_does(tmp_path: Path) -> None:
    model = save_config(tmp_path / "model", MIXTURE)
    cases = {str(stage): {"stage": stage, "optim": "muon", "port": free_port()} for stage in (0, 1, 3)}
    (tmp_path / "spec.json").write_text(json.dumps({"model": model, "results": str(tmp_path / "results"), "cases": cases}))
    run_ranks("tests.learner.settings_ranks", tmp_path / "spec.json", root=tmp_path, ranks=2, timeout_s=560)
    learner = make_learner({"policy": model}, optim="muon", max_tokens=MAX_TOKENS, lr=1e-3)
    single = take_steps(learner)
    assert {one.section for one in learner.engines["policy"].pieces() if ".experts." in one.name} == {MASTER, "optimiser.momentum_buffer"}
    for rank in range(2):
        for name, found in torch.load(tmp_path / f"results-{rank}.pt").items():
            assert_close(found["norms"], single["norms"], rtol=1e-5, atol=1e-5)
            for key, weight in single["weights"].items():
                assert_close(
                    found["weights"][key], weight, rtol=1e-5, atol=3e-5, msg=lambda text, key=key, name=name: f"{name} {key}: {text}"
                )
