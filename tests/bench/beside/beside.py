"""Lets contenders take turns at the same work: from `prompts`, by way of a model server, to `completions`.

Started by ./run, which says what is needed; `run --help` for its arguments.

Invariant: all contenders of a round get the same records, in the same order, in fresh topics of as many partitions,
and the same latency for each; and every figure is checked by what lies on `completions` afterwards.
"""

import argparse, asyncio, collections, contextlib, json, logging, os, pathlib, random, re, signal, statistics, subprocess
import sys, time, urllib.request

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[2]
CAP = 64  # also the `in_flight` of step infer in pipelines/answer.yaml
PARTITIONS = 4
POOL_WARM_S, POOL_S = 8, 8
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
SILENCE_MAX_S = 180
LARGE = 4 << 20

parser = argparse.ArgumentParser(prog="tests/bench/beside/run")
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--records", type=int, default=12_000, help="of each run without latency; a third of them warm up")
parser.add_argument("--pool-records", type=int, default=15_000, help="of each run with latency")
parser.add_argument("--kills", type=int, default=10, help="of each contender")
parser.add_argument("--only", help="parts of cpu,pool,kills, joined by commas", default="cpu,pool,kills")
parser.add_argument("--contenders", help="names, joined by commas")
parser.add_argument("--json", type=pathlib.Path, help="where all figures go")
parser.add_argument("--port", type=int, default=19422, help=argparse.SUPPRESS)
for name in ("forebay", "kafka", "jars", "classes", "scratch"):
    parser.add_argument(f"--{name}", required=True, help=argparse.SUPPRESS)
options = parser.parse_args()
logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # It complains of each topic that was made just now.
scratch = pathlib.Path(options.scratch)


# --- Contenders ------------------------------------------------------------------------------------------------------

def forebay(*arguments):
    return [options.forebay, *arguments, "--bootstrap-servers", options.kafka, "--log-format", "json"]


def pipeline(ledger):
    """The shipped pipeline, its ledger switched; None where this version has no such switch."""
    text = (ROOT / "pipelines/answer.yaml").read_text()
    file = scratch / f"ledger-{ledger}.yaml"
    file.write_text(text.replace("    in_flight: 64\n", f"    in_flight: 64\n    ledger: {ledger}\n"))
    checked = subprocess.run([options.forebay, "check", str(file)], capture_output=True, text=True)
    return str(file) if checked.returncode == 0 else None


def forebay_infer(file):
    def command(prefix, url, folder):
        return forebay("run", file, "--stage", "infer", "--topic-prefix", prefix, "--data", str(folder),
                       "--model-url", url.removesuffix("/chat/completions"), "--model", "fixed")
    return command


def arguments(prefix, url):
    return [options.kafka, f"{prefix}prompts", f"{prefix}completions", f"{prefix}infer", url, str(CAP)]


def loop(form):
    return lambda prefix, url, _: [sys.executable, str(HERE / "loop.py"), form, *arguments(prefix, url)]


def java(name, *more):
    classpath = f"{options.classes}/{name.lower()}:{options.jars}-{name.lower()}/*"
    return lambda prefix, url, folder: [
        "java", "-Xmx512m", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", *more, "-cp", classpath, name,
        *arguments(prefix, url), str(folder)]


def contenders():
    on, off = pipeline("on"), pipeline("off")
    if on is None:
        print("this version of Forebay knows no ledger: measured without", file=sys.stderr)
        off = "answer"
    # What Flink's own scripts open for it on Java 17.
    opens = [f"--add-opens=java.base/java.{package}=ALL-UNNAMED" for package in ("lang", "util", "time", "net")]
    every = {"forebay, ledger off": forebay_infer(off)}
    if on:
        every["forebay, ledger on"] = forebay_infer(on)
    every |= {"aiokafka, batch": loop("batch"), "aiokafka, window": loop("window"), "parallel consumer": java("Parallel"),
              "flink": java("Flink", *opens)}
    if not options.contenders:
        return every
    wanted = options.contenders.split(",")
    return {name: command for name, command in every.items() if any(name.startswith(start) for start in wanted)}


