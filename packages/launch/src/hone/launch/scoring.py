"""A reward model that transformers loads, as a judge: texts in, one score each, rows of several requests read together."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from hone.datasets.tokenizer import load_tokenizer
from hone.learner.errors import ModelError
from hone.learner.model_files import resolve
from hone.learner.roles import DTYPES
from hone.rollout.rewards.result import Judgement, RewardItem


class RewardModel:
    """The model of a directory that loads as AutoModelForSequenceClassification with one label and its head called `score`.

    A text's score [reward] is that of its last token. Raises ModelError for a model without a trained head of one label, or without
    the statistics to `normalize` by.
    """

    def __init__(self, directory: str, *, dtype: str, max_len: int, normalize: bool, batch_size: int) -> None:
        path: Path = resolve(directory)
        self._tokenizer = load_tokenizer(str(path))
        kind = transformers.AutoModelForSequenceClassification
        model, found = kind.from_pretrained(path, dtype=DTYPES[dtype], output_loading_info=True)
        if "score" not in dict(model.named_children()) or any(name.startswith("score.") for name in found["missing_keys"]):
            raise ModelError(f"{directory} has no trained head `score`, so it is no reward model; name one that `launch rm` has written")
        if model.config.num_labels != 1:
            raise ModelError(f"{directory} has {model.config.num_labels} labels, and a reward model has one; name another model")
        mean, std = getattr(model.config, "mean", None), getattr(model.config, "std", None)
        if normalize and (mean is None or not std):
            raise ModelError(f"{directory}/config.json has no mean and std of the model's rewards; turn --model.normalize off")
        self._model: Any = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self._mean, self._std = (float(mean), float(std)) if normalize and mean is not None and std else (0.0, 1.0)
        self._max_len, self._batch_size = max_len, batch_size
        self._ends = frozenset(self._tokenizer.all_special_ids)
        self._waiting: asyncio.Queue[tuple[list[int], asyncio.Future[float]]] = asyncio.Queue()
        self._reader: asyncio.Task[None] | None = None

    async def judge(self, items: Sequence[RewardItem]) -> list[Judgement]:
        """The score of each item's query as its reward."""
        if self._reader is None:
            self._reader = asyncio.ensure_future(self._read())
        # Tokenised before any waits with other requests: what is wrong with a text is told to its own request alone.
        texts = [self._ids(item.query) for item in items]
        futures = [asyncio.get_running_loop().create_future() for _ in items]
        for ids, future in zip(texts, futures, strict=True):
            self._waiting.put_nowait((ids, future))
        scores = await asyncio.gather(*futures)
        return [Judgement(reward=score, score=score, extra_logs={}) for score in scores]

    def close(self) -> None:
        """Stop reading."""
        if self._reader is not None:
            self._reader.cancel()

    async def _read(self) -> None:
        """Whatever waits is read together, `batch_size` texts at a time."""
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < self._batch_size and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            reading = asyncio.to_thread(self.scores, [ids for ids, _ in batch])
            (found,) = await asyncio.gather(reading, return_exceptions=True)
            for place, (_, future) in enumerate(batch):
                if future.done():  # whoever asked has gone away
                    continue
                if isinstance(found, BaseException):  # memory that ran out, say: all that were read together are told
                    future.set_exception(found)
                else:
                    future.set_result(found[place])

    @torch.no_grad()
    def scores(self, ids: Sequence[Sequence[int]]) -> list[float]:
        """The score of each text, tokenised."""
        lengths = torch.tensor([len(one) for one in ids])
        width = int(lengths.max())
        tokens = torch.tensor([[*one, *[0] * (width - len(one))] for one in ids])
        mask = (torch.arange(width) < lengths[:, None]).long()
        device = next(self._model.parameters()).device
        hidden = self._model.base_model(input_ids=tokens.to(device), attention_mask=mask.to(device), use_cache=False).last_hidden_state
        # By place, not by padding token: where that is the end of sequence, transformers would read the token before it.
        last = hidden[torch.arange(len(ids)), (lengths - 1).to(device)]
        return [(score - self._mean) / self._std for score in self._model.score(last).float().squeeze(-1).tolist()]

    def _ids(self, text: str) -> list[int]:
        """Ending with an end token, as every row that it was trained on; of a text beyond `max_len` tokens the end is read.

        One is put behind a text without it, as OpenRLHF's server does; what a chat template puts behind it, a line break, is left out.
        """
        begins = self._tokenizer.bos_token
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=not (begins and text.startswith(str(begins))))
        said = len(ids)
        while said and not str(self._tokenizer.decode(ids[said - 1])).strip():
            said -= 1
        ended = said and ids[said - 1] in self._ends
        return (ids[:said] if ended else [*ids, int(str(self._tokenizer.eos_token_id))])[-self._max_len :]
