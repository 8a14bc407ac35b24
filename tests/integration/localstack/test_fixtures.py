"""The fixtures that all other tests lean on: their servers are real, isolated, and survive being killed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncpg
import numpy
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.utils
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from localstack import kafka_wire, process, s3_probe, server
from localstack.kafka import Kafka
from localstack.postgres import Postgres
from localstack.throwaway import ThrowawayServers


async def test_each_database_is_empty_and_of_its_own(new_database: Callable[[], str]) -> None:
    first, second = new_database(), new_database()
    connection = await asyncpg.connect(first)
    await connection.execute("CREATE TABLE seen (id int)")
    await connection.close()
    connection = await asyncpg.connect(second)
    assert await connection.fetchval("SELECT count(*) FROM pg_tables WHERE tablename = 'seen'") == 0
    await connection.close()


async def test_a_record_goes_through_the_broker(stack_servers: Any, topic_prefix: str) -> None:
    topic = f"{topic_prefix}notes"
    admin = AIOKafkaAdminClient(bootstrap_servers=stack_servers.kafka)
    await admin.start()
    await admin.create_topics([NewTopic(topic, 1, 1)])
    await admin.close()
    producer = AIOKafkaProducer(bootstrap_servers=stack_servers.kafka, acks="all")
    await producer.start()
    await producer.send_and_wait(topic, b"hello")
    await producer.stop()
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=stack_servers.kafka, auto_offset_reset="earliest")
    await consumer.start()
    record = await consumer.getone()
    await consumer.stop()
    assert record.value == b"hello"


def test_the_object_store_keeps_what_it_is_given(stack_servers: Any) -> None:
    access = stack_servers.servers.s3
    assert s3_probe.request(access, "PUT", f"/{access.bucket}/fixtures/a", b"bytes")[0] == 200
    assert s3_probe.request(access, "GET", f"/{access.bucket}/fixtures/a") == (200, b"bytes")


def test_minio_keeps_what_it_is_given(stack_servers: Any) -> None:
    access = stack_servers.servers.minio.access
    assert s3_probe.request(access, "PUT", f"/{access.bucket}/fixtures/a", b"bytes")[0] == 200
    assert s3_probe.request(access, "GET", f"/{access.bucket}/fixtures/a") == (200, b"bytes")


def test_a_killed_postgres_comes_back_with_its_rows(own_postgres: Callable[[], Postgres]) -> None:
    postgres = own_postgres()
    postgres.sql("CREATE TABLE kept (id int); INSERT INTO kept VALUES (7)")
    server.crash(postgres)
    server.restart(postgres)
    assert postgres.sql("SELECT id FROM kept") == "7"


def test_a_killed_kafka_comes_back_as_the_same_cluster(own_kafka: Callable[[], Kafka]) -> None:
    kafka = own_kafka()
    server.crash(kafka)
    server.restart(kafka)
    assert kafka_wire.describe(("127.0.0.1", kafka.port)).cluster_id == kafka.cluster_id


def test_what_a_killed_test_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    script = f"""
import pathlib, time
from localstack.kafka import Kafka
from localstack.postgres import Postgres
from localstack.throwaway import ThrowawayServers
servers = ThrowawayServers(pathlib.Path({str(tmp_path)!r}))
print(servers.mark, servers.seaweed.port, servers.triton.directory, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        mark, port, directory = run.stdout.readline().split()
        links = Path((Path(directory) / "links").read_text().strip())
        sockets = Path(f"/tmp/seaweedfs-s3-{port}.sock")
        assert links.exists()
        assert sockets.exists()
        run.kill()
    ThrowawayServers(tmp_path).close()
    assert list(process.marked(mark)) == []
    assert not links.exists()
    assert not sockets.exists()
    assert list(tmp_path.iterdir()) == []


def test_triton_runs_a_pushed_model_only_for_those_who_know_the_secret(triton: Any) -> None:
    client = grpcclient.InferenceServerClient(triton.grpc)
    shim = b"""
import triton_python_backend_utils as backend

class TritonPythonModel:
    def execute(self, requests):
        doubled = [backend.get_input_tensor_by_name(each, "x").as_numpy() * 2 for each in requests]
        return [backend.InferenceResponse([backend.Tensor("y", each)]) for each in doubled]
"""
    tensor = {"data_type": "TYPE_FP32", "dims": [-1]}
    config = json.dumps({"backend": "python", "input": [{"name": "x", **tensor}], "output": [{"name": "y", **tensor}]})
    with pytest.raises(tritonclient.utils.InferenceServerException, match="restricted"):
        client.load_model("doubling", config=config, files={"file:1/model.py": shim})
    client.load_model("doubling", config=config, files={"file:1/model.py": shim}, headers=triton.metadata)
    asked = grpcclient.InferInput("x", [3], "FP32")
    asked.set_data_from_numpy(numpy.array([1, 2, 3], numpy.float32))
    assert client.infer("doubling", [asked]).as_numpy("y").tolist() == [2, 4, 6]
    client.close()
