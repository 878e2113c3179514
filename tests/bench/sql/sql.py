"""SQL measured: beside DuckDB on the same files, the sink beside a bare loop, and how fresh `requests_live` is.

Started by tests/bench/sql/run; tests/bench/README.md says what is measured and what came out.

Invariant: answers are compared before anything is timed. A figure of ours has DuckDB's beside it, taken in the same round, in the same
number of threads, with the same memory; neither counts the start of a process.
"""

import argparse
import collections
import contextlib
import http.client
import json
import math
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import time

import blake3
import duckdb
from deltalake import DeltaTable
from kafka import KafkaConsumer, TopicPartition
from kafka.admin import KafkaAdminClient, NewTopic

LIMIT_S = 540
MEMORY_MIB = 8192
DAYS = 30
ROLLED_UP = "rolled up"
PARTITIONS = 12
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
TOKEN = "a token that is known to this bench alone"
TOPICS = ("outcomes", "attempts", "audits", "labels", "payloads", "dead-letters")

# Each is asked of both in the same words, but for what only one of them has. What is long is cut to its top inside of the query, so
# that neither is measured at writing answers. `view` asks ours for the same by a view, or by the table of hours that views stand on; where
# days are rolled up, these answer from roll-ups.
QUERIES = {
    "cost by tenant, model, day": {
        "sql": """SELECT tenant, model, CAST(date AS VARCHAR) AS date, requests, billed FROM (
            SELECT tenant, coalesce(model_served, model_requested) AS model, date, count(*) AS requests, sum(billed_nano_usd) AS billed
            FROM outcomes GROUP BY tenant, coalesce(model_served, model_requested), date
            ORDER BY billed DESC, tenant, model, date LIMIT 100)""",
        "view": """SELECT tenant, model, CAST(date AS VARCHAR) AS date, requests, billed_nano_usd AS billed
            FROM cost_by_tenant_model ORDER BY billed DESC, tenant, model, date LIMIT 100""",
    },
    "cost of 1k tokens": {
        "sql": """SELECT model_served AS model, cost_per_1k(billed_nano_usd, input_tokens + output_tokens) AS usd
            FROM outcomes WHERE model_served IS NOT NULL GROUP BY model_served""",
        "view": """SELECT model_served AS model, cost_per_1k(rated_nano_usd, rated_tokens) AS usd
            FROM outcomes_hourly WHERE model_served IS NOT NULL GROUP BY model_served""",
        "duckdb": """SELECT model_served AS model, sum(billed_nano_usd) / 1e6 / sum(input_tokens + output_tokens) AS usd
            FROM outcomes WHERE model_served IS NOT NULL GROUP BY model_served""",
    },
    "p50 and p99": {
        "sql": """SELECT model_served AS model, pctl(total_us, 0.5) AS p50, pctl(total_us, 0.99) AS p99
            FROM outcomes WHERE status = 'answered' GROUP BY model_served""",
        "view": """SELECT model_served AS model, pctl_merge(total_us_state, 0.5) AS p50, pctl_merge(total_us_state, 0.99) AS p99
            FROM outcomes_hourly WHERE status = 'answered' GROUP BY model_served""",
        "duckdb": """SELECT model, p[1] AS p50, p[2] AS p99 FROM (
            SELECT model_served AS model, quantile_disc(total_us, [0.5, 0.99]) AS p
            FROM outcomes WHERE status = 'answered' GROUP BY model_served)""",
        # What pctl promises.
        "tolerance": 0.01,
    },
    "cache": {
        "sql": """SELECT CAST(date AS VARCHAR) AS date, hits, misses, saved FROM (
            SELECT date, count(*) FILTER (WHERE cache_status = 'hit') AS hits,
                count(*) FILTER (WHERE cache_status = 'miss') AS misses, sum(saved_by_cache_nano_usd) AS saved
            FROM outcomes GROUP BY date)""",
        "view": """SELECT CAST(date AS VARCHAR) AS date, sum(hits) AS hits, sum(misses) AS misses,
            sum(saved_by_cache_nano_usd) AS saved FROM cache_savings GROUP BY date""",
    },
    "tenant and minute": {
        "sql": """SELECT tenant, date_part('epoch', minute) AS minute, requests, billed FROM (
            SELECT tenant, date_trunc('minute', ended_at) AS minute, count(*) AS requests, sum(billed_nano_usd) AS billed
            FROM outcomes GROUP BY tenant, date_trunc('minute', ended_at) ORDER BY billed DESC, tenant, minute LIMIT 100)""",
    },
    "distinct prompts": {"sql": "SELECT count(DISTINCT prompt_hash) AS prompts FROM outcomes"},
}

