"""Rows as a client of a schema registry sees them, who knows nothing of their schema: python registry.py BOOTSTRAP REGISTRY TOPIC

Prints one line of JSON: the rows with the framing of the registry, how many have another, and the subjects that are registered.
tests/tests/registry.rs says what that must be.
"""

import json
import sys

from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroDeserializer
from confluent_kafka.serialization import MessageField, SerializationContext
from kafka import KafkaConsumer, TopicPartition


def main(bootstrap, registry, topic):
    client = SchemaRegistryClient({"url": registry})
    deserialize = AvroDeserializer(client)
    context = SerializationContext(topic, MessageField.VALUE)
    consumer = KafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="earliest", enable_auto_commit=False)
    partitions = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic)]
    consumer.assign(partitions)
    ends = consumer.end_offsets(partitions)
    rows, others = [], 0
    while any(consumer.position(partition) < ends[partition] for partition in partitions):
        for records in consumer.poll(timeout_ms=100).values():
            for record in records:
                if record.value[0] == 0:
                    rows.append(deserialize(record.value, context))
                else:
                    others += 1
    consumer.close()
    print(json.dumps({"rows": rows, "others": others, "subjects": sorted(client.get_subjects())}, default=str))


main(*sys.argv[1:])
