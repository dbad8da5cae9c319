"""Serve a trained model over HTTP: python examples/serve.py MODEL --processes 2 --port 8000

The parent process loads MODEL (a run, an export or an ensemble) and forks the workers, so that its
files are mapped and checked once. Each worker runs FastAPI on a socket of its own, bound to the
same port. Requests that arrive while a worker ranks are ranked together next, because a batch costs
little more than one user.

    GET  /health     {"status": "ok", "model": ..., "n_items": ..., "process": ...}
    POST /recommend  {"histories": [[17, 23], [5]], "k": 10}  ->
                     {"model": ..., "items": [[...], [...]], "scores": [[...], [...]]}

To replace the model, write the new one beside it, rename it to MODEL, and send SIGHUP to the
parent. It checks the new files. Then each worker maps them while it answers with the old model, and
switches between two batches. A new model that cannot be loaded is reported, and the old one stays.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field

from dist_vasp import Recommender

Id = int | str
USERS_PER_BATCH = 256
FILTERED_TOGETHER = 1000  # a request that hides more items is ranked alone
SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


class Request(BaseModel):
    histories: list[Annotated[list[Id], Field(max_length=10_000)]] = Field(
        min_length=1, max_length=1000
    )
    k: int = Field(10, ge=1, le=1000)
    filter_items: list[Id] = Field(default=[], max_length=100_000)
    restrict_to: list[Id] | None = Field(None, max_length=100_000)
    empty: Literal["popularity"] | None = None


class Answer(BaseModel):
    model: str
    items: list[list[Id]]
    scores: list[list[float]]


@dataclass
class Waiting:
    """A request whose answer is awaited."""

    request: Request
    answer: asyncio.Future[Answer]


class Batches:
    """Ranks the requests that wait, together, on one thread; `model` may be replaced meanwhile."""

    def __init__(self, model: Recommender) -> None:
        self.model = model
        self._waiting: asyncio.Queue[Waiting] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1)

    async def answer(self, request: Request) -> Answer:
        waiting = Waiting(request, asyncio.get_running_loop().create_future())
        self._waiting.put_nowait(waiting)
        return await waiting.answer

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._waiting.get()]
            while not self._waiting.empty() and _n_users(batch) < USERS_PER_BATCH:
                batch.append(self._waiting.get_nowait())
            requests = [waiting.request for waiting in batch]
            found = await loop.run_in_executor(self._thread, answers, self.model, requests)
            for waiting, answer in zip(batch, found, strict=True):
                if waiting.answer.cancelled():  # the client has gone
                    continue
                if isinstance(answer, Exception):
                    waiting.answer.set_exception(answer)
                else:
                    waiting.answer.set_result(answer)


def _n_users(batch: list[Waiting]) -> int:
    return sum(len(waiting.request.histories) for waiting in batch)


def answers(model: Recommender, requests: list[Request]) -> list[Answer | Exception]:
    """Rank requests together where their options allow; a wrong one does not harm the others."""
    found: dict[int, Answer | Exception] = {}
    together: dict[tuple[str | None, int], list[int]] = {}
    for place, request in enumerate(requests):
        few = request.restrict_to is None and len(request.filter_items) <= FILTERED_TOGETHER
        alone = -1 if few else place
        together.setdefault((request.empty, alone), []).append(place)
    for places in together.values():
        try:
            ranked: list[Any] = rank(model, [requests[place] for place in places])
        except Exception as error:
            ranked = [error] if len(places) == 1 else []
            for place in places if not ranked else ():
                ranked += answers(model, [requests[place]])
        found.update(zip(places, ranked, strict=True))
    return [found[place] for place in range(len(requests))]


def rank(model: Recommender, requests: list[Request]) -> list[Answer]:
    """Rank the users of all requests together; several requests have no `restrict_to`."""
    histories = [history for request in requests for history in request.histories]
    hidden: list[Any] = requests[0].filter_items
    if len(requests) > 1:  # for each history its own
        hidden = [request.filter_items for request in requests for _ in request.histories]
    lists = model.recommend(
        histories,
        max(request.k for request in requests),
        filter_items=hidden if any(hidden) else None,
        restrict_to=requests[0].restrict_to,
        empty=requests[0].empty,
    )
    found, first = [], 0
    for request in requests:
        items, scores = [], []
        for user in range(first, first + len(request.histories)):
            n_listed = min(int((lists.rows[user] >= 0).sum()), request.k)
            items.append(lists.ids[user, :n_listed].tolist())
            scores.append(lists.scores[user, :n_listed].tolist())
        found.append(Answer(model=model.model_sha256[:12], items=items, scores=scores))
        first += len(request.histories)
    return found


def make_app(model: Recommender, load: Callable[[], Recommender]) -> FastAPI:
    """Return the application of one worker; SIGHUP replaces its model by that of `load`."""
    batches = Batches(model)
    running: set[asyncio.Task[None]] = set()

    async def reload() -> None:
        try:
            batches.model = await asyncio.to_thread(load)
        except (ValueError, OSError, MemoryError) as error:
            print(f"process {os.getpid()}: the old model stays: {error}", file=sys.stderr)

    def start_reload() -> None:
        task = asyncio.get_running_loop().create_task(reload())
        running.add(task)
        task.add_done_callback(running.discard)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():  # not so in a test
            loop.add_signal_handler(signal.SIGHUP, start_reload)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})  # blocked since the fork
        task = loop.create_task(batches.run())
        yield
        task.cancel()

    app = FastAPI(title="dist_vasp", lifespan=lifespan)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        used = batches.model
        sha256 = used.model_sha256[:12]
        return {"status": "ok", "model": sha256, "n_items": used.n_items, "process": os.getpid()}

    @app.post("/recommend")
    async def recommend(request: Request) -> Answer:
        try:
            return await batches.answer(request)
        except ValueError as error:
            raise HTTPException(422, str(error)) from None

    return app


def listen(host: str, port: int) -> socket.socket:
    """Return a socket on the port; several processes may each have one."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listening.bind((host, port))
    return listening


