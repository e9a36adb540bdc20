"""One rank of learning: hosts several roles, each a model in an engine, and works on this rank's shard of a batch.

Flow of one optimiser step: Batch --logp, values--> filled fields --(judging, elsewhere)--> Scored --update_*--> new weights
--weights--> whoever serves them. Knows no Ray; everything here is constructible in a test.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from hone.algos.batch import Batch, Scored, select
from hone.algos.protocol import Loss, Outputs
from hone.learner.config import ActorConfig, CriticConfig, DeepSpeedConfig, RefConfig
from hone.learner.engines.protocol import Engine
from hone.learner.engines.single import SingleEngine
from hone.learner.logprobs import Slopes
from hone.learner.model import load_critic, load_policy
from hone.learner.model_files import copy_tokenizer, resolve
from hone.learner.optim import Training
from hone.learner.packing import Shard
from hone.learner.per_token import PerToken, PolicyLoss


@runtime_checkable
class ValueLoss(Protocol):
    """The part of an algorithm that trains a critic."""

    def value_loss(self, values: Float[Tensor, " T"], scored: Scored) -> Loss:
        """Loss over any part of an optimiser step."""
        ...


@dataclass(frozen=True, kw_only=True)
class RoleSpec:
    """A model to host: what it is for, where it comes from, and how it is trained over `total_steps` optimiser steps."""

    kind: Literal["policy", "critic", "reference"]
    model: str
    config: ActorConfig | CriticConfig | RefConfig
    total_steps: int


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Of one optimiser step: this rank's share of every metric (shares add up over ranks), gradient norm, learning rate."""

    metrics: dict[str, float]
    grad_norm: float
    lr: float


