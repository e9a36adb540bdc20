"""One rank of learning: hosts several roles, each a model in an engine, and works on this rank's shard of a batch.

Flow of one optimiser step: Batch --logp, values--> filled fields --(judging, elsewhere)--> Scored --update_*--> new weights
--weights--> whoever serves them. Knows no Ray; everything here is constructible in a test.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from hone.algos.batch import Batch, Scored, select
from hone.algos.protocol import Loss, Outputs
from hone.algos.ranges import Range
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

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Our names of number formats."""


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
    ema_beta: Annotated[float, Range(low=0, high=1, open_high=True)] | None = None
    """Decay of an exponential moving average of the weights; None keeps none."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Of one optimiser step: this rank's share of every metric (shares add up over ranks), gradient norm, learning rate."""

    metrics: dict[str, float]
    grad_norm: float
    lr: float
    applied: bool = True
    """False for a step that was left out because a loss or the norm was not finite; see `Engine.step`."""


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
        if backend == "single" and (ds.adam_offload or ds.zpg > 1 or ds.overlap_comm):
            raise ValueError("--ds.adam-offload, --ds.zpg and --ds.overlap-comm are DeepSpeed's; choose the deepspeed backend")
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self.rank, self.world_size, self.backend, self.max_tokens = rank, world_size, backend, max_tokens
        self.writer = Writer(Files(), pinned=self.device.type == "cuda")
        self.sources = {role: resolve(spec.model) for role, spec in roles.items()}
        self.head_stride, self.sleeps = ds.ring_attn_head_stride, ds.enable_sleep
        for source in self.sources.values():
            check_ring(str(source), world_size=world_size, size=ds.ring_attn_size, head_stride=self.head_stride)
        if backend == "deepspeed":
            from hone.learner.engines import deepspeed, zero_settings

            zero_settings.check(ds, device=self.device, world_size=world_size)
            deepspeed.join(rank=rank, world_size=world_size, master_addr=master_addr, master_port=master_port, device=self.device)
        self.wire = ring_of(rank=rank, world_size=world_size, size=ds.ring_attn_size)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            self.engines = {role: self._engine(role, spec, ds) for role, spec in roles.items()}

    def logp(self, role: str, shard: Shard) -> Float[Tensor, " T"]:
        """Log-probabilities [nats] of the shard's action tokens under the batch's temperature; no gradient, zero off the mask."""
        self._awake(role)
        return self._evaluate(shard, lambda part: self._policy(role, part, with_entropy=False).logp)

    def values(self, role: str, shard: Shard) -> Float[Tensor, " T"]:
        """Values of the states before the shard's action tokens; no gradient, zero off the mask."""
        self._awake(role)
        return self._evaluate(shard, lambda part: self._values(role, part))

    def update_policy(self, role: str, shard: Shard, algo: PolicyLoss) -> StepResult:
        """One optimiser step over all micro-batches of a Scored shard. Raises NumericsError; see `Engine.step`."""
        per_token = PerToken(algo)

        def loss_of(part: Scored) -> Loss:
            # A rank of a ring does not score all of a row's tokens, so it is not told slopes: backward takes the logits again.
            slopes = per_token.slopes(part) if self.wire is None else None
            return algo.loss(self._policy(role, part, with_entropy=True, slopes=slopes), part)

        return self._update(role, shard, loss_of)

    def update_critic(self, role: str, shard: Shard, algo: ValueLoss) -> StepResult:
        """One optimiser step of the critic over all micro-batches of a Scored shard. Raises NumericsError; see `Engine.step`."""
        return self._update(role, shard, lambda part: algo.value_loss(self._values(role, part), part))

    def weights(self, role: str) -> Iterator[tuple[str, Tensor]]:
        """Every weight in full under its checkpoint name, layer by layer; a tensor lives until the next is asked for."""
        yield from self._awake(role).weights()

    def weight_names(self, role: str) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, number format and full shape of every weight, in the order of `weights`; gathers nothing."""
        return self.engines[role].layout()

    def export(self, role: str, directory: str, *, average: bool = False) -> None:
        """Writes the model in Hugging Face format with its tokenizer: rank 0 writes, all ranks return when it is done.

        With `average`, the moving average of its weights; raises ValueError if none is kept.
        """
        engine = self._awake(role, training=average)
        with engine.averaged() if average else nullcontext():
            weights = {name: tensor.cpu().clone() for name, tensor in engine.weights() if self.rank == 0}
        if self.rank == 0:
            Path(directory).mkdir(parents=True, exist_ok=True)
            engine.module.save(Path(directory), weights)
            copy_tokenizer(self.sources[role], Path(directory))
        if self.backend == "deepspeed":
            torch.distributed.barrier()

    def sleep(self) -> int:
        """Gives up the device's memory of every role; returns the bytes that were moved. Whatever a later call needs is woken by it."""
        return sum(engine.sleep() for engine in self.engines.values())

    def save(self, directory: str) -> None:
        """Copies this rank's share of every role and returns; a thread writes it into `directory`, which is there already.

        No collective. Raises CheckpointError if an earlier save failed and `saved` was not asked.
        """
        state = random_state(self.device)
        self.writer.save(
            {
                role_files.path(Path(directory), role, rank=self.rank, world_size=self.world_size): role_files.layout(
                    role, engine, rank=self.rank, world_size=self.world_size, random_state=state
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
        for role in self.engines:
            self._awake(role, training=True).restore(readers[role])
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
        dtype = DTYPES[ds.param_dtype]
        training, recompute = None, False
        if not isinstance(spec.config, RefConfig):
            training = Training(config=spec.config, total_steps=spec.total_steps, ema_beta=spec.ema_beta)
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
            return SingleEngine(module, role=role, training=training, grad_accum_dtype=DTYPES[ds.grad_accum_dtype])
        from hone.learner.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(module, role=role, training=training, ds=ds)

    def _awake(self, role: str, *, training: bool = False) -> Engine:
        """A role's engine, fit to evaluate or to train; with `ds.enable_sleep`, no other one is awake."""
        for other, engine in self.engines.items():
            if self.sleeps and other != role:
                engine.sleep()
        self.engines[role].wake(training=training)
        return self.engines[role]

    def _policy(self, role: str, part: Batch, *, with_entropy: bool, slopes: Slopes | None = None) -> Outputs:
        inputs = (part.tokens, part.position_ids, part.cu_seqlens, part.action_mask, part.temperature, with_entropy)
        logp, entropy = self.engines[role](*inputs, self._piece(part), slopes)
        return Outputs(logp=self._whole(logp), entropy=None if entropy is None else self._whole(entropy))

    def _values(self, role: str, part: Batch) -> Tensor:
        return self._whole(self.engines[role](part.tokens, part.position_ids, part.cu_seqlens, part.action_mask, self._piece(part)))

    def _piece(self, part: Batch) -> Piece | None:
        """What this rank of a ring runs of a micro-batch."""
        if self.wire is None:
            return None
        cut = cut_rows(part.lengths.tolist(), size=self.wire.size, max_tokens=self.max_tokens)
        return piece_of(cut, part.cu_seqlens, wire=self.wire, head_stride=self.head_stride)

    def _whole(self, per_token: Tensor) -> Tensor:
        """What the ranks of a ring have each for some of the tokens, for all of them."""
        return per_token if self.wire is None else add_over_ring(per_token, self.wire)

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
        engine = self._awake(role, training=True)
        totals: dict[str, Tensor] = {}
        for index in range(len(shard.micro_batches)):
            part = self._micro_batch(shard, index)
            assert isinstance(part, Scored)
            loss = loss_of(part)
            engine.backward(loss.total, last=index == len(shard.micro_batches) - 1)
            for name, value in {} if index in shard.fillers else loss.metrics.items():
                totals[name] = totals.get(name, 0) + value
        info = engine.step()
        if self.wire is not None and self.wire.rank:
            totals = {}  # every rank of a ring has the same figures, of the whole rows: the first one tells
        read = torch.stack(list(totals.values())).tolist() if totals else []  # waits for the device once, not once per metric
        metrics = dict(zip(totals, read, strict=True))
        return StepResult(metrics=metrics, grad_norm=info.grad_norm, lr=info.lr, applied=info.applied)

    def _micro_batch(self, shard: Shard, index: int) -> Batch:
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
            if "weights" in moved:
                moved["weights"] = torch.zeros_like(moved["weights"])
        return dataclasses.replace(part, **moved)
