"""From the learner's policy to the engines, and the proof: one callable that both backends share.

The canary is a fixed sequence of token ids. After every update its log-probabilities are asked of every engine and of the
learner; `hone.rollout.weight_sync` compares versions, fingerprints and canaries, and stops the run when they disagree.
"""

import asyncio
import time
from collections.abc import Callable, Sequence

import torch

from hone.algos.batch import Batch
from hone.launch.parts import RoleGroup
from hone.rollout.weight_sync.protocol import Sent, ServedEngine, Synced, sync
from hone.rollout.weight_sync.verify import Canary, canary_tokens

CANARY_TOKENS = 24


class Publisher:
    """`publisher(version)` brings the policy to every engine and returns the sync's figures; raises StaleWeights.

    `send` runs the sending end on every rank of the policy's group and returns the fingerprints it sent.
    """

    def __init__(
        self,
        *,
        engines: Sequence[ServedEngine],
        policy: RoleGroup,
        send: Callable[[], dict[str, str]],
        runner: asyncio.Runner,
        vocabulary: int,
        tolerance: float,
        seed: int,
    ) -> None:
        self._engines, self._policy, self._send, self._runner = engines, policy, send, runner
        self._tokens = canary_tokens(vocabulary, seed, CANARY_TOKENS)
        self._tolerance = tolerance
        self._previous: dict[str, Canary] = {}

    def __call__(self, version: int) -> dict[str, float]:
        """Publish, verify, measure."""
        start = time.monotonic()
        synced = self._runner.run(self._publish(version))
        self._previous = synced.canaries
        return {"perf/sync_ms": 1000 * (time.monotonic() - start), "sync/canary_abs_diff_max": synced.gap}

    async def _publish(self, version: int) -> Synced:
        # The weights are final already: the learner answers for them while the engines are still pausing.
        answering = asyncio.create_task(asyncio.to_thread(self._policy.logp, "policy", _one_row(self._tokens)))

        async def send() -> Sent:
            # One after the other: both are collectives, and every rank must meet them in the same order.
            logp = await answering
            return Sent(fingerprints=await asyncio.to_thread(self._send), canary_logp=logp[1:].tolist())

        try:
            return await sync(
                self._engines, version=version, send=send, canary=self._tokens, tolerance=self._tolerance, previous=self._previous
            )
        finally:
            answering.cancel()


def _one_row(tokens: Sequence[int]) -> Batch:
    """The canary as a batch in which every token but the first counts as chosen."""
    length = len(tokens)
    action_mask = torch.ones(length, dtype=torch.bool)
    action_mask[0] = False
    return Batch(
        tokens=torch.tensor(tokens),
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        position_ids=torch.arange(length),
        action_mask=action_mask,
        rollout_logp=torch.zeros(length),
        rewards=torch.zeros(length),
        version=torch.zeros(length, dtype=torch.long),
        group=torch.zeros(1, dtype=torch.long),
        truncated=torch.zeros(1, dtype=torch.bool),
    )
