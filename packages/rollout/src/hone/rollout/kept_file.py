"""What a producer has open, as the bytes of one npz file: flat arrays of all segments end to end, and one JSON text. No pickle.

Prompts are named by their ids alone: whoever reads the file draws them again from the data.
"""

import dataclasses
import io
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hone.algos.batch import Attachment, SamplerContract, Trajectory
from hone.rollout.executor import Group, Sample
from hone.rollout.producer import Kept
from hone.rollout.types import Prompt

FORMAT = 1
PER_TOKEN = ("tokens", "action_mask", "rollout_logp", "rewards", "version")
"""Arrays of a segment, one entry a token."""


def to_bytes(kept: Kept) -> bytes:
    """The file's content."""
    segments: list[Trajectory] = []
    pictures: list[bytes] = []
    described = [
        {
            "prompt": group.prompt.prompt_id,
            "samples": [_sample(sample, segments, pictures) for sample in group.samples],
            "greedy": None if group.greedy is None else _sample(group.greedy, segments, pictures),
        }
        for group in kept.groups
    ]
    told = {"format": FORMAT, "groups": described, "prompts": [prompt.prompt_id for prompt in kept.prompts]}
    arrays: dict[str, Any] = {name: _end_to_end([getattr(segment, name).numpy() for segment in segments]) for name in PER_TOKEN}
    file = io.BytesIO()
    np.savez(
        file,
        told=np.frombuffer(json.dumps(told).encode(), dtype=np.uint8),
        lengths=np.array([segment.tokens.numel() for segment in segments], dtype=np.int64),
        pictures=np.frombuffer(b"".join(pictures), dtype=np.uint8),
        picture_sizes=np.array([len(one) for one in pictures], dtype=np.int64),
        **arrays,
    )
    return file.getvalue()


def from_bytes(data: bytes, prompts: Callable[[Sequence[str]], Mapping[str, Prompt]]) -> Kept:
    """What was open; `prompts(ids)` draws the prompts it names. Raises ValueError for a file of another format."""
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    told = json.loads(arrays["told"].tobytes())
    if told["format"] != FORMAT:
        raise ValueError(f"what was open is written in format {told['format']}, this version reads {FORMAT}")
    drawn = prompts([*(group["prompt"] for group in told["groups"]), *told["prompts"]])
    bounds = np.concatenate([[0], np.cumsum(arrays["lengths"])])
    sizes = np.concatenate([[0], np.cumsum(arrays["picture_sizes"])])
    whole = arrays["pictures"].tobytes()
    pictures = [whole[start:end] for start, end in itertools.pairwise(sizes)]

    def sample(described: dict[str, Any], prompt: Prompt) -> Sample:
        *earlier, last = (_segment(one, arrays, bounds, pictures) for one in described.pop("segments"))
        return Sample(trajectory=last, earlier=tuple(earlier), label=prompt.label, **described)

    return Kept(
        groups=[
            Group(
                prompt=drawn[group["prompt"]],
                samples=tuple(sample(one, drawn[group["prompt"]]) for one in group["samples"]),
                greedy=None if group["greedy"] is None else sample(group["greedy"], drawn[group["prompt"]]),
            )
            for group in told["groups"]
        ],
        prompts=[drawn[prompt_id] for prompt_id in told["prompts"]],
    )


def _sample(sample: Sample, segments: list[Trajectory], pictures: list[bytes]) -> dict[str, Any]:
    """A sample without its label, which is the prompt's; its segments and their pictures are appended to the lists."""
    described = []
    for segment in sample.segments:
        described.append(
            {
                "place": len(segments),
                "prompt_id": segment.prompt_id,
                "sample": segment.sample,
                "truncated": bool(segment.truncated),
                "score": segment.score,
                "contract": dataclasses.asdict(segment.contract),
                "segment": segment.segment,
                "attached": [
                    {"start": one.start, "count": one.count, "picture": len(pictures) + at} for at, one in enumerate(segment.attached)
                ],
            }
        )
        segments.append(segment)
        pictures.extend(one.data for one in segment.attached)
    plain = ("prompt_text", "response_text", "reward", "score", "extra_logs", "cached_tokens")
    return {**{name: getattr(sample, name) for name in plain}, "segments": described}


def _segment(told: dict[str, Any], arrays: Mapping[str, np.ndarray], bounds: np.ndarray, pictures: Sequence[bytes]) -> Trajectory:
    place = told.pop("place")
    span = slice(int(bounds[place]), int(bounds[place + 1]))
    settings: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in told.pop("contract").items()}
    contract = SamplerContract(**settings)
    attached = tuple(Attachment(start=one["start"], count=one["count"], data=pictures[one["picture"]]) for one in told.pop("attached"))
    tensors: dict[str, Any] = {name: torch.from_numpy(arrays[name][span].copy()) for name in PER_TOKEN}
    return Trajectory(contract=contract, attached=attached, **told, **tensors)


def _end_to_end(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0)
