"""One rank of learning: hosts several roles, each a model in an engine, and works on this rank's shard of a batch.

Flow of one optimiser step: Batch --logp, values--> filled fields --(judging, elsewhere)--> Scored --update_*--> new weights
--weights--> whoever serves them. Knows no Ray; everything here is constructible in a test.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from hone.algos.batch import Packed, Scored, select
from hone.algos.offline import LogpLoss
from hone.algos.protocol import Loss, Outputs
from hone.learner.attention.wire import add_over_ring, ring_of
from hone.learner.checkpoint import role_files
from hone.learner.checkpoint.files import Files
from hone.learner.checkpoint.random_state import random_state, set_random_state
from hone.learner.checkpoint.snapshot import Outcome, Writer
from hone.learner.config import ActorConfig, CriticConfig, DeepSpeedConfig, RefConfig
from hone.learner.context import Piece, cut_rows, piece_of
from hone.learner.engines.protocol import Engine
from hone.learner.engines.single import SingleEngine
from hone.learner.logprobs import Slopes
from hone.learner.model import load_critic, load_policy
from hone.learner.model_files import check_ring, copy_tokenizer, resolve
from hone.learner.optim import Training
from hone.learner.packing import Shard
from hone.learner.per_token import PerToken, PolicyLoss
from hone.learner.ring_probe import check_cut

WEIGHTS = frozenset({"weights", "row_weights"})
"""Fields that say what a token or a row weighs within an optimiser step: a batch that has neither was not judged."""


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


def made_of(spec: RoleSpec, *, model: Path, ds: DeepSpeedConfig) -> dict[str, Any]:
    """How a role is made, as JSON has it: what `checkpoint.export` makes it from again."""
    settings = {"config": dataclasses.asdict(spec.config), "config_type": type(spec.config).__name__, "ds": dataclasses.asdict(ds)}
    known = {"kind": spec.kind, "model": str(model.absolute()), "architecture": role_files.architecture(model)}
    return {**known, "total_steps": spec.total_steps, **settings}


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Of one optimiser step: this rank's share of every metric (shares add up over ranks), gradient norm, learning rate."""

    metrics: dict[str, float]
    grad_norm: float
    lr: float