class Learner:
    """One rank. Every method is collective: all ranks call it with their own shard of the same batch, in the same order.

    `max_tokens` caps every micro-batch [tokens]; `seed` fixes what a fresh model part draws.
    """

    def __init__(
        self,
        *,
        roles: Mapping[str, RoleSpec],
        ds: DeepSpeedConfig,
        backend: Literal["deepspeed", "single"],
        rank: int,
        world_size: int,
        master_addr: str,
        master_port: int,
        seed: int,
        max_tokens: int,
    ) -> None:
        if backend == "single" and world_size != 1:
            raise ValueError(f"the single-process engine has one rank, not {world_size}; choose the deepspeed backend for more")
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self.rank, self.backend, self.max_tokens = rank, backend, max_tokens
        self.sources = {role: resolve(spec.model) for role, spec in roles.items()}
        if backend == "deepspeed":
            from hone.learner.engines import deepspeed

            deepspeed.join(rank=rank, world_size=world_size, master_addr=master_addr, master_port=master_port, device=self.device)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            self.engines = {role: self._engine(role, spec, ds) for role, spec in roles.items()}

    def logp(self, role: str, shard: Shard) -> Float[Tensor, " T"]:
        """Log-probabilities [nats] of the shard's action tokens under the batch's temperature; no gradient, zero off the mask."""
        return self._evaluate(shard, lambda part: self._policy(role, part, with_entropy=False).logp)

    def values(self, role: str, shard: Shard) -> Float[Tensor, " T"]:
        """Values of the states before the shard's action tokens; no gradient, zero off the mask."""
        return self._evaluate(shard, lambda part: self._values(role, part))

    def update_policy(self, role: str, shard: Shard, algo: PolicyLoss) -> StepResult:
        """One optimiser step over all micro-batches of a Scored shard. Raises NumericsError; see `Engine.step`."""
        per_token = PerToken(algo)

        def loss_of(part: Scored) -> Loss:
            return algo.loss(self._policy(role, part, with_entropy=True, slopes=per_token.slopes(part)), part)

        return self._update(role, shard, loss_of)

    def update_critic(self, role: str, shard: Shard, algo: ValueLoss) -> StepResult:
        """One optimiser step of the critic over all micro-batches of a Scored shard. Raises NumericsError; see `Engine.step`."""
        return self._update(role, shard, lambda part: algo.value_loss(self._values(role, part), part))

    def weights(self, role: str) -> Iterator[tuple[str, Tensor]]:
        """Every weight in full under its checkpoint name, layer by layer; a tensor lives until the next is asked for."""
        yield from self.engines[role].weights()

    def weight_names(self, role: str) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, number format and full shape of every weight, in the order of `weights`; gathers nothing."""
        return self.engines[role].layout()

    def export(self, role: str, directory: str) -> None:
        """Writes the model in Hugging Face format with its tokenizer: rank 0 writes, all ranks return when it is done."""
        engine = self.engines[role]
        weights = {name: tensor.cpu().clone() for name, tensor in engine.weights() if self.rank == 0}
        if self.rank == 0:
            Path(directory).mkdir(parents=True, exist_ok=True)
            engine.module.save(Path(directory), weights)
            copy_tokenizer(self.sources[role], Path(directory))
        if self.backend == "deepspeed":
            torch.distributed.barrier()

    def close(self) -> None:
        """Gives up every engine and leaves the process group."""
        for engine in self.engines.values():
            engine.close()
        if self.backend == "deepspeed":
            from hone.learner.engines import deepspeed

            deepspeed.leave()

    def _engine(self, role: str, spec: RoleSpec, ds: DeepSpeedConfig) -> Engine:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[ds.param_dtype]
        training, recompute = None, False
        if not isinstance(spec.config, RefConfig):
            training = Training(config=spec.config, total_steps=spec.total_steps)
            recompute = spec.config.gradient_checkpointing_enable
        name = str(self.sources[role])
        if spec.kind == "critic":
            prefix = ds.value_head_prefix
            module = load_critic(name, dtype=dtype, device=self.device, value_head_prefix=prefix, gradient_checkpointing=recompute)
        else:
            module = load_policy(name, dtype=dtype, device=self.device, gradient_checkpointing=recompute)
        if self.backend == "single":
            return SingleEngine(module, role=role, training=training)
        from hone.learner.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(module, role=role, training=training, ds=ds)

    def _policy(self, role: str, part: Batch, *, with_entropy: bool, slopes: Slopes | None = None) -> Outputs:
        inputs = (part.tokens, part.position_ids, part.cu_seqlens, part.action_mask, part.temperature, with_entropy, slopes)
        logp, entropy = self.engines[role](*inputs)
        return Outputs(logp=logp, entropy=entropy)

    def _values(self, role: str, part: Batch) -> Tensor:
        return self.engines[role](part.tokens, part.position_ids, part.cu_seqlens, part.action_mask)

    @torch.no_grad()
    def _evaluate(self, shard: Shard, forward: Callable[[Batch], Tensor]) -> Tensor:
        result = torch.zeros(shard.batch.tokens.shape[0], dtype=torch.float32)
        bounds = shard.batch.cu_seqlens.tolist()
        for index, rows in enumerate(shard.micro_batches):
            values = forward(self._micro_batch(shard, index)).cpu()
            if index not in shard.fillers:
                positions = torch.cat([torch.arange(bounds[row], bounds[row + 1]) for row in rows])
                result[positions] = values
        return result

    def _update(self, role: str, shard: Shard, loss_of: Callable[[Scored], Loss]) -> StepResult:
        if not isinstance(shard.batch, Scored):
            raise ValueError(f"{role} can only be updated on a Scored batch; judge the {type(shard.batch).__name__} first")
        engine = self.engines[role]
        totals: dict[str, Tensor] = {}
        for index in range(len(shard.micro_batches)):
            part = self._micro_batch(shard, index)
            assert isinstance(part, Scored)
            loss = loss_of(part)
            engine.backward(loss.total, last=index == len(shard.micro_batches) - 1)
            for name, value in {} if index in shard.fillers else loss.metrics.items():
                totals[name] = totals.get(name, 0) + value
        info = engine.step()
        read = torch.stack(list(totals.values())).tolist() if totals else []  # waits for the device once, not once per metric
        return StepResult(metrics=dict(zip(totals, read, strict=True)), grad_norm=info.grad_norm, lr=info.lr)

    def _micro_batch(self, shard: Shard, index: int) -> Batch:
        """Micro-batch `index` on this rank's device. A filler has an empty mask and weights of zero: it adds nothing to any sum."""
        part = select(shard.batch, shard.micro_batches[index])
        if part.tokens.shape[0] > self.max_tokens:
            raise ValueError(
                f"a micro-batch of {part.tokens.shape[0]} tokens exceeds this rank's {self.max_tokens}; cut the batch with `shards`"
            )
        moved = {
            field.name: value.to(self.device, non_blocking=True)
            for field in dataclasses.fields(part)
            if isinstance(value := getattr(part, field.name), Tensor)
        }
        if index in shard.fillers:
            moved["action_mask"] = torch.zeros_like(moved["action_mask"])
            if "weights" in moved:
                moved["weights"] = torch.zeros_like(moved["weights"])
        return dataclasses.replace(part, **moved)
