"""The registry's use cases, by subject. They know neither SQL nor protobuf nor Kafka."""