parser = argparse.ArgumentParser()
parser.add_argument("--program", required=True)
parser.add_argument("--bare", required=True)
parser.add_argument("--kafka")
parser.add_argument("--port", type=int, required=True)
parser.add_argument("--scratch", type=pathlib.Path, required=True)
parser.add_argument("--data", type=pathlib.Path, required=True)
parser.add_argument("--part", choices=("queries", "ingest", "fresh"), required=True)
parser.add_argument("--rows", type=int)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
parser.add_argument("--layouts", default="raw,joined,rolled up,small,small joined")
parser.add_argument("--seconds", type=int, default=120)
parser.add_argument("--rate", type=int, default=1000)
parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
parser.add_argument("--json", type=pathlib.Path)
options = parser.parse_args()


# --- Processes -------------------------------------------------------------------------------------------------------

def settings(**more):
    # As `forebay sql` starts it.
    return {"MIMALLOC_PURGE_DECOMMITS": "0", **os.environ, "FOREBAY_SQL_SETTINGS": json.dumps(more), "FOREBAY_LOG": "warn"}


def run(*words, **more):
    """Runs a program to its end; its seconds and CPU-seconds."""
    began = time.monotonic()
    with open(options.scratch / "programs.log", "ab") as log:
        process = subprocess.Popen([str(word) for word in words], env=settings(**more), stdout=log, stderr=log,
                                   stdin=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{words[0]} {words[1]} ended with {process.returncode}; see {log.name}")
    return time.monotonic() - began, used.ru_utime + used.ru_stime


@contextlib.contextmanager
def running(*words, **more):
    with open(options.scratch / "programs.log", "ab") as log:
        process = subprocess.Popen([str(word) for word in words], env=settings(**more), stdout=log, stderr=log,
                                   stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        process.wait()


class Ours:
    """Asks a `forebay-sql sql --listen`."""

    def __init__(self, process, port):
        self.process, self.port, self.connection = process, port, None
        deadline = time.monotonic() + 30
        while self.connection is None:
            with contextlib.suppress(OSError):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
                connection.connect()
                self.connection = connection
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"forebay-sql does not answer; see {options.scratch}/programs.log")
            time.sleep(0.05)

    def cpu_s(self):
        # The second field is the program's name in parentheses, and may hold anything.
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S

    def ask(self, sql):
        self.connection.request("POST", "/v1/sql", body=sql, headers={"Authorization": f"Bearer {TOKEN}"})
        response = self.connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise SystemExit(f"{sql}: {body.decode()}")
        return [tuple(row.values()) for row in json.loads(body)]


@contextlib.contextmanager
def ours(port, **more):
    users = options.scratch / "users.json"
    users.write_text(json.dumps({"users": {"bench": {
        "tenants": ["*"], "token_blake3": blake3.blake3(TOKEN.encode()).hexdigest()}}}))
    words = ["sql", "--listen", f"127.0.0.1:{port}", "--users", users, "--memory", MEMORY_MIB]
    for option in options.set:
        words += ["--set", option]
    with running(options.program, *words, **more) as process:
        yield Ours(process, port)


class DuckDb:
    """Asks DuckDB, in this process, of the files that the log of a table names."""

    def __init__(self, folder):
        self.connection = duckdb.connect(config={"threads": options.threads, "memory_limit": f"{MEMORY_MIB}MiB",
                                                 "temp_directory": str(options.scratch / "duckdb")})
        # Ours keeps what files say of themselves, too.
        self.connection.execute("SET parquet_metadata_cache = true")
        files = DeltaTable(str(folder)).file_uris()
        # Times without a zone: to cut those with one to minutes costs DuckDB several times as much.
        self.connection.execute(f"""CREATE VIEW outcomes AS
            SELECT * REPLACE (make_timestamp(epoch_us(ended_at)) AS ended_at)
            FROM read_parquet({files!r}, hive_partitioning = true)""")

    def cpu_s(self):
        return time.process_time()

    def ask(self, sql):
        return self.connection.execute(sql).fetchall()


# --- Queries ---------------------------------------------------------------------------------------------------------

def timed(who, sql):
    cpu, began = who.cpu_s(), time.monotonic()
    answer = who.ask(sql)
    return answer, time.monotonic() - began, who.cpu_s() - cpu


def compare(name, one, other, tolerance=1e-9):
    """Ends the run unless both say the same."""
    if len(one) != len(other):
        raise SystemExit(f"{name}: {len(one)} rows and {len(other)}")
    # What an answer is cut from is ordered; the answer itself need not be.
    one, other = (sorted(rows, key=lambda row: str(row[:3])) for rows in (one, other))
    for ours_, theirs in zip(one, other):
        for mine, yours in zip(ours_, theirs, strict=True):
            is_number = isinstance(yours, (int, float)) and mine is not None
            if not (math.isclose(mine, yours, rel_tol=tolerance) if is_number else mine == yours):
                raise SystemExit(f"{name}: ours is {ours_}, DuckDB's {theirs}")


def tables(layout):
    """The tables in a layout, made where they are not there yet; a run that is repeated finds them."""
    unjoined = layout.removesuffix("joined").strip() or "raw"
    root = options.data / f"{options.rows}-{layout.replace(' ', '-')}"
    if layout != unjoined and not root.exists():
        half = root.with_suffix(".half")
        shutil.rmtree(half, ignore_errors=True)
        shutil.copytree(tables(unjoined), half)
        half.rename(root)
    # A thousand files, or a handful a day, as a sink leaves them that works off what has gathered.
    files = 34 if unjoined == "small" else 8
    words = ["generate", "--rows", options.rows, "--days", DAYS, "--until", "2026-11-29", "--without-attempts",
             "--files", files]
    began = time.monotonic()
    run(options.program, *words, *(["--compact"] if layout != unjoined else []), tables=str(root))
    found = DeltaTable(str(root / "outcomes")).file_uris()
    size = sum(os.stat(file.removeprefix("file://")).st_size for file in found)
    hours = ""
    if layout != unjoined:
        adds = DeltaTable(str(root / "outcomes_hourly")).get_add_actions(flatten=True)
        days, rows, sizes = (adds.column(name).to_pylist() for name in ("partition.date", "num_records", "size_bytes"))
        if len(set(days)) != DAYS:
            raise SystemExit(f"{len(set(days))} of {DAYS} days are rolled up in {root}")
        hours = f", rolled up into {sum(rows)} rows, {sum(sizes) / 1e6:.0f} MB"
    print(f"{layout}: {len(found)} files, {size / 1e6:.0f} MB{hours}, {time.monotonic() - began:.0f} s to make or find",
          file=sys.stderr, flush=True)
    return root


def queries():
    options.rows = options.rows or 10_000_000
    figures = {}
    for layout in options.layouts.split(","):
        # The same tables as those of `joined`, asked by the views; of the others only `raw` is asked both ways.
        by_view = layout == ROLLED_UP
        root = tables("joined" if by_view else layout)
        asked_for = {name: query for name, query in QUERIES.items() if not by_view or "view" in query}
        with ours(options.port, tables=str(root)) as asked:
            beside = DuckDb(root / "outcomes")
            for name, query in asked_for.items():
                theirs = beside.ask(query.get("duckdb", query["sql"]))
                tolerance = query.get("tolerance", 1e-9)
                compare(name, asked.ask(query["view" if by_view else "sql"]), theirs, tolerance)
                if layout == "raw" and "view" in query:
                    compare(f"{name}, by its view", asked.ask(query["view"]), theirs, tolerance)
            if layout == "raw":
                figures["pctl"] = percentiles(asked, beside)
            taken = collections.defaultdict(list)
            for round_ in range(options.rounds):
                for name, query in asked_for.items():
                    turns = [("DuckDB", beside, query.get("duckdb", query["sql"])),
                             ("ours", asked, query["view" if by_view else "sql"])]
                    if layout == "raw" and "view" in query:
                        turns.append(("view", asked, query["view"]))
                    for who, server, sql in turns if round_ % 2 == 0 else reversed(turns):
                        _, wall, cpu = timed(server, sql)
                        taken[name, who].append((wall, cpu))
        for name in asked_for:
            of = {who: [statistics.median(values) for values in zip(*taken[name, who])]
                  for who in ("DuckDB", "ours", "view") if taken[name, who]}
            figures.setdefault(layout, {})[name] = of
            print(layout, name, json.dumps(of), file=sys.stderr, flush=True)
    print(f"\n{options.rows} rows, {options.threads} threads, medians of {options.rounds} rounds, load {os.getloadavg()[0]:.1f}, "
          f"DuckDB {duckdb.__version__}{', ' + ' '.join(options.set) if options.set else ''}\n")
    print("| Files | Query | DuckDB s | ours s | × | DuckDB CPU-s | ours CPU-s | × | by the view s | × |")
    print("|---" * 10 + "|")
    for layout in options.layouts.split(","):
        for name, of in figures[layout].items():
            (wall, cpu), (own_wall, own_cpu) = of["DuckDB"], of["ours"]
            view = f"{of['view'][0]:.3f} | {of['view'][0] / wall:.2f}" if "view" in of else "– | –"
            print(f"| {layout} | {name} | {wall:.3f} | {own_wall:.3f} | {own_wall / wall:.2f} | {cpu:.2f} | {own_cpu:.2f} | "
                  f"{own_cpu / max(cpu, 1e-3):.2f} | {view} |")
    if {"joined", "small joined"} <= figures.keys():
        print("\nA thousand small files, once joined, to those of the layout: " + ", ".join(
            f"{name} {figures['small joined'][name]['ours'][0] / of['ours'][0]:.2f}" for name, of in figures["joined"].items()))
    return figures


def percentiles(asked, beside):
    """How far pctl is from the exact percentile, of the first rows and of all."""
    worst = {}
    for rows in sorted({min(rows, options.rows) for rows in (100, 10_000, 10_001, 100_000, 1_000_000, options.rows)}):
        for p in (0.5, 0.99, 0.999):
            query = "SELECT {} FROM outcomes WHERE origin_offset < {}"
            [(ours_,)] = asked.ask(query.format(f"pctl(total_us, {p})", rows))
            [(exact,)] = beside.ask(query.format(f"quantile_disc(total_us, {p})", rows))
            worst[f"{rows} rows, p{100 * p:g}"] = abs(ours_ - exact) / exact
    print("pctl is off by " + ", ".join(f"{error:.4%} ({of})" for of, error in worst.items()), flush=True)
    if max(worst.values()) > 0.01 or any(error for of, error in worst.items() if of.startswith(("100 rows", "10000 rows"))):
        raise SystemExit("pctl is not exact to 10,000 values, or beyond 1%")
    return worst


# --- Over Kafka ------------------------------------------------------------------------------------------------------

def make_topics(prefix):
    partitions = {prefix + topic: PARTITIONS if topic in TOPICS[:2] else 1 for topic in TOPICS}
    admin = KafkaAdminClient(bootstrap_servers=options.kafka)
    admin.create_topics([NewTopic(name=topic, num_partitions=count, replication_factor=1) for topic, count in partitions.items()])
    admin.close()
    # Kafka answers before its broker leads what was made; this waits until it does.
    consumer = KafkaConsumer(bootstrap_servers=options.kafka)
    consumer.end_offsets([TopicPartition(topic, number) for topic, count in partitions.items() for number in range(count)])
    consumer.close()


def ingest():
    """Rows per CPU-second from a topic to Parquet: the sink's, with all that it does, and a bare loop's."""
    rows, prefix = options.rows or 2_000_000, "ingest-"
    kafka = {"bootstrap_servers": options.kafka, "topic_prefix": prefix}
    make_topics(prefix)
    wall, cpu = run(options.program, "generate", "--rows", rows, "--days", 3, "--to", "topics", "--without-attempts", **kafka)
    print(f"{rows} rows are on the topic after {wall:.0f} s", file=sys.stderr, flush=True)
    taken = collections.defaultdict(list)
    for round_ in range(options.rounds):
        for who in ("bare", "sink") if round_ % 2 == 0 else ("sink", "bare"):
            folder = options.scratch / f"{who}-{round_}"
            folder.mkdir()
            if who == "bare":
                spent = run(options.bare, options.kafka, f"{prefix}outcomes", folder)
            else:
                spent = run(options.program, "sink", "--once", "--without-compaction", tables=str(folder), data=str(folder),
                            group=f"{prefix}{round_}", **kafka)
                table = DeltaTable(str(folder / "outcomes"))
                [(found,)] = duckdb.sql(f"SELECT count(DISTINCT request_id) FROM read_parquet({table.file_uris()!r})").fetchall()
                if found != rows:
                    raise SystemExit(f"the sink brought {found} of {rows} rows into its table")
            taken[who].append(spent)
            print(who, json.dumps(spent), file=sys.stderr, flush=True)
            shutil.rmtree(folder)
    of = {who: [statistics.median(values) for values in zip(*spent)] for who, spent in taken.items()}
    print(f"\n{rows} rows, medians of {options.rounds} rounds, load {os.getloadavg()[0]:.1f}\n")
    print("| | s | rows/s | CPU-s | rows per CPU-s | of bare |\n|---|---|---|---|---|---|")
    for who in ("bare", "sink"):
        wall, cpu = of[who]
        print(f"| {who} | {wall:.1f} | {rows / wall:.0f} | {cpu:.1f} | {rows / cpu:.0f} | {of['bare'][1] / cpu:.2f} |")
    return {"rows": rows, **of}


def fresh():
    """From a row's write to the end of the first answer of `requests_live` that has it."""
    rows, prefix = options.rate * options.seconds, "fresh-"
    more = {"bootstrap_servers": options.kafka, "topic_prefix": prefix, "data": str(options.scratch / "fresh")}
    make_topics(prefix)
    # So much of the past is asked for each time; nothing may take longer to be seen.
    window_s = 20
    query = f"""SELECT request_id, date_part('epoch', ended_at) AS ended FROM requests_live
        WHERE ended_at >= now() - INTERVAL '{window_s} seconds'"""
    ages, took, seen = [], [], set()
    generate = ["generate", "--rows", rows, "--rate", options.rate, "--to", "topics", "--without-attempts"]
    with running(options.program, "sink", **more), ours(options.port, **more) as asked:
        asked.ask(query)
        with running(options.program, *generate, **more) as generating:
            deadline = time.monotonic() + options.seconds + window_s
            while len(seen) < rows and time.monotonic() < deadline:
                began = time.monotonic()
                answer = asked.ask(query)
                now = time.time()
                took.append(time.monotonic() - began)
                ids = {request for request, _ in answer}
                if len(ids) != len(answer):
                    raise SystemExit(f"{len(answer) - len(ids)} rows were seen twice in one answer")
                ages += [now - ended for request, ended in answer if request not in seen]
                seen |= ids
            if generating.wait(10) != 0 or len(seen) < rows:
                raise SystemExit(f"{len(seen)} of {rows} rows were seen; see {options.scratch}/programs.log")
    ages.sort()
    took.sort()
    figures = {"rows": rows, "queries": len(took)}
    for name, values in (("visible_s", ages), ("query_s", took)):
        figures[name] = {f"p{100 * p:g}": values[math.ceil(p * len(values)) - 1] for p in (0.5, 0.99, 1)}
    print(f"\n{options.rate} rows/s for {options.seconds} s, {len(took)} queries one after the other, load {os.getloadavg()[0]:.1f}\n")
    print("| | p50 s | p99 s | most s |\n|---|---|---|---|")
    for name, label in (("visible_s", "from write to visible"), ("query_s", "a query")):
        p50, p99, most = figures[name].values()
        print(f"| {label} | {p50:.2f} | {p99:.2f} | {most:.2f} |")
    return figures


signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:options.threads])
measured = {"queries": queries, "ingest": ingest, "fresh": fresh}[options.part]()
if options.json:
    options.json.write_text(json.dumps(measured, indent=1))