def check_free(host: str, port: int) -> None:
    """Raise OSError where another server listens on the port: SO_REUSEPORT would let both."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


def serve(app: FastAPI, listening: socket.socket) -> None:
    """Answer until SIGTERM; requests that have arrived by then are still answered."""
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=60)
    uvicorn.Server(config).run(sockets=[listening])


class Workers:
    """The parent: starts the workers again where they end, and passes signals on to them."""

    def __init__(self, folder: str, n_processes: int, host: str, port: int) -> None:
        self.folder = folder
        self.model = Recommender.load(folder)
        check_free(host, port)
        # Bound and not listened on: it keeps the port, and `--port 0` gives one to all workers.
        self._reserved = listen(host, port)
        self._address = self._reserved.getsockname()[:2]
        self._n_processes = n_processes
        self._workers: set[int] = set()
        self._stopping = False

    def run(self) -> None:
        signal.signal(signal.SIGHUP, lambda *_: self._reload())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop())
        print(f"{self.model!r} on http://{self._address[0]}:{self._address[1]}, ", end="")
        print(f"{self._n_processes} processes, parent {os.getpid()}", flush=True)
        gc.collect()
        gc.freeze()  # a collection would otherwise write into pages that the workers share
        for _ in range(self._n_processes):
            self._start()
        while self._workers:
            worker, status = os.wait()
            self._workers.discard(worker)
            if not self._stopping:
                print(f"process {worker} ended with status {status}; starting another")
            self._start()

    def _start(self) -> None:
        """Start a worker, unless the server stops; no signal is handled before it is entered."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        if not self._stopping:
            worker = os.fork()
            if not worker:
                self._become_worker()
            self._workers.add(worker)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _become_worker(self) -> None:
        """Answer until SIGTERM. SIGHUP waits until the application handles it."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
        # The parent has checked the files.
        app = make_app(self.model, lambda: Recommender.load(self.folder, verify=False))
        del self.model  # so that a model that was replaced is unmapped
        serve(app, listen(*self._address))
        os._exit(0)

    def _reload(self) -> None:
        try:
            self.model = Recommender.load(self.folder)
        except (ValueError, OSError, MemoryError) as error:
            print(f"the old model stays: {error}", file=sys.stderr, flush=True)
            return
        print(f"now {self.model!r}, model {self.model.model_sha256[:12]}", flush=True)
        self._signal(signal.SIGHUP)

    def _stop(self) -> None:
        self._stopping = True
        self._signal(signal.SIGTERM)

    def _signal(self, number: int) -> None:
        for worker in self._workers:
            with suppress(ProcessLookupError):  # it has ended, and is about to be noticed
                os.kill(worker, number)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a trained model over HTTP.")
    parser.add_argument("model", help="folder of a run, an export or an ensemble")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    try:
        workers = Workers(arguments.model, arguments.processes, arguments.host, arguments.port)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    workers.run()


if __name__ == "__main__":
    main()
