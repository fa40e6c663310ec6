"""Brokers behind one port. Only the files named kafka import aiokafka."""
