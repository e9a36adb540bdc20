"""Images from end to end: what vLLM samples is what the learner scores, after updates too, and whole runs on prompts with images."""

import asyncio
import base64
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, AutoProcessor

from hone.algos.algorithms import DrGRPO
from hone.algos.batch import Attachment, Batch, SamplerContract
from hone.datasets.tokenizer import SEEING
from hone.launch.cli import main
from hone.launch.observe.run_directory import read_metrics
from hone.learner.learner import Learner
from hone.learner.packing import shards
from hone.learner.vision import FAMILIES
from hone.rollout.engines.vllm import VLLMEngine
from hone.rollout.errors import EngineError
from hone.rollout.types import Completion, Request
from hone.rollout.weight_sync import trainer
from hone.rollout.weight_sync.protocol import Sent, Synced, sync
from tests.launch.conftest import write_reward, write_rows
from tests.launch.running import started
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
class Weights:
    """The policy's weights as a stream that can be run again."""

    learner: Learner

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.learner.weights("policy")


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

        sender = trainer("shared_memory", client=client, source=Weights(self.learner), rank=0, workers=1)
        expected = self.logp(batch_of([(canary, images, len(canary) - 1)], temperature=1.0))[1:].tolist()

        async def send() -> Sent:
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


def test_images_are_read_for_the_models_that_can_be_trained_on_them() -> None:
    assert SEEING == FAMILIES


LOOK = """assert len(queries) == 1
assert "<|vision_start|>" in prompts[0] or "no picture" in prompts[0]
return {"rewards": [float(len(set(queries[0][len(prompts[0]):])) / 20)], "scores": [0.5]}"""


def write_prompts(directory: Path) -> Path:
    """Image rows of every layout, and one without."""
    (directory / "small.png").write_bytes(SMALL)
    (directory / "wide.png").write_bytes(WIDE)
    uri = "data:image/png;base64," + base64.b64encode(TALL).decode()
    rows: list[dict[str, object]] = [
        {"input": "what is it?", "images": ["small.png"]},
        {"input": "this <image> or that <image>?", "images": [{"path": "wide.png"}, {"bytes": base64.b64encode(SMALL).decode()}]},
        {"input": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "tall?"}]}]},
        {"input": "no picture here", "images": []},
    ]
    return write_rows(directory / "rows.jsonl", rows)


def arguments(directory: Path, *more: str) -> list[str]:
    model, rows = save_vision_model(directory / "model"), write_prompts(directory)
    reward = write_reward(directory / "reward.py", LOOK)
    own = ["--actor.model-name-or-path", model, "--data.prompt-dataset", str(rows), "--reward.remote-url", str(reward)]
    keys = ["--data.apply-chat-template", "--data.max-len", "128", "--rollout.max-new-tokens", "8", "--train.max-steps", "2"]
    sizes = ["--rollout.batch-size", "4", "--rollout.n-samples-per-prompt", "2", "--train.batch-size", "8", "--train.num-episodes", "2"]
    return [*own, *keys, *sizes, "--ds.param-dtype", "fp32", "--actor.adam.lr", "1e-2", *more]


def assert_learnt(run: Path, model: str) -> None:
    steps, _ = read_metrics(run)
    assert len(steps) == 2
    for step in steps:
        assert step["mismatch/logp_abs_diff_mean"] <= 1e-4 and step["sync/canary_abs_diff_max"] <= 1e-3
    before, after = (AutoModelForImageTextToText.from_pretrained(place).state_dict() for place in (model, run / "model"))
    moved = [name for name, tensor in before.items() if not torch.equal(after[name], tensor)]
    assert any(".visual." in name for name in moved) and any(".language_model." in name for name in moved)
    assert AutoProcessor.from_pretrained(run / "model").image_processor.size == AutoProcessor.from_pretrained(model).image_processor.size


def test_a_run_in_this_process_learns_from_prompts_with_images(tmp_path: Path) -> None:
    assert main(["grpo", *arguments(tmp_path, "--run.backend", "local", "--run.dir", str(tmp_path / "run"))]) == 0
    assert_learnt(tmp_path / "run", str(tmp_path / "model"))


def test_a_run_on_ray_with_vllm_and_two_sharded_ranks_learns_from_prompts_with_images(tmp_path: Path) -> None:
    ranks = ["--actor.num-gpus-per-node", "2", "--ds.zero-stage", "3", "--vllm.kv-cache-gib", "0.125", "--run.threads", "1"]
    with started(["grpo", *arguments(tmp_path, *ranks)], tmp_path / "run") as run:
        output = run.finish(limit_s=400)
        assert run.process.returncode == 0, output
    assert_learnt(tmp_path / "run", str(tmp_path / "model"))
