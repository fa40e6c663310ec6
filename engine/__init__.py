"""Tokens in, tokens out. Knows nothing of Kafka, text or money."""
