"""The other ways weights travel: through a file, with what did not change left out, in another number format, an adapter alone."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from torch.testing import assert_close

from hone.rollout.errors import EngineError, StaleWeights
from hone.rollout.weight_sync import trainer
from hone.rollout.weight_sync.file import FileTrainer
from hone.rollout.weight_sync.source import FingerprintedSource, fingerprint
from tests.rollout.conftest import CANARY, DirectClient, Loop, Parameters, Served, logp_of, request, start, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


def answers(served: Served) -> list[float]:
    return served.loop.run(served.engine.prompt_logp(CANARY))


# Through a file


@pytest.fixture
def reading_files(untied: Served) -> Iterator[Served]:
    """The untied engine with the receiver of files in its worker."""

    def other(wrapper: Any) -> None:
        from hone.rollout.weight_sync.receivers import FileReceiver

        usual = wrapper.worker.weight_transfer_engine
        wrapper.worker.usual_receiver = usual
        wrapper.worker.weight_transfer_engine = FileReceiver(usual.config, usual.vllm_config, usual.device, usual.model)

    untied.in_the_worker(other)
    yield untied
    untied.in_the_worker(usual_receiver)
    untied.sync()


def usual_receiver(wrapper: Any) -> None:
    """The one that the engine was started with."""
    wrapper.worker.weight_transfer_engine = wrapper.worker.usual_receiver


def test_a_file_brings_what_shared_memory_brings_bit_for_bit(untied: Served, reading_files: Served, tmp_path: Path) -> None:
    shared = untied.trainer
    reading_files.step()
    reading_files.trainer = trainer(
        "file", client=untied.client, source=Parameters(untied.model), rank=0, workers=1, directory=tmp_path / "weights"
    )
    try:
        reading_files.sync()
        by_file, told = answers(untied), untied.loop.run(untied.engine.fingerprints())
    finally:
        untied.trainer = shared
    assert list((tmp_path / "weights").iterdir()) == []
    untied.in_the_worker(usual_receiver)
    untied.sync()
    assert answers(untied) == by_file and untied.loop.run(untied.engine.fingerprints()) == told
    assert_close(torch.tensor(by_file), logp_of(untied.model, CANARY), rtol=0, atol=1e-4)


class Reader:
    """Reads the file while it is announced."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        pass

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: Any) -> None:
        from safetensors.torch import load_file

        self.found = load_file(update_info["path"])
        assert update_info["fingerprints"] == {name: fingerprint(tensor) for name, tensor in self.found.items()}

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        pass


def test_a_file_is_whole_and_goes(tmp_path: Path) -> None:
    reader, tensors = Reader(), {"a": torch.randn(3, 4).t(), "b": torch.ones(2, dtype=torch.bfloat16)}
    sending = FileTrainer(client=reader, source=FingerprintedSource(tensors.items()), rank=0, directory=tmp_path)
    sending.send_weights()
    assert all(torch.equal(reader.found[name], tensor) for name, tensor in tensors.items()) and not list(tmp_path.iterdir())


def test_a_directory_that_takes_no_file_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sending = FileTrainer(client=Reader(), source=FingerprintedSource({"a": torch.ones(2)}.items()), rank=0, directory=tmp_path)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(EngineError, match=r"could not be written to .*No space left"):
        sending.send_weights()
    assert not list(tmp_path.iterdir())


# What did not change is left out


@dataclasses.dataclass
class Listening(DirectClient):
    """Remembers what was announced."""

    heard: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def update_weights(self, update_info: Any) -> None:
        self.heard.append(update_info)
        super().update_weights(update_info)


def move(served: Served, part: str) -> None:
    with torch.no_grad():
        for name, parameter in served.model.named_parameters():
            if part in name:
                parameter += 0.05 * torch.randn(parameter.shape)


def test_an_update_without_what_did_not_change_is_the_whole_one_bit_for_bit(untied: Served) -> None:
    usual = untied.trainer
    client = Listening(engine=untied.engine, loop=untied.loop)
    untied.trainer = trainer("shared_memory", client=client, source=Parameters(untied.model), rank=0, workers=1, delta=True)
    try:
        untied.sync()
        assert client.heard[-1]["unchanged"] == []
        for part, still in [("layers.1.mlp.up_proj", 20), ("lm_head", 20), ("nothing", 21)]:
            move(untied, part)
            assert untied.sync().gap < 1e-4
            unchanged = client.heard[-1]["unchanged"]
            assert len(unchanged) == still and not [name for name in unchanged if part in name]
        # After a failure nothing is left out.
        untied.in_the_worker(lambda worker: setattr(worker.weight_transfer_engine, "_held", {}))
        move(untied, "layers.0")
        with pytest.raises(StaleWeights, match="not what was sent: "):
            untied.sync()
        assert untied.sync().gap < 1e-4 and client.heard[-1]["unchanged"] == []
        move(untied, "layers.0.self_attn")
        untied.sync()
        by_parts = answers(untied)
    finally:
        untied.trainer.close()
        untied.trainer = usual
    untied.__post_init__()  # a fresh trainer, all weights
    untied.sync()
    assert answers(untied) == by_parts


# Another number format


