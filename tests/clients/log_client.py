"""The contract of the log as a client that is not librdkafka sees it: python log_client.py BOOTSTRAP PREFIX

Prints one line of JSON: what it did and what it got. tests/tests/log.rs says what that must be.
"""

import json
import sys

from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import KafkaAdminClient, NewTopic
from kafka.errors import KafkaError
from kafka.structs import OffsetAndMetadata

LIMIT_MS = 30_000


def main(bootstrap, prefix):
    results = {}
    topic, group = prefix + "python", prefix + "python-group"

    admin = KafkaAdminClient(bootstrap_servers=bootstrap)
    # Its records are of 1970, and must outlive the next look of retention.
    settings = {"retention.ms": "-1"}
    new = NewTopic(name=topic, num_partitions=1, replication_factor=1, topic_configs=settings)
    admin.create_topics([new])
    results["created_twice"] = error_of(admin, new)

    producer = KafkaProducer(bootstrap_servers=bootstrap, acks="all", enable_idempotence=True, compression_type="gzip")
    sent = [
        producer.send(topic, key=b"k%d" % n, value=b"v%d" % n, partition=0, timestamp_ms=1_000 * (n + 1))
        for n in range(3)
    ]
    results["produced"] = [future.get(timeout=LIMIT_MS / 1000).offset for future in sent]
    producer.close()

    # A group of its own, so that JoinGroup and its kin are this client's too.
    consumer = KafkaConsumer(
        topic,
        bootstrap_servers=bootstrap,
        group_id=group,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        consumer_timeout_ms=LIMIT_MS,
    )
    consumed = []
    for record in consumer:
        consumed.append([record.key.decode(), record.value.decode()])
        if len(consumed) == 3:
            break
    results["consumed"] = consumed

    partition = TopicPartition(topic, 0)
    consumer.commit({partition: OffsetAndMetadata(2, "from python", -1)})
    committed = consumer.committed(partition, metadata=True)
    results["committed"] = [committed.offset, committed.metadata]
    beginning, end = consumer.beginning_offsets([partition]), consumer.end_offsets([partition])
    results["beginning_and_end"] = [beginning[partition], end[partition]]
    results["by_time"] = consumer.offsets_for_times({partition: 1_500})[partition].offset
    consumer.close()

    results["listed"] = any(group_of(g) == group for g in admin.list_groups())
    admin.delete_topics([topic])
    results["deleted"] = True
    admin.close()
    print(json.dumps(results))


def error_of(admin, topic):
    try:
        admin.create_topics([topic])
    except KafkaError as error:
        return type(error).__name__
    return None


def group_of(listed):
    return listed["group_id"] if isinstance(listed, dict) else listed[0]


main(*sys.argv[1:])
