"""Asks as fast as it can, from a client that is not librdkafka: python produce.py BOOTSTRAP TOPIC FIRST COUNT

Writes requests FIRST to FIRST + COUNT - 1. Most have an id, some have none, some are no requests at all. Prints one line of
JSON: the ids, and how many of the others. All are acknowledged when it ends.
"""

import json
import sys

from kafka import KafkaProducer

LIMIT_S = 60

SUBJECTS = ["dead letter", "citation", "tenant", "deadline", "cache hit", "consumer group", "damaged segment", "guide"]
GARBAGE = [b"\xff\xfe\x00\x80", b"{\"prompt\": ", b"[1, 2]", b"{}", b'{"prompt": "  "}', None, b""]


def record(number):
    """Key and value of a request, and what kind of request it is."""
    if number % 40 == 13:
        # With a key, since this client writes nothing that has neither key nor value.
        return b"garbage", GARBAGE[number // 40 % len(GARBAGE)], "garbage"
    # A third comes again and again; the others must go the whole way.
    request = {"prompt": "What is a %s, in words %d?" % (SUBJECTS[number % len(SUBJECTS)], number % 50)}
    if number % 3:
        request["cache"] = {"no_cache": True}
    if number % 40 == 27:
        return None, json.dumps(request).encode(), "without_id"
    request["id"] = "r%d" % number
    return request["id"].encode() if number % 2 else None, json.dumps(request).encode(), "ids"


def main(bootstrap, topic, first, count):
    producer = KafkaProducer(bootstrap_servers=bootstrap, acks="all", enable_idempotence=True, linger_ms=5)
    written = {"ids": [], "without_id": 0, "garbage": 0}
    sent = []
    for number in range(int(first), int(first) + int(count)):
        key, value, kind = record(number)
        sent.append(producer.send(topic, key=key, value=value))
        if kind == "ids":
            written["ids"].append("r%d" % number)
        else:
            written[kind] += 1
    for future in sent:
        future.get(timeout=LIMIT_S)
    producer.close()
    print(json.dumps(written))


main(*sys.argv[1:])
