"""Kafka, text and money. Knows nothing of tensors."""
