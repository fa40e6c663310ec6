"""`python -m engine.follow`: the process of a rank other than 0, started by `engine/followers.py`.

Owns nothing of its own: it loads its part of the model as rank 0 does, and then computes what it hears of, until rank 0
ends its pipe. Its work means nothing without rank 0, so it ends on the spot, wherever it is.
"""

import os
import queue
import signal
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from threading import Thread

import torch

from engine import relay
from engine.build import open_model, pick_device
from engine.drafters import forward_into
from engine.followers import Order
from engine.ranks import join


def main() -> None:
    """Follows at the end of the pipe whose number is the only argument."""
    for number in (signal.SIGINT, signal.SIGTERM):  # when to leave is rank 0's to say
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    order: Order = connection.recv()
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    Thread(target=_listen, args=(connection, messages), daemon=True).start()
    try:
        _follow(order, connection, messages)
    except Exception as error:
        with suppress(OSError):  # rank 0 may be gone
            connection.send(f"{type(error).__name__}: {error}")
        raise


def _listen(connection: Connection, messages: "queue.SimpleQueue[bytes]") -> None:
    """Hears the end whatever the main thread is at: it may be waiting for ranks that are no more."""
    with suppress(EOFError, OSError):
        while (message := connection.recv_bytes()) != relay.END:
            messages.put(message)
    os._exit(0)


@torch.inference_mode()
def _follow(order: Order, connection: Connection, messages: "queue.SimpleQueue[bytes]") -> None:
    config = order.config
    device = pick_device(config.device, order.rank, config.ranks)
    connection.send(None)  # ready to meet the others
    ranks = join(order.rank, config.ranks, order.folder, device, whole_experts=config.experts == "whole")
    model = open_model(config, order.model_path, ranks)
    forward = forward_into(model.decoder, model.cache)
    while True:
        forward(relay.receive(messages.get(), ranks))


if __name__ == "__main__":
    main()