class Learner:
    """One rank. Every method is collective: all ranks call it with their own shard of the same batch, in the same order.

    `max_tokens` caps every micro-batch [tokens]; `seed` fixes what a fresh model part draws. The ranks of a ring
    (`ds.ring_attn_size` consecutive ones) get the same shard, whose micro-batches may be that many times `max_tokens`; all of
    them return the whole shard's results, and the first one its figures.
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
        self.rank, self.world_size, self.backend, self.max_tokens = rank, world_size, backend, max_tokens
        self.writer = Writer(Files(), pinned=self.device.type == "cuda")
        self.sources = {role: resolve(spec.model) for role, spec in roles.items()}
        self.made_of = {role: made_of(spec, model=self.sources[role], ds=ds) for role, spec in roles.items()}
        self.head_stride = ds.ring_attn_head_stride
        for source in self.sources.values():
            check_ring(str(source), world_size=world_size, size=ds.ring_attn_size, head_stride=self.head_stride)
        if backend == "deepspeed":
            from hone.learner.engines import deepspeed

            deepspeed.join(rank=rank, world_size=world_size, master_addr=master_addr, master_port=master_port, device=self.device)
        self.wire = ring_of(rank=rank, world_size=world_size, size=ds.ring_attn_size)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            self.engines = {role: self._engine(role, spec, ds) for role, spec in roles.items()}

    def logp(self, role: str, shard: Shard) -> Float[Tensor, " T"]:
        """Log-probabilities [nats] of the shard's action tokens under the batch's temperature; no gradient, zero off the mask."""
        return self._evaluate(shard, lambda part: self._policy(role, part, with_entropy=False).logp)

    def values(self, role: str, shard: Shard) -> Float[Tensor, " T"]:
        """Values of the states before the shard's action tokens; no gradient, zero off the mask."""
        return self._evaluate(shard, lambda part: self._values(role, part))

    def update_policy(self, role: str, shard: Shard, algo: PolicyLoss | LogpLoss[Any]) -> StepResult:
        """One optimiser step over all micro-batches of a shard, Scored or of labelled rows (`hone.algos.offline`) as `algo` reads them.

        Raises NumericsError; see `Engine.step`.
        """
        per_token = PerToken(algo)

        def loss_of(part: Any) -> Loss:
            # A rank of a ring does not score all of a row's tokens, so it is not told slopes: backward takes the logits again.
            slopes = per_token.slopes(part) if self.wire is None else None
            return algo.loss(self._policy(role, part, with_entropy=True, slopes=slopes), part)

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

    def save(self, directory: str) -> None:
        """Copies this rank's share of every role and returns; a thread writes it into `directory`, which is there already.

        No collective. Raises CheckpointError if an earlier save failed and `saved` was not asked.
        """
        state, made_of = random_state(self.device), self.made_of
        self.writer.save(
            {
                role_files.path(Path(directory), role, rank=self.rank, world_size=self.world_size): role_files.layout(
                    role, engine, rank=self.rank, world_size=self.world_size, random_state=state, made_of=made_of[role]
                )
                for role, engine in self.engines.items()
            }
        )

    def saved(self, wait: bool) -> Outcome | None:
        """What became of the last save on this rank, once; None where none is open, or it is not done and `wait` is False."""
        return self.writer.outcome(wait=wait)

    def restore(self, directory: str) -> None:
        """Takes up a checkpoint that `checkpoint.directory.verify` vouches for, of any number of ranks, ZeRO stage or engine.

        Raises CheckpointError, before anything is changed, for one of other roles or another model.
        """
        readers = {role: role_files.matching(Path(directory), role, engine) for role, engine in self.engines.items()}
        for role, engine in self.engines.items():
            engine.restore(readers[role])
            if (state := readers[role].of_rank(self.rank)) is not None:
                set_random_state(state["random_state"], self.device)

    def close(self) -> None:
        """Gives up every engine and leaves the process group. Raises CheckpointError if the last save failed unseen."""
        try:
            self.writer.raise_unseen()
        finally:
            self._close()

    def _close(self) -> None:
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
        if self.wire is not None:
            check_cut(module, name, wire=self.wire, head_stride=self.head_stride)
        if self.backend == "single":
            return SingleEngine(module, role=role, training=training)
        from hone.learner.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(module, role=role, training=training, ds=ds)

    def _policy(self, role: str, part: Packed, *, with_entropy: bool, slopes: Slopes | None = None) -> Outputs:
        inputs = (part.tokens, part.position_ids, part.cu_seqlens, part.action_mask, part.temperature, with_entropy)
        logp, entropy = self.engines[role](*inputs, self._piece(part), slopes)
        return Outputs(logp=self._whole(logp), entropy=None if entropy is None else self._whole(entropy))

    def _values(self, role: str, part: Packed) -> Tensor:
        return self._whole(self.engines[role](part.tokens, part.position_ids, part.cu_seqlens, part.action_mask, self._piece(part)))

    def _piece(self, part: Packed) -> Piece | None:
        """What this rank of a ring runs of a micro-batch."""
        if self.wire is None:
            return None
        cut = cut_rows(part.lengths.tolist(), size=self.wire.size, max_tokens=self.max_tokens)
        return piece_of(cut, part.cu_seqlens, wire=self.wire, head_stride=self.head_stride)

    def _whole(self, per_token: Tensor) -> Tensor:
        """What the ranks of a ring have each for some of the tokens, for all of them."""
        return per_token if self.wire is None else add_over_ring(per_token, self.wire)

    @torch.no_grad()
    def _evaluate(self, shard: Shard, forward: Callable[[Packed], Tensor]) -> Tensor:
        result = torch.zeros(shard.batch.tokens.shape[0], dtype=torch.float32)
        bounds = shard.batch.cu_seqlens.tolist()
        for index, rows in enumerate(shard.micro_batches):
            values = forward(self._micro_batch(shard, index)).cpu()
            if index not in shard.fillers:
                positions = torch.cat([torch.arange(bounds[row], bounds[row + 1]) for row in rows])
                result[positions] = values
        return result

    def _update(self, role: str, shard: Shard, loss_of: Callable[[Any], Loss]) -> StepResult:
        if not WEIGHTS & {field.name for field in dataclasses.fields(shard.batch)}:
            raise ValueError(f"{role} can only be updated on a Scored batch; judge the {type(shard.batch).__name__} first")
        engine = self.engines[role]
        totals: dict[str, Tensor] = {}
        for index in range(len(shard.micro_batches)):
            part = self._micro_batch(shard, index)
            loss = loss_of(part)
            engine.backward(loss.total, last=index == len(shard.micro_batches) - 1)
            for name, value in {} if index in shard.fillers else loss.metrics.items():
                totals[name] = totals.get(name, 0) + value
        info = engine.step()
        if self.wire is not None and self.wire.rank:
            totals = {}  # every rank of a ring has the same figures, of the whole rows: the first one tells
        read = torch.stack(list(totals.values())).tolist() if totals else []  # waits for the device once, not once per metric
        return StepResult(metrics=dict(zip(totals, read, strict=True)), grad_norm=info.grad_norm, lr=info.lr)

    def _micro_batch(self, shard: Shard, index: int) -> Packed:
        """Micro-batch `index` on this rank's device. A filler has an empty mask and weights of zero: it adds nothing to any sum."""
        part = select(shard.batch, shard.micro_batches[index])
        cap = self.max_tokens * (1 if self.wire is None else self.wire.size)
        if part.tokens.shape[0] > cap:
            raise ValueError(f"a micro-batch of {part.tokens.shape[0]} tokens exceeds this rank's {cap}; cut the batch with `shards`")
        moved = {
            field.name: value.to(self.device, non_blocking=True)
            for field in dataclasses.fields(part)
            if isinstance(value := getattr(part, field.name), Tensor)
        }
        if index in shard.fillers:
            moved["action_mask"] = torch.zeros_like(moved["action_mask"])
            moved |= {name: torch.zeros_like(moved[name]) for name in WEIGHTS & moved.keys()}
        return dataclasses.replace(part, **moved)
