"""How fast the site answers with 100,000 papers: percentiles of lists, search and papers, on SQLite.

    python benchmarks/site_speed.py [--papers 100000] [--requests 200] [--database FILE] [--json]

It prints, too, the processor time of a start, of the server and of a command that cron calls, without an encoder: the
goal is 3 s each. (The first start after an installation reads all ledgers and takes longer; the next ones do not.)

The papers are made up, with words as frequent as words are (Zipf's law) and lengths of real abstracts, around the
catalogue's own. Times are those of the whole answer inside the server: routing, queries, template, headers. The goal on
two cores: a list in less than 50 ms and a search in less than 100 ms, both at the 95th percentile; and a server that 40
clients ask at once for everything holds at most 600 MiB. Exits with 1 when one is missed. On a machine with other
work, the processor time beside it tells what is the site's own.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from sqlalchemy import insert
from starlette.testclient import TestClient

from regularized.papers.card import FAMILIES
from regularized.site.app import create_app
from regularized.site.models import Paper, PaperFamily, PaperTag, SearchText, SearchWord
from regularized.site.opening import open_site
from regularized.site.settings import Settings
from regularized.site.state import Site
from regularized.site.sync import title_key

GOALS = {"list": 50.0, "search": 100.0, "paper": 100.0, "api": 50.0, "feed": 200.0}
MEMORY = 600
"""MiB that a server may hold."""
START = 3.0
"""Seconds of processor time after which a server must serve, and a command be done."""
TOPICS = [
    "training",
    "network",
    "model",
    "labels",
    "noise",
    "data",
    "learning",
    "robust",
    "loss",
    "gradient",
    "language",
    "vision",
    "attention",
    "graph",
]


def words_of(generator: np.random.Generator, size: int = 40_000) -> list[str]:
    """A vocabulary: words of the field first, then made-up ones."""
    letters = np.array(list("aaabcdeeeefghiiijklmnoooprrsssttttuvwy"))
    made: dict[str, None] = dict.fromkeys(TOPICS)
    while len(made) < size:
        made["".join(generator.choice(letters, generator.integers(4, 11)))] = None
    return list(made)


def made_up(count: int, seed: int = 0) -> Iterator[dict[str, object]]:
    """Papers with titles and abstracts whose words follow Zipf's law."""
    generator = np.random.default_rng(seed)
    vocabulary = np.array(words_of(generator))
    below = np.cumsum(1.0 / np.arange(1, len(vocabulary) + 1))
    first = datetime.date(2012, 1, 1)
    names = list(FAMILIES)
    for number in range(count):
        drawn = generator.random(generator.integers(120, 260)) * below[-1]
        text = vocabulary[np.searchsorted(below, drawn, side="right")]
        title = " ".join(text[:9]).capitalize() + f" {number}"
        day = first + datetime.timedelta(days=int(generator.integers(0, 5000)))
        measured = generator.random() < 0.05
        held = int(generator.integers(0, 6)) if measured else 0
        yield {
            "slug": f"made-{number}",
            "title": title,
            "title_key": title_key(title),
            "arxiv": f"{day:%y%m}.{number:05}"[:20],
            "date": day,
            "listed_on": day,
            "source": "daily",
            "abstract": " ".join(text),
            "authors_count": int(generator.integers(1, 12)),
            "families": [names[i] for i in generator.choice(len(names), 2, replace=False)],
            "tags": [f"tag {i}" for i in generator.choice(300, 4, replace=False)],
            "held": held,
            "verdicts": {"holds": held, "open": 5 - held} if measured else {},
            "runs": False,
            "standing": 2.0 + held / 5 if measured else 0.0,
            "heat": float(generator.normal(2900, 5)) if generator.random() < 0.1 else None,
        }


def seed(site: Site, count: int) -> None:
    """Write the papers, in large pieces."""
    common = {"problem": "", "summary": "", "authors": [], "organization": "", "venue": "", "code_url": "", "card": {}}
    common |= {"listed_comments": 0, "listed_votes": 0, "has_card": False, "margin": 0.0}
    common |= {"votes": 0, "comments": 0, "added_at": 1, "changed_at": 1, "fingerprint": ""}
    with site.write.begin() as session:
        number = 1000
        batch: list[dict[str, object]] = []

        def flush() -> None:
            session.execute(insert(Paper), batch)
            session.execute(
                insert(PaperFamily), [{"family": f, "paper_id": p["id"]} for p in batch for f in p["families"]]
            )
            session.execute(insert(PaperTag), [{"tag": t, "paper_id": p["id"]} for p in batch for t in p["tags"]])
            empty = dict.fromkeys(("searches", "problem", "tags", "families", "claims", "use"), "")
            session.execute(
                insert(SearchText),
                [
                    {**empty, "paper_id": p["id"], "title": p["title"], "summary": p["abstract"], "names": p["arxiv"]}
                    for p in batch
                ],
            )
            batch.clear()

        for paper in made_up(count):
            number += 1
            batch.append({**common, **paper, "id": number})
            if len(batch) == 2000:
                flush()
        if batch:
            flush()
        known = set(session.scalars(SearchWord.__table__.select()))
        fresh = [word for word in words_of(np.random.default_rng(0)) if word not in known]
        session.execute(insert(SearchWord), [{"word": word} for word in fresh])
    with site.engine.connect() as connection:
        connection.exec_driver_sql("ANALYZE")
        connection.commit()


