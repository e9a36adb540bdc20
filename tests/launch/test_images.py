"""Images from end to end: what vLLM samples is what the learner scores, after updates too, and whole runs on prompts with images."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoProcessor

from hone.algos.algorithms import DrGRPO
from hone.algos.batch import Attachment, Batch, SamplerContract
from hone.learner.learner import Learner
from hone.learner.packing import shards
from hone.rollout.engines.vllm import VLLMEngine
from hone.rollout.errors import EngineError
from hone.rollout.types import Completion, Request
from hone.rollout.weight_sync import trainer
from hone.rollout.weight_sync.protocol import Sent, Synced, sync
from tests.learner.test_vision import SMALL, TALL, WIDE, Row, batch_of
from tests.learner.tiny import make_learner, score
from tests.rollout.conftest import DirectClient, Loop, start
from tests.vision import save_vision_model, show

# vllm, while it is imported, scripts a function by torch's old way.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
SAMPLES = 4


def asked(name: str, shown: tuple[list[int], tuple[Attachment, ...]], *, length: int = 12) -> list[Request]:
    contracts = [
        SamplerContract(temperature=0.8, top_p=1.0, top_k=0, seed=seed, engine="vllm", tokenizer="", template="") for seed in range(SAMPLES)
    ]
    return [
        Request(request_id=f"{name}:{one.seed}", tokens=tuple(shown[0]), max_new_tokens=length, contract=one, images=shown[1])
        for one in contracts
    ]


@dataclass
class Seeing:
    """A vision-language model in vLLM and in a learner of the same process."""

    directory: str
    engine: VLLMEngine
    learner: Learner
    loop: Loop
    version: int = 0

    def prompts(self) -> dict[str, tuple[list[int], tuple[Attachment, ...]]]:
        processor = AutoProcessor.from_pretrained(self.directory)
        stray, images = show(processor, "look", SMALL, "well")
        return {
            "one": show(processor, "a", SMALL, "what?"),
            "none": show(processor, "text alone"),
            "two": show(processor, WIDE, "and", TALL, "?"),
            # The policy wrote the image token in an earlier turn: it stands for no image.
            "stray": ([*stray, processor.image_token_id, 90, 91], images),
        }

    def sample(self) -> tuple[list[Request], list[Completion]]:
        requests = [asked(name, shown) for name, shown in self.prompts().items()]
        drawn = [self.loop.run(self.engine.generate(of_prompt)) for of_prompt in requests]
        return [one for part in requests for one in part], [one for part in drawn for one in part]

    def logp(self, batch: Batch) -> torch.Tensor:
        return self.learner.logp("policy", shards(batch, ranks=1, max_tokens=512)[0])

    def sync(self) -> Synced:
        """The learner's weights to the engine, proven by a canary with an image."""
        canary, images = self.prompts()["two"]
        client = DirectClient(self.engine, self.loop)
        self.version += 1

        class Weights:
            def __iter__(inner) -> Iterator[tuple[str, torch.Tensor]]:
                return self.learner.weights("policy")

        sender = trainer("shared_memory", client=client, source=Weights(), rank=0, workers=1)
        expected = self.logp(batch_of([(canary, images, len(canary) - 1)], temperature=1.0))[1:].tolist()

        async def send() -> Sent:
            import asyncio

            return Sent(fingerprints=await asyncio.to_thread(sender.send_weights), canary_logp=expected)

        try:
            moved = sync([self.engine], version=self.version, send=send, canary=canary, images=images, tolerance=1e-3, previous={})
            return self.loop.run(moved)
        finally:
            sender.close()


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seeing]:
    directory = save_vision_model(tmp_path_factory.mktemp("seeing"), tied=True)
    environment = dict(os.environ)
    engine = start(Path(directory), "seeing", max_model_len=256)
    assert dict(os.environ) == environment
    loop = Loop()
    # Only the tower learns: what vLLM remembers of pictures is then all that can be stale.
    frozen = {"freeze": "model.language_model.*"}
    yield Seeing(directory=directory, engine=engine, learner=make_learner({"policy": directory}, max_tokens=512, trained=frozen), loop=loop)
    loop.run(engine.shutdown())
    loop.close()


def rows_of(requests: list[Request], drawn: list[Completion]) -> list[Row]:
    return [([*ask.tokens, *one.tokens], ask.images, len(one.tokens)) for ask, one in zip(requests, drawn, strict=True)]


def assert_same(seeing: Seeing) -> list[Row]:
    """What vLLM reports of its samples is what the learner says of them, all in one pack."""
    requests, drawn = seeing.sample()
    rows = rows_of(requests, drawn)
    batch = batch_of(rows)
    reported = torch.tensor([value for one in drawn for value in one.logp])
    assert_close(seeing.logp(batch)[batch.action_mask], reported, rtol=0, atol=1e-4)
    return rows


def test_vllm_and_the_learner_agree_on_rows_with_images_and_without(seeing: Seeing) -> None:
    rows = assert_same(seeing)
    blind = [(ids, (), written) for ids, _, written in rows]
    batch = batch_of(rows)
    assert (seeing.logp(batch) - seeing.logp(batch_of(blind))).abs().max() > 0.01


def test_after_the_tower_has_learnt_no_picture_is_remembered_as_it_was(seeing: Seeing) -> None:
    rows = assert_same(seeing)
    before = seeing.logp(batch_of(rows))
    for step in range(3):
        seeing.learner.update_policy("policy", shards(score(batch_of(rows), seed=step), ranks=1, max_tokens=512)[0], DrGRPO())
    assert (seeing.logp(batch_of(rows)) - before).abs().max() > 0.01
    synced = seeing.sync()
    assert synced.gap < 1e-4
    assert_same(seeing)


def test_ids_that_the_model_would_not_see_as_they_are_stop_the_run(seeing: Seeing) -> None:
    ids, (image,) = seeing.prompts()["one"]
    token = ids[image.start]
    longer = [*ids[: image.start], token, *ids[image.start :]]
    claimed = Attachment(start=image.start, count=image.count + 1, data=image.data)
    with pytest.raises(EngineError, match=r"fed the model 10 ids in request wrong:0 which are not the 11 of the prompt"):
        seeing.loop.run(seeing.engine.generate(asked("wrong", (longer, (claimed,)))[:1]))
