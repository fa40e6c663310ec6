"""The table of faults. To add one: a function from a trial to a finding, and its line beside it."""

from tests.chaos import brokers, engines, inputs, network, simulated, workers
from tests.chaos.fault import Fault

_ALL = (*workers.FAULTS, *brokers.FAULTS, *network.FAULTS, *inputs.FAULTS, *engines.FAULTS, *simulated.FAULTS)
FAULTS: dict[str, Fault] = {fault.id: fault for fault in sorted(_ALL, key=lambda fault: int(fault.id[1:]))}
