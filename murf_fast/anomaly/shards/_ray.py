"""Workers of Ray that hold things by name and answer questions about them; one that dies is replaced and asked again.

What is in a worker can be made again from where it came (a file, the model), so a death costs time alone. A question
that its worker dies of every time is given up after ``DEATHS``, by name.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import ray
import torch
from torch import Tensor

from murf_fast._ray_cluster import told
from murf_fast.anomaly.shards.transport import Answer

DEATHS = 3  # of workers, at one question
LARGE = 1 << 16  # bytes of an argument that is stored once, instead of going with every question


@dataclass(frozen=True)
class Question:
    """A method of a thing that workers hold, its arguments, and what is asked for messages."""

    method: str
    args: tuple[Any, ...]
    what: str


class Pool:
    """So many workers, each an actor.

    Args:
        workers: Their number.
        threads: CPU threads of each.
        gpus: GPUs of each.
    """

    def __init__(self, workers: int, threads: int, gpus: int) -> None:
        self._make = cast("Any", _Worker).options(num_cpus=threads, num_gpus=gpus)
        self._threads = threads
        self._actors = [self._new() for _ in range(workers)]
        self._held: list[set[str]] = [set() for _ in self._actors]

    def __len__(self) -> int:
        return len(self._actors)

    def _new(self) -> Any:
        return self._make.remote(self._threads)

    def ask(self, worker: int, name: str, make: Callable[..., Any], args: tuple[Any, ...], question: Question) -> Asked:
        """Asks, and where the worker does not hold the thing yet has it made first, by ``make(*args)``."""
        actor, made = self._actors[worker], None
        if name not in self._held[worker]:
            self._held[worker].add(name)
            made = actor.hold.remote(name, make, *args)
        return Asked(actor, made, actor.ask.remote(name, question.method, *question.args))

    def replace(self, worker: int, dead: object) -> None:
        """A new worker for one that died, unless that has happened by now."""
        if self._actors[worker] is dead:
            ray.kill(dead)  # one that only does not answer would keep its processors
            self._actors[worker], self._held[worker] = self._new(), set()

    def drop(self, name: str) -> None:
        """What is held by a name goes."""
        for actor, held in zip(self._actors, self._held, strict=True):
            if name in held:
                held.discard(name)
                actor.drop.remote(name)

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)


@dataclass(frozen=True)
class Asked:
    """A question on its way."""

    actor: Any
    made: ray.ObjectRef | None
    answer: ray.ObjectRef

    def get(self) -> Any:
        """The answer; a ``RayActorError`` if the worker died.

        Raises:
            Exception: What the worker raised.
        """
        try:
            if self.made is not None:
                ray.get(self.made)
            return ray.get(self.answer)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, (TypeError, ValueError, OSError)):
                raise cause from None
            raise told(error) from error


@ray.remote
class _Worker:
    """Things by name, in a process of Ray's."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._things: dict[str, object] = {}

    def hold(self, name: str, make: Callable[..., Any], *args: object) -> None:
        self._things[name] = make(*args)

    def ask(self, name: str, method: str, *args: object) -> object:
        return getattr(self._things[name], method)(*args)

    def drop(self, name: str) -> None:
        self._things.pop(name, None)


class RayShards:
    """Shards of a bank, one on every worker; see :class:`murf_fast.anomaly.shards.transport.Shards`.

    Args:
        pool: The workers.
        name: Of the shards; each bank has its own.
        counts: Rows of every shard, at most one shard a worker.
        made: Of a shard's number, what makes it: a function that pickles, and its arguments. Asked again when a worker
            died, so that what it makes is up to date.
    """

    def __init__(
        self,
        pool: Pool,
        name: str,
        counts: list[int],
        made: Callable[[int], tuple[Callable[..., Any], tuple[Any, ...]]],
    ) -> None:
        self._pool, self._name, self.counts, self._made = pool, name, counts, made

    def ask(self, question: str, *args: object) -> list[Answer]:
        # Large ones go to every machine once, whatever the number of its workers.
        args = tuple(a.cpu() if isinstance(a, Tensor) else a for a in args)
        args = tuple(ray.put(a) if isinstance(a, Tensor) and a.nbytes > LARGE else a for a in args)
        question = Question(question, args, f"asked for `{question}` of {self._name}")
        asked = [self._asked(i, question) for i in range(len(self.counts))]
        return [self._got(i, question, first) for i, first in enumerate(asked)]

    def least(self, question: str, *args: object) -> Tensor:
        return torch.stack([answer for (answer,) in self.ask(question, *args)]).amin(0)

    def close(self) -> None:
        self._pool.drop(self._name)

    def _asked(self, shard: int, question: Question) -> Asked:
        return self._pool.ask(shard, self._name, *self._made(shard), question)

    def _got(self, shard: int, question: Question, asked: Asked) -> Answer:
        for death in range(1, DEATHS + 1):
            try:
                return asked.get()
            except ray.exceptions.RayActorError:
                self._pool.replace(shard, asked.actor)
                if death == DEATHS:
                    raise died(question.what) from None
                asked = self._asked(shard, question)
        raise AssertionError


def each(
    pool: Pool, name: str, make: Callable[..., Any], args: tuple[Any, ...], questions: Iterable[Question]
) -> Iterator[Any]:
    """The answers to all questions in their order, each by whichever worker is free.

    A worker has one question at a time, so that one which it dies of is known.

    Memory: two answers a worker that wait for those before them.
    """
    to_ask, free = iter(questions), list(range(len(pool)))
    waiting: deque[_Job] = deque()
    running: dict[ray.ObjectRef, _Job] = {}
    more = True
    while more or waiting:
        while more and free and len(waiting) < 2 * len(pool):
            question = next(to_ask, None)
            if question is None:
                more = False
                break
            job = _Job(question)
            waiting.append(job)
            running[job.start(pool, free.pop(), name, make, args)] = job
        if running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            job = running.pop(ready)
            if job.finish(pool):
                free.append(job.worker)
            else:
                running[job.start(pool, job.worker, name, make, args)] = job
        while waiting and waiting[0].is_done:
            yield waiting.popleft().answer


class _Job:
    """A question until it is answered."""

    def __init__(self, question: Question) -> None:
        self._question, self.is_done, self._deaths = question, False, 0
        self.answer: Any = None

    def start(
        self, pool: Pool, worker: int, name: str, make: Callable[..., Any], args: tuple[Any, ...]
    ) -> ray.ObjectRef:
        self.worker, self._asked = worker, pool.ask(worker, name, make, args, self._question)
        return self._asked.answer

    def finish(self, pool: Pool) -> bool:
        """Whether there is an answer; else the worker died and another is there."""
        try:
            self.answer, self.is_done = self._asked.get(), True
            return True
        except ray.exceptions.RayActorError:
            self._deaths += 1
            pool.replace(self.worker, self._asked.actor)
            if self._deaths == DEATHS:
                raise died(self._question.what) from None
            return False


def died(what: str) -> ValueError:
    return ValueError(f"{DEATHS} workers of Ray died, one after another, when {what}")
