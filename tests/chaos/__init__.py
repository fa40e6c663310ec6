"""The fault campaign: real workers on real brokers, every fault that we know of, at size. `python -m tests.chaos`.

A fault is a value in a table (`faults.py`), one program drives them all (`driver.py`), one checker judges what
readers saw (`tests/invariants.py`), and one report comes out (`report.py`).
"""