def test_weights_travel_in_the_engines_number_format() -> None:
    tensors = {"a": torch.randn(4, 4), "ids": torch.arange(3)}
    source = FingerprintedSource(tensors.items(), dtype=torch.bfloat16)
    sent = dict(source)
    assert sent["a"].dtype == torch.bfloat16 and torch.equal(sent["a"], tensors["a"].bfloat16()) and sent["ids"] is tensors["ids"]
    assert source.fingerprints["a"] == fingerprint(tensors["a"].bfloat16())
    assert [one.dtype for one in source.metadata()] == [torch.bfloat16, torch.int64]


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"a": torch.ones(2, 3)}, "lost 'b'"),
        ({"b": torch.ones(4)}, "lost 'a'"),
        ({"a": torch.ones(2, 3), "b": torch.ones(4), "c": torch.ones(1)}, "new tensor 'c'"),
        ({"a": torch.ones(2, 3), "c": torch.ones(4)}, "lost 'b'|new tensor 'c'"),
        ({"a": torch.ones(3, 2), "b": torch.ones(4)}, r"'a' is torch.float32 \[3, 2\] now and was torch.float32 \[2, 3\]"),
        ({"a": torch.ones(2, 3).bfloat16(), "b": torch.ones(4)}, "'a' is torch.bfloat16"),
    ],
)
def test_a_learner_that_reads_other_tensors_than_before_is_told_which(second: dict[str, Tensor], said: str) -> None:
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(4)}
    source = FingerprintedSource(tensors.items())
    list(source)
    source._weights = second.items()
    with pytest.raises(StaleWeights, match=said):
        list(source)


# An adapter alone

RANK = 4


class Adapter:
    """PEFT's tensors of a model, as a stream."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(get_peft_model_state_dict(self.model).items())


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("adapted")
    base = tiny_model("tied", directory)
    config = LoraConfig(r=RANK, lora_alpha=12, target_modules=["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    model = get_peft_model(base, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        engine = start(directory, "adapted", max_model_len=1024, lora_rank=RANK)
    loop = Loop()
    served = Served(engine=engine, model=model, loop=loop)
    read = {"r": RANK, "lora_alpha": 12, "target_modules": sorted(config.target_modules), "bias": "none"}
    served.trainer = trainer("shared_memory", client=served.client, source=Adapter(model), rank=0, workers=1, adapter=read)
    yield served
    loop.run(engine.shutdown())
    loop.close()


def perturb(served: Served, seed: int) -> None:
    """Move the adapter, as an optimiser would; the base stays."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in served.model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def test_an_adapter_alone_is_served_as_the_learner_has_it(adapted: Served) -> None:
    first = adapted.sync()  # B is zero: the base model
    moved = []
    for seed in range(3):
        perturb(adapted, seed)
        synced = adapted.sync()
        assert synced.gap < 1e-4
        moved.append(synced.canaries["adapted"].engine)
        expected = {name: fingerprint(tensor) for name, tensor in Adapter(adapted.model)}
        assert adapted.loop.run(adapted.engine.fingerprints()) == expected and all("lora_" in name for name in expected)
    assert len({first.canaries["adapted"].engine, *moved}) == 4


def test_a_prefix_cached_under_an_old_adapter_is_not_used(adapted: Served) -> None:
    prompt = tuple(range(20, 90))
    asked = [request(prompt, seed=1, length=2)]
    adapted.sync()
    adapted.generate(asked)
    assert adapted.generate(asked)[0].cached_tokens == 64
    perturb(adapted, 11)
    adapted.sync()
    (drawn,) = adapted.generate(asked)
    assert drawn.cached_tokens == 0 and set(drawn.version) == {adapted.version}
    assert_close(torch.tensor(drawn.logp), logp_of(adapted.model, prompt + drawn.tokens)[69:], rtol=0, atol=1e-4)


class Spoiling(DirectClient):
    """Changes one tensor of the adapter that lies ready."""

    def update_weights(self, update_info: Any) -> None:
        from safetensors.torch import load_file, save_file

        path = Path(update_info["adapter"]) / "adapter_model.safetensors"
        tensors = load_file(path)
        name = next(name for name in tensors if "layers.1.mlp.up_proj.lora_B" in name)
        tensors[name][0, 0] += 1
        save_file(tensors, path)
        super().update_weights(update_info)


def test_an_adapter_altered_on_its_way_is_named_and_a_whole_one_mends_it(adapted: Served) -> None:
    perturb(adapted, 21)
    with adapted.through(Spoiling(engine=adapted.engine, loop=adapted.loop)):
        with pytest.raises(StaleWeights, match=r"1 of the adapter's 24 tensors .*layers.1.mlp.up_proj.lora_B"):
            adapted.sync()
        with pytest.raises(StaleWeights, match="refuses to sample"):
            adapted.generate([request((5,), seed=1)])
    assert adapted.sync().gap < 1e-4


def test_an_adapter_that_is_not_applied_is_caught(adapted: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted.sync()
    perturb(adapted, 31)

    async def kept(request: Any) -> bool:
        return True

    with monkeypatch.context() as patch, pytest.raises(StaleWeights, match=r"still answers like version \d+"):
        patch.setattr(adapted.engine._llm, "add_lora", kept)
        adapted.sync()
    assert adapted.sync().gap < 1e-4


def test_an_adapters_directory_is_peft_s_and_goes(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    class Looking(Reader):
        def update_weights(self, update_info: Any) -> None:
            place = Path(update_info["adapter"])
            seen.update(config=json.loads((place / "adapter_config.json").read_text()), mode=place.stat().st_mode & 0o777)

    sending = trainer(
        "file",
        client=Looking(),
        source={"x.lora_A.weight": torch.ones(2, 2)}.items(),
        rank=0,
        workers=1,
        directory=tmp_path,
        adapter={"r": 2},
    )
    sending.send_weights()
    assert seen == {"config": {"r": 2}, "mode": 0o700} and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="directory"):
        trainer("nccl", client=Looking(), source=[], rank=0, workers=1, adapter={"r": 2})
