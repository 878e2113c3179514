"""A hand-written loop: aiokafka, aiohttp, orjson and uvloop, in the two forms in which people write it.

    loop.py batch|window KAFKA FROM TO GROUP MODEL_URL CAP

batch: read up to CAP records, ask for all of them at once, write all, commit, read on.
window: CAP calls always under way; every second commit the lowest offset that is not finished.
"""

import asyncio, sys

import aiohttp, orjson, uvloop
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

form, kafka, source, target, group, url, cap = sys.argv[1:]
cap = int(cap)
INSTRUCTIONS = """Answer the question from the numbered sources that come with it. After each statement give the \
number of the source that it rests on in square brackets, like [1]."""


def chat(record):
    parts = [f'<source n="{n}" from="{passage["document"]}">\n{passage["text"]}\n</source>'
             for n, passage in enumerate(record["passages"], 1)]
    question = "\n".join([*parts, record["request"]["prompt"]])
    messages = [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": question}]
    return orjson.dumps({"model": "fixed", "messages": messages, "max_tokens": 1024, "stream": False})


async def work(message, session, producer):
    record = orjson.loads(message.value)
    async with session.post(url, data=chat(record), headers={"content-type": "application/json"}) as response:
        response.raise_for_status()
        reply = orjson.loads(await response.read())
    choice = reply["choices"][0]
    record["cache"] = "miss"
    record["answer"] = {
        "text": choice["message"]["content"], "citations": [], "model": reply["model"],
        "provider": "openai_compatible", "usage": reply["usage"], "finish_reason": choice["finish_reason"],
    }
    await producer.send_and_wait(target, orjson.dumps(record), message.key, headers=list(message.headers))


async def batch(consumer, session, producer):
    while True:
        read = await consumer.getmany(timeout_ms=1000, max_records=cap)
        await asyncio.gather(*(work(message, session, producer) for part in read.values() for message in part))
        if read:
            await consumer.commit()


async def window(consumer, session, producer):
    places, unfinished, following, running = asyncio.Semaphore(cap), {}, {}, set()

    async def commit():
        while True:
            await asyncio.sleep(1)
            if offsets := {part: min(unfinished[part], default=end) for part, end in following.items()}:
                await consumer.commit(offsets)

    async def one(message, part):
        try:
            await work(message, session, producer)
            unfinished[part].discard(message.offset)
        finally:
            places.release()

    committing = asyncio.create_task(commit())
    async for message in consumer:
        await places.acquire()
        part = TopicPartition(message.topic, message.partition)
        unfinished.setdefault(part, set()).add(message.offset)
        following[part] = message.offset + 1
        task = asyncio.create_task(one(message, part))
        running.add(task)
        task.add_done_callback(running.discard)
    await committing


async def main():
    consumer = AIOKafkaConsumer(
        source, bootstrap_servers=kafka, group_id=group, enable_auto_commit=False, auto_offset_reset="earliest",
        session_timeout_ms=10_000)
    producer = AIOKafkaProducer(bootstrap_servers=kafka, acks="all", enable_idempotence=True)
    connector = aiohttp.TCPConnector(limit=cap)
    async with consumer, producer, aiohttp.ClientSession(connector=connector) as session:
        await {"batch": batch, "window": window}[form](consumer, session, producer)


uvloop.run(main())
