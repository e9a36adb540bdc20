"""One rank of learning: hosts several roles, each a model in an engine, and works on this rank's shard of a batch.

Flow of one optimiser step: Batch --logp, values--> filled fields --(judging, elsewhere)--> Scored --update_*--> new weights
--weights--> whoever serves them. Knows no Ray; everything here is constructible in a test.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hone.algos.batch import Packed, select
from hone.algos.offline import LogpLoss, Offline
from hone.algos.protocol import Loss, Outputs
from hone.learner.adapters import adapter_of, dropout_awake, peft_name, served_config
from hone.learner.attention.ring_flash import check_ring_flash
from hone.learner.attention.wire import add_over_ring, group_of
from hone.learner.checkpoint import role_files
from hone.learner.checkpoint.files import Files
from hone.learner.checkpoint.random_state import random_state, set_random_state
from hone.learner.checkpoint.snapshot import Outcome, Writer
from hone.learner.combinations import check_combinations, check_heads
from hone.learner.config import DeepSpeedConfig, RefConfig
from hone.learner.context import Piece, piece_for
from hone.learner.engines.model_parallel import ModelParallel
from hone.learner.engines.protocol import Engine
from hone.learner.engines.single import SingleEngine
from hone.learner.exporting import write
from hone.learner.heads import statistics_of
from hone.learner.liger import apply_liger, check_liger
from hone.learner.logprobs import Slopes
from hone.learner.mixture import FIGURES, Balance, heard_by
from hone.learner.model import CriticModel, PolicyModel, hidden_size
from hone.learner.model_files import resolve
from hone.learner.offline import Questions, told
from hone.learner.optim import Training
from hone.learner.over_logits import OverLogits, TopLogp
from hone.learner.packing import Shard
from hone.learner.per_token import PerToken, PolicyLoss
from hone.learner.ring_probe import check_cut
from hone.learner.role_models import load_role
from hone.learner.roles import DTYPES, LABELLED, Figures, RoleSpec, StepResult, ValueLoss, made_of
from hone.learner.tensor_parallel.split import split


class Learner:
    """One rank. Every method is collective: all ranks call it with their own shard of the same batch, in the same order.

    `max_tokens` caps every micro-batch [tokens]; `seed` fixes what a fresh model part draws. `ds.ring_attn_size` times
    `ds.tensor_parallel_size` consecutive ranks get the same shard, whose micro-batches may be `ds.ring_attn_size` times
    `max_tokens`; all of them return the whole shard's results, and the first one its figures.
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
        check_combinations(roles, ds, backend=backend, world_size=world_size)
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        if ds.use_liger_kernel:
            check_liger(self.device)
        if ds.ring_attn_impl == "ring-flash-attn" and ds.ring_attn_size > 1:
            check_ring_flash(self.device, ds.param_dtype)
        self.rank, self.world_size, self.backend, self.max_tokens = rank, world_size, backend, max_tokens
        self.writer = Writer(Files(), pinned=self.device.type == "cuda")
        self.aux_loss_coefs = {role: getattr(spec.config, "aux_loss_coef", 0.0) for role, spec in roles.items()}
        self.sources = {role: resolve(spec.model) for role, spec in roles.items()}
        self.sleeps, self.head_stride = ds.enable_sleep, ds.ring_attn_head_stride
        self.ring_impl: Literal["own", "ring-flash-attn"] = ds.ring_attn_impl
        self.kinds = {role: spec.kind for role, spec in roles.items()}
        self.hidden_sizes = {role: hidden_size(source) for role, source in self.sources.items()}
        self.made_of = {role: made_of(spec, model=self.sources[role], ds=ds) for role, spec in roles.items()}
        check_heads(self.sources.values(), ds, world_size=world_size)
        if backend == "deepspeed":
            from hone.learner.engines import deepspeed, zero_settings

            zero_settings.check(ds, device=self.device, world_size=world_size, trained=sum(spec.trained for spec in roles.values()))
            deepspeed.join(rank=rank, world_size=world_size, master_addr=master_addr, master_port=master_port, device=self.device)
        tensor = group_of(rank=rank, world_size=world_size, size=ds.tensor_parallel_size)
        self.parallel = None if tensor is None else ModelParallel(tensor, rank=rank, world_size=world_size)
        self.wire = group_of(rank=rank, world_size=world_size, size=ds.ring_attn_size, stride=ds.tensor_parallel_size)
        self.tells = rank % ds.ranks_per_shard == 0
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
        return self._evaluate(shard, lambda part: self._read(role, part))

    def scores(self, role: str, shard: Shard) -> Float[Tensor, " N"]:
        """A reward model's score of each of the shard's rows [reward], normalised where `--ds.normalize-reward` has it; no gradient."""
        self._awake(role)
        found = self._evaluate(shard, lambda part: self._read(role, part), per_row=True)
        model = self.engines[role].module
        assert isinstance(model, CriticModel)
        return found if model.value_head.statistics is None else model.value_head.statistics.normalised(found)

    def label_logits(self, role: str, shard: Shard) -> Float[Tensor, "T C"]:
        """A process model's logits at the tokens in the mask; no gradient, zero off the mask."""
        self._awake(role)
        return self._evaluate(shard, lambda part: self._read(role, part))

    def top_logp(self, role: str, shard: Shard, *, k: int, temperature: float) -> tuple[Int[Tensor, "T K"], Float[Tensor, "T K"]]:
        """A teacher's `k` likeliest tokens at each action token and their log-probabilities [nats]; no gradient, zero off the mask.

        What `weighed_taught` takes; `temperature` is the distillation's.
        """

        def top(part: Packed) -> tuple[Tensor, ...]:
            found = self._over_logits(role, part, TopLogp(part, k=k, temperature=temperature))
            return self._whole(found[0].to(torch.float64)).long(), self._whole(found[1])

        self._awake(role)
        tokens, logp = self._evaluate_all(shard, top)
        return tokens, logp

    def keep_statistics(self, role: str, scores: Float[Tensor, " N"]) -> None:
        """Mean and deviation of a reward model's scores over all ranks' rows go into its configuration, which `export` writes.

        Raises ValueError for fewer than two scores, or where scores come normalised already.
        """
        model = self.engines[role].module
        if not isinstance(model, CriticModel) or self.kinds[role] != "reward" or model.value_head.statistics is not None:
            raise ValueError(f"{role} is no reward model with raw scores; host one without --ds.normalize-reward")
        found = statistics_of(scores)
        model.backbone.config.mean, model.backbone.config.std = found.mean, found.std

    def update_offline(self, role: str, shard: Shard, algo: Offline) -> StepResult:
        """One optimiser step of an offline algorithm over a shard of its labelled rows. Raises NumericsError; see `Engine.step`.

        A `LogpLoss` takes a policy, a `ScoreLoss` a reward model, a `LogitsLoss` a process model or a policy; ValueError otherwise.
        """
        return self._update(role, shard, self._offline(role, algo))

    @torch.no_grad()
    def evaluate_offline(self, role: str, shard: Shard, algo: Offline) -> dict[str, float]:
        """Figures (this rank's share of them) that `update_offline` would report, without a step."""
        self._awake(role)
        loss, figures = self._offline(role, algo), Figures()
        for index in range(len(shard.micro_batches)):
            figures.add(loss(self._micro_batch(shard, index)), filler=index in shard.fillers)
        return figures.told() if self.tells else {}

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
        return self._update(role, shard, lambda part: algo.value_loss(self._read(role, part), part))

    def weights(self, role: str) -> Iterator[tuple[str, Tensor]]:
        """Every weight in full under its checkpoint name, layer by layer; a tensor lives until the next is asked for."""
        yield from self._awake(role).weights()

    def adapter(self, role: str) -> Iterator[tuple[str, Tensor]]:
        """The adapter's own tensors in full, as `weights`, under PEFT's names."""
        engine = self._awake(role)
        yield from ((peft_name(name), tensor) for name, tensor in engine.weights(adapter_of(engine.module)))

    def adapter_config(self, role: str) -> dict[str, Any]:
        """What an engine must know of the adapter to serve it, as PEFT writes it."""
        return served_config(self.engines[role].module.adapted)

    def weight_names(self, role: str) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, number format and full shape of every weight, in the order of `weights`; gathers nothing."""
        return self.engines[role].layout()

    def export(self, role: str, directory: str, *, average: bool = False) -> None:
        """Writes the model in Hugging Face format with its tokenizer: rank 0 writes, all ranks return when it is done.

        With `average`, the moving average of its weights; raises ValueError if none is kept.
        """
        write(self._awake(role, training=average), Path(directory), source=self.sources[role], rank=self.rank, average=average)
        if self.backend == "deepspeed":
            torch.distributed.barrier()

    def sleep(self) -> int:
        """Gives up the device's memory of every role; returns the bytes that were moved. Whatever a later call needs is woken by it."""
        return sum(engine.sleep() for engine in self.engines.values())

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
        for role in self.engines:
            role_files.take_up(self._awake(role, training=True), readers[role], readers[role])
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
        training = None
        if not isinstance(spec.config, RefConfig):
            training = Training(config=spec.config, total_steps=spec.total_steps, ema_beta=spec.ema_beta)
        name = str(self.sources[role])
        module = load_role(spec, ds, name=name, device=self.device)
        if ds.use_liger_kernel:
            apply_liger(module.backbone if isinstance(module, CriticModel) else module.causal_lm, name=name)
        if self.parallel is not None:
            split(module, name, wire=self.parallel.tensor)
        if self.wire is not None:
            check_cut(module, name, wire=self.wire, head_stride=self.head_stride, impl=self.ring_impl)
        if self.backend == "single":
            return SingleEngine(module, role=role, training=training, grad_accum_dtype=DTYPES[ds.grad_accum_dtype])
        from hone.learner.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(module, role=role, training=training, ds=ds, parallel=self.parallel)

    def _awake(self, role: str, *, training: bool = False) -> Engine:
        """A role's engine, fit to evaluate or to train; with `ds.enable_sleep`, no other one is awake."""
        for other, engine in self.engines.items():
            if self.sleeps and other != role:
                engine.sleep()
        self.engines[role].wake(training=training)
        return self.engines[role]

    def _policy(self, role: str, part: Packed, *, with_entropy: bool, slopes: Slopes | None = None) -> Outputs:
        inputs = (part.tokens, part.position_ids, part.cu_seqlens, part.action_mask, part.temperature, with_entropy)
        logp, entropy = self.engines[role](*inputs, self._piece(role, part), slopes, None, part.attached)
        return Outputs(logp=self._whole(logp), entropy=None if entropy is None else self._whole(entropy))

    def _read(self, role: str, part: Packed) -> Tensor:
        """What a critic's, reward or process model's head says."""
        inputs = (part.tokens, part.position_ids, part.cu_seqlens, part.action_mask)
        return self._whole(self.engines[role](*inputs, self._piece(role, part), part.attached))

    def _piece(self, role: str, part: Packed) -> Piece | None:
        """What this rank of a ring runs of a micro-batch."""
        if self.wire is None:
            return None
        sizes = {"max_tokens": self.max_tokens, "hidden_size": self.hidden_sizes[role]}
        return piece_for(part.cu_seqlens, wire=self.wire, impl=self.ring_impl, head_stride=self.head_stride, **sizes)

    def _whole(self, per_token: Tensor) -> Tensor:
        """What the ranks of a ring have each for some of the tokens, for all of them."""
        return per_token if self.wire is None else add_over_ring(per_token, self.wire)

    def _evaluate(self, shard: Shard, forward: Callable[[Packed], Tensor], *, per_row: bool = False) -> Tensor:
        return self._evaluate_all(shard, lambda part: (forward(part),), per_row=per_row)[0]

    @torch.no_grad()
    def _evaluate_all(self, shard: Shard, forward: Callable[[Packed], tuple[Tensor, ...]], *, per_row: bool = False) -> list[Tensor]:
        """Each of forward's results over the whole shard, one entry per token or per row; a filler's are dropped."""
        bounds, size = shard.batch.cu_seqlens.tolist(), shard.batch.rows if per_row else shard.batch.tokens.shape[0]
        results: list[Tensor] = []
        for index, rows in enumerate(shard.micro_batches):
            found = [one.cpu() for one in forward(self._micro_batch(shard, index))]
            results = results or [one.new_zeros(size, *one.shape[1:]) for one in found]
            if index not in shard.fillers:
                places = torch.tensor(rows) if per_row else torch.cat([torch.arange(bounds[row], bounds[row + 1]) for row in rows])
                for result, one in zip(results, found, strict=True):
                    result[places] = one
        return results

    def _offline(self, role: str, algo: Offline) -> Callable[[Any], Loss]:
        """The algorithm's loss over a micro-batch, for what the role's model says of it."""

        def logp(part: Packed, slopes: Slopes | None) -> Outputs:
            return self._policy(role, part, with_entropy=False, slopes=slopes)

        def over_logits(part: Packed, reader: OverLogits) -> tuple[Tensor, ...]:
            return tuple(self._whole(one) for one in self._over_logits(role, part, reader))

        ask = Questions(logp=logp, read=lambda part: self._read(role, part), over_logits=over_logits, slopes=self.wire is None)
        return told(algo, role=role, kind=self.kinds[role], ask=ask)

    def _over_logits(self, role: str, part: Packed, reader: OverLogits) -> tuple[Tensor, ...]:
        inputs = (part.tokens, part.position_ids, part.cu_seqlens, part.action_mask, 1.0, False)
        return self.engines[role](*inputs, self._piece(role, part), None, reader, part.attached)

    def _update(self, role: str, shard: Shard, loss_of: Callable[[Any], Loss]) -> StepResult:
        if not isinstance(shard.batch, LABELLED):
            raise ValueError(f"{role} can only be updated on a Scored batch or labelled rows; judge the {type(shard.batch).__name__} first")
        engine = self._awake(role, training=True)
        figures = Figures()
        balance = self._balance(role, shard)
        with dropout_awake(engine.module), heard_by(engine.module, balance.hear) if balance else contextlib.nullcontext():
            for index in range(len(shard.micro_batches)):
                loss = loss_of(self._micro_batch(shard, index))
                if balance is not None:
                    loss += balance.loss(filler=index in shard.fillers)
                engine.backward(loss.total, last=index == len(shard.micro_batches) - 1)
                figures.add(loss, filler=index in shard.fillers)
        info = engine.step()
        if balance is not None and self.rank == 0:
            figures.sums |= balance.busiest()
        return StepResult(metrics=figures.told() if self.tells else {}, grad_norm=info.grad_norm, lr=info.lr, applied=info.applied)

    @torch.no_grad()
    def _balance(self, role: str, shard: Shard) -> Balance | None:
        """The step's load-balancing loss with every token's choices counted, by a forward pass of its own; None for none."""
        coef = self.aux_loss_coefs[role]
        if not coef:
            return None
        module = self.engines[role].module
        known = {"coef": coef, "figures": FIGURES.get(role, FIGURES["policy"]), "device": self.device, "wire": self.wire}
        balance = Balance(module.adaptable()[0].config, **known)
        for index in range(len(shard.micro_batches)):
            part = self._micro_batch(shard, index)
            part = dataclasses.replace(part, action_mask=torch.zeros_like(part.action_mask))  # the head has nothing to do
            with heard_by(module, balance.hear if index in shard.fillers else balance.count):
                if isinstance(module, PolicyModel):
                    self._policy(role, part, with_entropy=False)
                else:
                    self._read(role, part)
        balance.close(torch.distributed.all_reduce if self.backend == "deepspeed" else None)
        return balance

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
            moved |= {name: torch.zeros_like(moved[name]) for name in ("action_mask", "weights", "row_weights") if name in moved}
        return dataclasses.replace(part, **moved)