def addresses(requests: int) -> dict[str, list[str]]:
    """What is asked, by kind."""
    generator = np.random.default_rng(1)
    vocabulary = words_of(np.random.default_rng(0))
    rare = [str(word) for word in generator.choice(vocabulary[2000:], 200)]
    questions = [
        "training", "noise labels", "robust learning of language models", "my labels are wrong",
        "model forgets what it has learned", "vision attention", "traning netwrok", "loss",
        " ".join(TOPICS), "training network model " * 5,
        *(f"{word} training" for word in rare[:60]), *(f"robust {a} {b}" for a, b in zip(rare[60:120], rare[120:180])),
        *(word[:-2] for word in rare[:20]),
    ]  # fmt: skip
    filters = ["", "", "", "&runs=1", "&year=2019", "&family=curriculum", "&verdict=holds", "&tag=tag+7"]
    days = [datetime.date(2012, 1, 1) + datetime.timedelta(days=int(d)) for d in generator.integers(0, 5000, requests)]
    lists = ["/", "/new", "/trending", "/families/curriculum", "/?page=2", "/new?page=50", "/search?runs=0"]

    def some(pool: list[str]) -> list[str]:
        return [pool[int(i)] for i in generator.integers(0, len(pool), requests)]

    periods = [f"/day/{day}" for day in days] + [f"/month/{day:%Y-%m}" for day in days]
    return {
        "list": some(lists + periods[: len(lists)]),
        "search": [f"/search?q={q}{f}".replace(" ", "+") for q, f in zip(some(questions), some(filters))],
        "paper": some([f"/papers/made-{i}" for i in range(1000)]),
        "api": some(["/api/v1/papers", "/api/v1/papers?page=40", "/api/v1/papers?order=new&family=curriculum"]),
        "feed": some(["/feeds/best.atom", "/feeds/new.json", "/feeds/family/curriculum.atom"]),
    }


def main() -> int:
    """Seed, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--papers", type=int, default=100_000)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument(
        "--database", type=Path, help="keep the database here, and use it again; default a temporary one"
    )
    parser.add_argument("--clients", type=int, default=40, help="who ask a server of its own for its memory")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["REGULARIZED_HOME"] = folder
        file = options.database or Path(folder) / "speed.sqlite"
        fresh = not file.exists()
        site = open_site(
            Settings.from_environment(
                {"REGULARIZED_SITE_DATABASE": f"sqlite:///{file}", "REGULARIZED_SITE_ENCODER": "off"}
            )
        )
        if fresh:
            start = time.perf_counter()
            seed(site, options.papers)
            print(f"made {options.papers} papers in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        results = measure(site, options.requests)
        site.engine.dispose()
        starts, memory = a_server(file, folder, options.clients, options.requests)
    if options.json:
        found = {"times": results, "starts_s": starts, "start_goal_s": START}
        print(json.dumps({**found, "memory_mib": memory, "memory_goal_mib": MEMORY}, indent=2))
    else:
        print("kind\trequests\tp50 ms\tp95 ms\tp99 ms\tmax ms\tcpu p95\tgoal p95\tslowest")
        for row in results:
            numbers = "\t".join(f"{row[name]:.1f}" for name in ("p50", "p95", "p99", "max", "cpu"))
            print(f"{row['kind']}\t{row['requests']}\t{numbers}\t{row['goal']:.0f}\t{row['slowest']}")
        print(f"memory of a server with {options.clients} clients: {memory:.0f} MiB, goal {MEMORY} MiB")
        for name, seconds in starts.items():
            print(f"start of {name}: {seconds:.1f} s of processor time, goal {START:g} s")
    slow = any(row["p95"] > row["goal"] for row in results) or max(starts.values()) > START
    return int(slow or memory > MEMORY)


def a_server(file: Path, folder: str, clients: int, requests: int) -> tuple[dict[str, float], float]:
    """What starts cost, and the most MiB that a server has held while many ask it at once for everything."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("REGULARIZED_")}
    environment |= {"REGULARIZED_HOME": folder, "REGULARIZED_SITE_ENCODER": "off"}
    environment |= {"REGULARIZED_SITE_DATABASE": f"sqlite:///{file}"}
    regularized = [sys.executable, "-m", "regularized.cli"]
    before = os.times()
    subprocess.run([*regularized, "digest", "send"], env=environment, check=True, capture_output=True)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    starts = {"digest send": spent}
    command = [*regularized, "site", "--port", "0"]
    asked = [address for some in addresses(requests).values() for address in some]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            url = next(m[1] for line in process.stderr if (m := re.search(r"the catalogue is at (\S+)", line)))
            ticks = Path(f"/proc/{process.pid}/stat").read_text(encoding="ascii").rpartition(") ")[2].split()[11:13]
            starts["site"] = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

            def ask(client: int) -> None:
                for address in asked[client::clients]:
                    with urllib.request.urlopen(url + address, timeout=300) as answer:
                        answer.read()

            with ThreadPoolExecutor(clients) as pool:
                list(pool.map(ask, range(clients)))
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
        finally:
            process.terminate()
    return starts, int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def measure(site: Site, requests: int) -> list[dict[str, object]]:
    """Percentiles of each kind, in milliseconds."""
    results: list[dict[str, object]] = []
    with TestClient(create_app(site)) as client:
        for kind, asked in addresses(requests).items():
            for address in asked[:5]:
                client.get(address)
            times, busy = [], []
            for address in asked:
                start, cpu = time.perf_counter(), time.process_time()
                response = client.get(address)
                times.append(1000 * (time.perf_counter() - start))
                busy.append(1000 * (time.process_time() - cpu))
                assert response.status_code == 200, (address, response.status_code)
            p50, p95, p99 = (float(value) for value in np.percentile(times, [50, 95, 99]))
            slowest = asked[int(np.argmax(times))]
            found = {"kind": kind, "requests": len(times), "p50": p50, "p95": p95, "p99": p99, "max": max(times)}
            found["cpu"] = float(np.percentile(busy, 95))
            results.append({**found, "goal": GOALS[kind], "slowest": slowest})
    return results


if __name__ == "__main__":
    sys.exit(main())
