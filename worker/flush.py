"""The flush: everything finished so far, and the positions that say so, in one transaction.

A flush is a burst, never a session: begin, send all, await all, positions, commit. No model runs while a transaction is
open, so a worker that dies leaves one open for milliseconds at most.

And what a failed one means: after any failure the producer is dropped and a new one opened in its place, which ends
whatever was open. From then on the committed positions do not move under our feet, and they tell what happened: those
that we wanted (it was committed), those from before (it was not: do it again), or neither (another worker has taken
over).
Nothing is ever retried inside a transaction whose end is unknown.
"""

from asyncio import gather
from collections.abc import Iterator, Mapping, Sequence

from worker.brokers.base import Broker, Membership, Outgoing, Place
from worker.errors import Fenced, OutcomeUnknown, Unavailable
from worker.partition import Burst

# Each attempt waits for the client's own timeouts, so this many amount to minutes without a working coordinator.
ATTEMPTS_MAX = 5

# Of one transaction's records. What a line cannot carry within the transaction's timeout is refused and sent again,
# with all that has come since: for ever. So much is 100 KB with lz4, 2 s of a line with 64 KB/s; most have a tenth.
BURST_BYTES_MAX = 512 << 10


def portions(bursts: Mapping[Place, Burst]) -> Iterator[Mapping[Place, Burst]]:
    """The bursts in parts, each to be flushed by itself: as many partitions as keep below `BURST_BYTES_MAX`, or one.

    One part at least: where there are no bursts, it is empty.
    """
    part: dict[Place, Burst] = {}
    room = BURST_BYTES_MAX
    for place, burst in bursts.items():
        if part and burst.num_bytes > room:
            yield part
            part, room = {}, BURST_BYTES_MAX
        part[place] = burst
        room -= burst.num_bytes
    yield part


async def flush(
    broker: Broker, bursts: Mapping[Place, Burst], notes: Sequence[Outgoing], membership: Membership | None
) -> int:
    """Afterwards all outcomes and notes are committed together with the positions. Returns how many attempts it took.

    Notes are records that belong to no partition and that may safely be sent twice (meter readings); they alone need no
    membership.

    Raises Fenced if the partitions have another owner; unless it says otherwise, nothing was committed. Raises
    Unavailable when no attempt succeeded.
    """
    wanted = {place: burst.position for place, burst in bursts.items()}
    before = {place: burst.before for place, burst in bursts.items()}
    for attempt in range(1, ATTEMPTS_MAX + 1):
        try:
            await _transact(broker, bursts, notes, membership)
        except (OutcomeUnknown, Fenced) as error:
            await broker.renew()
            if isinstance(error, Fenced):
                raise
            recorded = dict(await broker.positions(wanted)) if wanted else {}
            if wanted and recorded == wanted:
                return attempt
            if recorded != before:
                raise Fenced("the group has given these partitions to another worker", outcome_known=False) from error
        else:
            return attempt
    raise Unavailable(f"no transaction could be committed in {ATTEMPTS_MAX} attempts; are the brokers healthy?")


async def _transact(
    broker: Broker, bursts: Mapping[Place, Burst], notes: Sequence[Outgoing], membership: Membership | None
) -> None:
    records = [record for burst in bursts.values() for outcome in burst.outcomes for record in outcome.records]
    await broker.begin()
    sent = [await broker.send(record) for record in (*records, *notes)]
    await gather(*sent)  # before the positions: a rejected record stops the commit, and some brokers want this order
    if membership and bursts:
        await broker.send_positions({place: burst.position for place, burst in bursts.items()}, membership)
    await broker.commit()
