"""What a program over labelled rows points at, looked at before anything heavy starts: files, models, the run directory, disk."""

import importlib.util
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from hone.datasets.errors import DataError
from hone.datasets.reading import open_datasets
from hone.datasets.templates import template_problem
from hone.launch.builtin import BuiltinModel
from hone.launch.errors import ENVIRONMENT, Problem, exit_code
from hone.launch.fitting import unfit
from hone.launch.model_directory import faults, stated
from hone.launch.offline_config import OfflineConfig
from hone.launch.offline_data import SPLIT_FLAGS, read_rows
from hone.launch.preflight import head_stride, named_setting, run_directory
from hone.launch.resolve import Resolved


def lacking(resolved: Resolved, gpus: int) -> Iterator[Problem]:
    """Everything the configuration needs that is not there, or not as it must be, on a machine with so many GPUs."""
    config: OfflineConfig = resolved.config
    checks = (_installation(config), _models(resolved), _rows(resolved), run_directory(config))
    for problem in itertools.chain.from_iterable(checks):
        yield problem if problem.where else problem.at(resolved.where(problem.settings))


def _installation(config: OfflineConfig) -> Iterator[Problem]:
    for module in ("ray", "deepspeed") if config.run.backend == "ray" else ():
        if importlib.util.find_spec(module) is None:
            mend = "`uv sync`, or --run.backend local, which needs none of it"
            yield Problem(what=f"{module} is not installed", mend=mend, code=ENVIRONMENT)


def _models(resolved: Resolved) -> Iterator[Problem]:
    config: OfflineConfig = resolved.config
    longest = BuiltinModel().max_position_embeddings
    if config.model.model_name_or_path is None and config.data.max_len > longest:
        what = f"data.max_len {config.data.max_len} is more than the built-in model's {longest} positions"
        yield Problem(what=what, mend=f"--data.max-len {longest} or less, or --recipe laptop", settings=("data.max_len",))
    for name, path in {"model.model_name_or_path": config.model.model_name_or_path, **config.others}.items():
        if path is None:
            continue
        problems = list(faults(path, max_len=config.data.max_len))
        for problem in problems:
            yield replace(problem, settings=(name,))
        if not problems and Path(path).expanduser().is_dir():
            yield from head_stride(config, str(Path(path).expanduser()))
            if name == "model.model_name_or_path":
                yield from unfit(resolved, [("model", config.trained_kind, path)])


def _rows(resolved: Resolved) -> Iterator[Problem]:
    config: OfflineConfig = resolved.config
    if error := template_problem(config.data):
        yield replace(stated(error, otherwise=""), settings=named_setting(error, "data.tokenizer_chat_template"))
    files = {"data.dataset": config.data.dataset, "eval.dataset": config.eval.dataset}
    unsure = any(name.startswith("data.") for name in resolved.bad)
    for name, path in files.items():
        if path is None:
            continue
        flag = "--" + name
        own = name == "data.dataset"
        at_most, split = (config.data.max_samples, config.data.dataset_split) if own else (config.eval.max_samples, config.eval.split)
        try:
            if unsure:
                open_datasets(
                    path, split=split, max_samples=1, flag=flag, split_flag=SPLIT_FLAGS[flag]
                )  # by a stand-in, rows would be faulty that are not
            else:
                read_rows(config, path, split=split, at_most=at_most, flag=flag)
        except DataError as error:
            if "\n" in str(error):  # faulty rows: a remedy stands with each kind
                yield Problem(what=str(error), mend="", code=exit_code(error), settings=(name,))
            else:
                told = stated(error, otherwise=f"{flag} FILE.jsonl, one JSON object per line")
                yield replace(told, settings=named_setting(error, name))
