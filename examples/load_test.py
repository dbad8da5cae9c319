"""Measure a server of examples/serve.py: python examples/load_test.py --run RUN --clients 1,8,32

Each client sends one history a request and waits for the answer, on one connection. Prints users a
second and the 50th and 99th percentile of the time of a request, for each number of clients. With
--parent PID, the server's parent, also the processor time of the server for a user. With --reload
it sends SIGHUP to the parent while clients ask, and says which models answered.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field

import numpy as np
import psutil

from dist_vasp import Recommender


@dataclass
class Client:
    """One connection; `seconds` of each request that was answered, and errors."""

    address: str
    bodies: list[bytes]
    until: float
    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    models: set[str] = field(default_factory=set)

    def run(self) -> None:
        connection = http.client.HTTPConnection(self.address, timeout=60)
        place = 0
        while time.perf_counter() < self.until:
            begin = time.perf_counter()
            try:
                body = self.bodies[place % len(self.bodies)]
                headers = {"Content-Type": "application/json"}
                connection.request("POST", "/recommend", body, headers)
                response = connection.getresponse()
                answer = json.loads(response.read())
                if response.status != 200:
                    raise ValueError(f"status {response.status}: {answer}")
                self.models.add(answer["model"])
                self.seconds.append(time.perf_counter() - begin)
            except (OSError, ValueError, http.client.HTTPException) as error:
                self.errors.append(f"{type(error).__name__} {error}")
                connection.close()
            place += 1


def load(address: str, bodies: list[bytes], n_clients: int, seconds: float) -> list[Client]:
    """Ask with this many clients at once."""
    until = time.perf_counter() + seconds
    clients = [
        Client(address, bodies[c % len(bodies) :: n_clients], until) for c in range(n_clients)
    ]
    threads = [threading.Thread(target=client.run) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return clients


def cpu_seconds(parent: int | None) -> float:
    """Return the processor time that the workers of a server have used; NaN without a parent."""
    if parent is None:
        return float("nan")
    times = [worker.cpu_times() for worker in psutil.Process(parent).children()]
    return sum(one.user + one.system for one in times)


def report(clients: list[Client], seconds: float, cpu: float) -> str:
    """Return a row of the table."""
    taken = np.array([s for client in clients for s in client.seconds]) * 1e3
    if not len(taken):
        return f"{len(clients):7}  no answer: {clients[0].errors[:1]}"
    failed = sum(len(client.errors) for client in clients)
    p50, p99 = np.percentile(taken, [50, 99])
    rate = len(taken) / seconds
    each = cpu / len(taken) * 1e3
    row = f"{len(clients):7}  {rate:7.1f}  {p50:6.0f}  {p99:6.0f}  {each:6.1f}"
    return f"{row}  {len(taken):8}  {failed:6}"


def histories(run: str, n: int, length: int) -> list[bytes]:
    """Return requests of users with `length` items, drawn by popularity from the catalogue."""
    recommender = Recommender.load(run, verify=False)
    popularity = recommender.items.popularity + 1.0
    random = np.random.default_rng(0)
    ids = np.array(recommender.items.ids.to_pylist(), object)
    bodies = []
    for _ in range(n):
        size = min(length, len(ids))
        chosen = random.choice(len(ids), size, replace=False, p=popularity / popularity.sum())
        bodies.append(json.dumps({"histories": [ids[chosen].tolist()], "k": 20}).encode())
    return bodies


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a server of examples/serve.py.")
    parser.add_argument("--run", required=True, help="the served model, for its catalogue")
    parser.add_argument("--address", default="127.0.0.1:8000")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--length", type=int, default=100, help="items of a history")
    parser.add_argument("--parent", type=int, metavar="PID", help="the server's parent")
    parser.add_argument("--reload", action="store_true", help="send SIGHUP to the parent")
    arguments = parser.parse_args()
    if arguments.reload and not arguments.parent:
        parser.error("--reload needs --parent PID")
    bodies = histories(arguments.run, 512, arguments.length)
    load(arguments.address, bodies, 4, 2)  # warm
    print("clients  users/s  p50 ms  p99 ms  cpu ms  requests  failed")
    failed = 0
    for n_clients in (int(text) for text in arguments.clients.split(",")):
        if arguments.reload:
            later = threading.Timer(
                arguments.seconds / 4, os.kill, (arguments.parent, signal.SIGHUP)
            )
            later.start()
        before = cpu_seconds(arguments.parent)
        clients = load(arguments.address, bodies, n_clients, arguments.seconds)
        cpu = cpu_seconds(arguments.parent) - before
        print(report(clients, arguments.seconds, cpu), flush=True)
        failed += sum(len(client.errors) for client in clients)
        if arguments.reload:
            print(f"models that answered: {sorted(set().union(*(c.models for c in clients)))}")
        for error in sorted({error for client in clients for error in client.errors})[:5]:
            print(f"  {error}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
