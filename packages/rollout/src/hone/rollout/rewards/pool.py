"""Processes that run a reward function outside the engine's event loop, each with a deadline per response.

One thread per worker process owns its pipe: jobs (a queue shared by all) -> pipe -> worker -> pipe -> futures. A worker
that hangs or dies is killed with all its children and replaced; the response it was judging is a RewardError, those
behind it are judged by its successor.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from hone.rollout.errors import RewardError
from hone.rollout.rewards.function import locate
from hone.rollout.rewards.process import WorkerGone, WorkerProcess
from hone.rollout.rewards.result import Judgement, RewardItem

_log = logging.getLogger(__name__)

_LARGEST_MESSAGE = 32
_START_AGAIN_S = (0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True, kw_only=True)
class _Job:
    item: RewardItem
    future: Future[Judgement] = field(default_factory=Future)


class RewardPool:
    """`workers` processes that run the reward function of `source` (a file or a dotted module), `timeout_s` per response.

    The constructor returns when every worker has loaded the function, so that imports do not count against the deadline,
    and raises RewardError if one cannot. `log` receives what the function prints; without it, it goes where ours goes.
    """

    def __init__(self, source: str, *, workers: int, timeout_s: float, log: Path | None = None) -> None:
        locate(source)
        self._source = source
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        start = partial(WorkerProcess, source, log=log)
        self._slots = [_Slot(start, self._jobs, self._closed, workers=workers, timeout_s=timeout_s) for _ in range(workers)]
        try:
            for slot in self._slots:
                slot.ready.result()
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers."""
        return tuple(slot.worker.pid for slot in self._slots if slot.worker is not None)

    async def judge(self, items: Sequence[RewardItem]) -> list[Judgement]:
        """The judgements, in the order of `items`; the first failure is raised as RewardError and cancels what is not begun."""
        if self._closed.is_set():
            raise RewardError(f"the reward pool of {self._source} is closed; it judges nothing more")
        jobs = [_Job(item=item) for item in items]
        for job in jobs:
            self._jobs.put(job)
        answers = [asyncio.wrap_future(job.future) for job in jobs]
        try:
            return list(await asyncio.gather(*answers))
        finally:
            for answer in answers:
                answer.cancel()

    def close(self) -> None:
        """Kill the workers and whatever they have started; returns when they are gone. May be called twice."""
        self._closed.set()
        for slot in self._slots:
            slot.kill()
            self._jobs.put(None)
        for slot in self._slots:
            slot.thread.join()
        while not self._jobs.empty():
            if (job := self._jobs.get()) is not None and job.future.set_running_or_notify_cancel():
                job.future.set_exception(_closed_before(job))


class _Slot:
    """One place in the pool: a thread that always has a worker, except while it replaces it."""

    def __init__(
        self,
        start: Callable[[], WorkerProcess],
        jobs: queue.SimpleQueue[_Job | None],
        closed: threading.Event,
        *,
        workers: int,
        timeout_s: float,
    ) -> None:
        self.worker: WorkerProcess | None = None
        self.ready: Future[None] = Future()
        self._start, self._jobs, self._closed, self._workers, self._timeout_s = start, jobs, closed, workers, timeout_s
        self._swap = threading.Lock()
        # The thread that starts a worker must outlive it: Linux tells a process that its parent died when that thread does.
        self.thread = threading.Thread(target=self._serve, name="reward-slot", daemon=True)
        self.thread.start()

    def kill(self) -> None:
        """End the worker now; from any thread."""
        with self._swap:
            if self.worker is not None:
                self.worker.kill()

    def _serve(self) -> None:
        try:
            self._fill()
        except Exception as error:
            self.ready.set_exception(error)
        else:
            self.ready.set_result(None)
            jobs: list[_Job] = []
            while jobs or (jobs := self._take()):
                jobs = self._judge(jobs)
        finally:
            self._empty()

    def _take(self) -> list[_Job]:
        """Wait for jobs; none when the pool is closed. Several at once while many wait, one by one towards the end."""
        while (job := self._jobs.get()) is not None:
            taken = [job]
            # Jobs in a message wait behind one another even if another worker is idle: so no slot takes a large part of the rest.
            share = min(_LARGEST_MESSAGE, self._jobs.qsize() // (4 * self._workers))
            with suppress(queue.Empty):  # another slot was faster
                while len(taken) < share and (job := self._jobs.get_nowait()) is not None:
                    taken.append(job)
            if job is None:
                self._jobs.put(None)
            if wanted := [job for job in taken if job.future.set_running_or_notify_cancel()]:
                return wanted
        return []

    def _judge(self, jobs: list[_Job]) -> list[_Job]:
        """Have the worker judge the jobs; returns those that are left after a failure, with a new worker in its place."""
        if self._closed.is_set():
            for job in jobs:
                job.future.set_exception(_closed_before(job))
            return []
        try:
            worker = self._fill()
            worker.send([job.item for job in jobs])
        # Whatever went wrong belongs to those who wait; this thread has nobody above it to tell.
        except Exception as error:
            for job in jobs:
                job.future.set_exception(error)
            return []
        for judged, job in enumerate(jobs, start=1):
            try:
                job.future.set_result(worker.answer(job.item, self._timeout_s))
            except Exception as error:
                job.future.set_exception(_closed_before(job) if self._closed.is_set() else error)
                if isinstance(error, WorkerGone) or not isinstance(error, RewardError):
                    self._replace()
                    return jobs[judged:]
        return []

    def _replace(self) -> None:
        """Put a new worker in the place of one that hung or died; if none will start, the next job tries again, and is told."""
        self._empty()
        for pause_s in (*_START_AGAIN_S, None):
            try:
                self._fill()
            # Whatever keeps a worker from starting, also the system's refusal of a process, which may pass.
            except Exception as error:
                _log.warning("no reward worker in the place of one that ended: %s", error)
                if pause_s is None or self._closed.wait(pause_s):
                    return
            else:
                return

    def _fill(self) -> WorkerProcess:
        """The worker of this slot, started if there is none."""
        if self.worker is not None:
            return self.worker
        with self._swap:
            if self._closed.is_set():
                raise RewardError("the reward pool was closed while it started a worker")
            worker = self.worker = self._start()
        try:
            worker.await_ready()
        except BaseException:
            self._empty()
            raise
        return worker

    def _empty(self) -> None:
        with self._swap:
            if self.worker is not None:
                self.worker.close()
            self.worker = None


def _closed_before(job: _Job) -> RewardError:
    return RewardError(f"the reward pool was closed before it judged prompt {job.item.prompt_id!r}")
