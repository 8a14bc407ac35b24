"""Keys must go where Kafka's own clients send them."""

from __future__ import annotations

import pytest
from aiokafka.partitioner import DefaultPartitioner
from aiokafka.partitioner import murmur2 as reference
from eventing.partitioning import murmur2, partition_of
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(deadline=None)
@given(st.binary(max_size=64))
def test_the_hash_is_that_of_another_implementation(data):
    assert murmur2(data) == reference(data)


@pytest.mark.parametrize(("data", "expected"), [(b"21", -973932308), (b"foobar", -790332482), (b"a-little-bit-long-string", -985981536)])
def test_the_hash_is_that_of_kafkas_own_tests(data, expected):
    """Vectors of org.apache.kafka.common.utils.UtilsTest, as signed numbers."""
    assert murmur2(data) == expected % 2**32


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=40), st.integers(1, 50))
def test_the_partition_is_that_of_another_client(key, partitions):
    assert partition_of(key, partitions) == DefaultPartitioner()(key, list(range(partitions)), list(range(partitions)))