# --- Processes -------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def running(name, command):
    with open(scratch / f"{name}.log", "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def cpu_s(process):
    # The second field is the program's name in parentheses, and may hold anything.
    fields = pathlib.Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


class Model:
    def __init__(self, port, process):
        self.port, self.process = port, process
        self.url = f"http://127.0.0.1:{port}/v1/chat/completions"

    def get(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{path}", timeout=60) as response:
            return json.load(response)

    async def reach(self, what, count, process):
        """Waits until so many calls or answers have been; gives how many there are then."""
        last, changed = -1, time.monotonic()
        while True:
            now = await asyncio.to_thread(self.get, "count")
            if now[what] >= count:
                return now[what]
            if now[what] != last:
                last, changed = now[what], time.monotonic()
            if process.poll() is not None:
                raise SystemExit(f"a contender ended by itself after {last} {what}; logs are in {scratch}")
            if time.monotonic() - changed > SILENCE_MAX_S:
                raise SystemExit(f"{last} of {count} {what}, and then none; logs are in {scratch}")
            await asyncio.sleep(0.05)


@contextlib.contextmanager
def model(port, median_ms, sigma=0.0, slow_share=0.0, slow_ms=0.0):
    words = [str(word) for word in (port, median_ms, sigma, slow_share, slow_ms)]
    with running("model", [sys.executable, str(HERE / "model.py"), *words]) as process:
        served = Model(port, process)
        for _ in range(200):
            with contextlib.suppress(OSError):
                served.get("count")
                break
            time.sleep(0.1)
        yield served


# --- Records ---------------------------------------------------------------------------------------------------------

async def send(topic, messages, every_s=0.0):
    """Writes them, all at once or each when it is due; gives how many, when cancelled too."""
    start, count = time.monotonic(), 0
    async with AIOKafkaProducer(bootstrap_servers=options.kafka, max_request_size=LARGE, linger_ms=5) as producer:
        for key, value, headers in messages:
            if every_s:
                await asyncio.sleep(max(0.0, start + count * every_s - time.monotonic()))
            await producer.send(topic, value, key, headers=headers)
            count += 1
            if stop_sending.is_set() and every_s:
                break
        await producer.flush()
    return count


async def read(topic, wanted=None):
    """All messages of a topic, or as many as are wanted, in the order of partitions."""
    consumer = AIOKafkaConsumer(bootstrap_servers=options.kafka, auto_offset_reset="earliest",
                                max_partition_fetch_bytes=LARGE)
    async with consumer:
        parts = [TopicPartition(topic, part) for part in range(PARTITIONS)]
        deadline = time.monotonic() + SILENCE_MAX_S
        while wanted and sum((await consumer.end_offsets(parts)).values()) < wanted:
            if time.monotonic() > deadline:
                raise SystemExit(f"{topic} has fewer than {wanted} records; logs are in {scratch}")
            await asyncio.sleep(0.2)
        consumer.assign(parts)
        ends, messages = await consumer.end_offsets(parts), []
        while any([await consumer.position(part) < ends[part] for part in parts]):
            for part in (await consumer.getmany(timeout_ms=500)).values():
                messages += [(message.key, message.value, list(message.headers)) for message in part]
        return messages


async def make_topics(prefix):
    apply = forebay("topics", "apply", "--topic-prefix", prefix, "--partitions", str(PARTITIONS))
    subprocess.run(apply, check=True, capture_output=True)
    # Kafka answers before its broker leads what was made; this waits until it does.
    for topic in ("prompts", "completions", "dead-letters"):
        await read(prefix + topic)


async def drop_topics(prefix):
    admin = AIOKafkaAdminClient(bootstrap_servers=options.kafka)
    await admin.start()
    await admin.delete_topics([topic for topic in await admin.list_topics() if topic.startswith(prefix)])
    await admin.close()


async def prompts(count):
    """Real ones: what look_up and retrieve write about questions to Forebay's own guides."""
    prefix = "source-"
    await make_topics(prefix)
    with contextlib.ExitStack() as stack:
        for stage in ("index", "look_up", "retrieve"):
            stack.enter_context(running(f"source-{stage}", forebay(
                "run", "answer", "--stage", stage, "--topic-prefix", prefix, "--data", str(scratch / "source"))))
        subprocess.run(forebay("ingest", str(ROOT / "pipelines/guides"), "--topic-prefix", prefix), check=True)
        await read(f"{prefix}chunks", len(list((ROOT / "pipelines/guides").glob("*.md"))))
        asked = ("What is a dead letter?", "How long are dead letters kept?", "What may a power loss cost?",
                 "Does a committed offset ever pass unfinished work?", "What is a port?", "Where does the key come from?")
        ask = [(b"n-%d" % n, json.dumps({"id": f"n-{n}", "prompt": f"{asked[n % len(asked)]} (n-{n})"}).encode(), [])
               for n in range(count)]
        await send(f"{prefix}requests", ask)
        found = await read(f"{prefix}prompts", count)
    await drop_topics(prefix)
    size = statistics.mean(len(value) for _, value, _ in found)
    print(f"{len(found)} prompts of {size:.0f} bytes in the mean", file=sys.stderr)
    random.Random(20).shuffle(found)
    return found


def check(written, messages):
    """Every prompt has a completion; gives how many have more than one."""
    copies = collections.Counter(key for key, _, _ in written)
    lost = {key for key, _, _ in messages} - set(copies)
    return len(lost), sum(1 for count in copies.values() if count > 1)


# --- What is measured ------------------------------------------------------------------------------------------------

async def cpu(name, command, prefix, messages):
    """Requests per CPU-second while a backlog is worked off with a model that takes no time."""
    await make_topics(prefix)
    await send(f"{prefix}prompts", messages)
    with model(options.port, 0) as served, running(prefix, command(prefix, served.url, scratch / prefix)) as process:
        warm = await served.reach("answered", len(messages) // 3, process)
        cpu_before, before = cpu_s(process), time.monotonic()
        model_before = cpu_s(served.process)
        count = await served.reach("answered", len(messages), process) - warm
        took, wall = cpu_s(process) - cpu_before, time.monotonic() - before
        model_took = cpu_s(served.process) - model_before
        memory = re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path(f"/proc/{process.pid}/status").read_text())
        lost, doubled = check(await read(f"{prefix}completions", len(messages)), messages)
    await drop_topics(prefix)
    return {"requests_per_cpu_s": count / took, "requests_per_s": count / wall, "cpus": took / wall,
            "model_cpus": model_took / wall, "memory_mb": int(memory[1]) // 1024, "lost": lost,
            "doubled": doubled, "load": os.getloadavg()[0]}


async def pool(name, command, prefix, messages):
    """The share of CAP calls that are under way while there is more to call for: calls of 50 ms, 1% of 5 s."""
    await make_topics(prefix)
    await send(f"{prefix}prompts", messages)
    with model(options.port, 50, 0.5, 0.01, 5000) as served:
        with running(prefix, command(prefix, served.url, scratch / prefix)) as process:
            await served.reach("calls", 1, process)
            await asyncio.sleep(POOL_WARM_S + POOL_S)
            calls = await asyncio.to_thread(served.get, "log")
    await drop_topics(prefix)
    if len(calls) >= len(messages):
        raise SystemExit(f"{name} had called for all records before the time was over; raise --pool-records")
    start = calls[0][1] + POOL_WARM_S
    end = start + POOL_S
    busy = sum(max(0.0, min(call[2] or end, end) - max(call[1], start)) for call in calls)
    rate = sum(1 for call in calls if start <= call[1] < end) / POOL_S
    return {"pool_use": busy / (CAP * POOL_S), "requests_per_s": rate, "load": os.getloadavg()[0]}


stop_sending = asyncio.Event()


async def kills(name, command, prefix, messages, port):
    """What is paid for again over kill -9 and start again: 50 records a second, calls of 200 ms."""
    dice = random.Random(20)
    sending = asyncio.create_task(send(f"{prefix}prompts", messages, 1 / 50))
    killed = []
    with model(port, 200, 0.5) as served:
        for life in range(options.kills + 1):
            with running(prefix, command(prefix, served.url, scratch / prefix)) as process:
                so_far = (await asyncio.to_thread(served.get, "count"))["calls"]
                await served.reach("calls", so_far + 1, process)
                if life < options.kills:
                    await asyncio.sleep(dice.uniform(3, 6))
                    killed.append(time.monotonic())
                    continue
                still_killing.discard(name)
                if not still_killing:
                    stop_sending.set()
                sent = await sending
                ended, deadline = [], time.monotonic() + SILENCE_MAX_S
                # Forebay gives a call up that was cut three times, and says so on `endings`.
                while (await asyncio.to_thread(served.get, "count"))["answered"] + len(ended) < sent:
                    if time.monotonic() > deadline:
                        raise SystemExit(f"{name} does not come to an end; logs are in {scratch}")
                    await asyncio.sleep(1)
                    ended = await read(f"{prefix}endings")
                written = await read(f"{prefix}completions", sent)
                await asyncio.sleep(2)
                written = await read(f"{prefix}completions", sent)
        calls = await asyncio.to_thread(served.get, "log")
    await drop_topics(prefix)
    lost, doubled = check(written + ended, messages[:sent])
    by_number, ages = collections.defaultdict(list), []
    for call in calls:
        by_number[call[0]].append(call)
    repeated = [tries for tries in by_number.values() if len(tries) > 1]
    for tries in repeated:
        # A call belongs to the life that ends with the next kill; what is answered after that, nobody heard.
        heard = [at - ended for _, received, ended, whole in tries[:-1] if whole
                 for at in [min((at for at in killed if at > received), default=received)] if ended < at]
        ages += heard[-1:]
    ages.sort()
    return {"records": sent, "repeated": len(repeated) / sent, "repeated_though_answered": len(ages) / sent,
            "repeated_per_kill": len(repeated) / options.kills, "answered_per_kill": len(ages) / options.kills,
            "answer_age_s": {"median": statistics.median(ages), "greatest": ages[-1]} if ages else {"median": 0, "greatest": 0},
            "cut": sum(1 for *_, whole in calls if not whole), "calls": len(calls), "lost": lost, "given_up": len(ended),
            "doubled": doubled / sent, "stalls_s": stalls(calls, killed), "load": os.getloadavg()[0]}


def stalls(calls, killed):
    """Seconds from each kill until the next call."""
    waits = [min((received for _, received, *_ in calls if received > at), default=at) - at for at in killed]
    return {"median": statistics.median(waits), "greatest": max(waits)}


still_killing = set()


async def main():
    every, figures = contenders(), collections.defaultdict(list)
    parts = options.only.split(",")
    need = {"cpu": options.records, "pool": options.pool_records, "kills": 50 * 60 * 6}
    messages = await prompts(max(need[part] for part in parts))

    def note(part, name, figure):
        figures[f"{part}: {name}"].append(figure)
        print(f"{part}: {name}: {json.dumps(figure)}", file=sys.stderr, flush=True)
        if options.json:
            options.json.write_text(json.dumps(figures, indent=1))

    for round in range(options.rounds):
        for part, measure in (("cpu", cpu), ("pool", pool)):
            for name, command in every.items() if part in parts else ():
                prefix = f"{part}{round}-{name.replace(', ', '-').replace(' ', '-')}-"
                note(part, name, await measure(name, command, prefix, messages[:need[part]]))
    if "kills" in parts:
        # Side by side, each with a model server of its own: what is counted here is calls, not time.
        still_killing.update(every)
        for n in range(len(every)):
            await make_topics(f"kills-{n}-")
        runs = (kills(name, command, f"kills-{n}-", messages, options.port + n)
                for n, (name, command) in enumerate(every.items()))
        for name, figure in zip(every, await asyncio.gather(*runs)):
            note("kills", name, figure)
    summary(every, figures)


def summary(every, figures):
    def column(part, name, field, form):
        values = [value(figure, *field.split(".")) for figure in figures[f"{part}: {name}"]]
        if not values:
            return "–"
        median, least, greatest = (form.format(v) for v in (statistics.median(values), min(values), max(values)))
        return f"{median} ({least}–{greatest})" if len(values) > 1 else median

    columns = [("cpu", "requests_per_cpu_s", "{:.0f}", "requests per CPU-s"), ("cpu", "requests_per_s", "{:.0f}", "requests/s"),
               ("cpu", "memory_mb", "{:.0f}", "MB"),
               ("pool", "pool_use", "{:.1%}", "pool use"), ("kills", "repeated", "{:.1%}", "called again"),
               ("kills", "repeated_per_kill", "{:.0f}", "a kill"),
               ("kills", "answered_per_kill", "{:.0f}", "of these, though answered"),
               ("kills", "answer_age_s.greatest", "{:.2f} s", "the oldest"),
               ("kills", "stalls_s.median", "{:.1f} s", "until it calls again"),
               ("kills", "doubled", "{:.1%}", "written twice"), ("kills", "lost", "{}", "lost")]
    print("| Contender | " + " | ".join(title for *_, title in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name in every:
        print(f"| {name} | " + " | ".join(column(part, name, field, form) for part, field, form, _ in columns) + " |")


def value(figure, field, *more):
    return value(figure[field], *more) if more else figure[field]


signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
asyncio.run(main())
