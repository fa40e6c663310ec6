"""Log probabilities without a log-softmax in memory and without a sort: by blocks first, then token by token.

The first kernel reads the logits once, 4 R V bytes, which is its bound; of each block it keeps the likeliest token and
the mass, so that one row alone keeps all multiprocessors busy too. The second has a program for each row. It adds the
masses up, and takes tokens in their order: the likeliest of all blocks' likeliest, whose place the next of its block
takes. That reads BLOCK logits a token, from the second-level cache, one block after the other: some 1.3 us each.

A token is compared as one number: its logit's key, and below it its id, counted from the highest. So equal logits come
by rising id. NaN comes before all others, as in the definition's sort.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.order import logit_of, read

BLOCK = 1024  # logits of a program with four warps: two loads of 16 bytes a thread
IDS = tl.constexpr(2**31 - 1)
NAN_KEY = tl.constexpr(0x7FC00000)  # above that of infinity
NONE = tl.constexpr(-(2**63))  # below every token's number


def logprobs(logits: Tensor, chosen: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """As the definition, in R V / 85 bytes beside its results."""
    num_rows, vocab_size = logits.shape
    num_blocks, num_top = triton.cdiv(vocab_size, BLOCK), min(num_top, vocab_size)
    likeliest = torch.empty(num_rows, num_blocks, dtype=torch.int64, device=logits.device)
    masses = torch.empty(num_rows, num_blocks, dtype=torch.float32, device=logits.device)
    own = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    top = torch.empty(num_rows, num_top, dtype=torch.int64, device=logits.device)
    top_logprobs = torch.empty(num_rows, num_top, dtype=torch.float32, device=logits.device)
    if num_rows:
        _blocks[num_rows, num_blocks](logits, likeliest, masses, logits.stride(0), vocab_size, BLOCK=BLOCK)
        _tokens[num_rows,](
            logits,
            chosen,
            likeliest,
            masses,
            own,
            top,
            top_logprobs,
            logits.stride(0),
            vocab_size,
            num_blocks,
            num_top,
            BLOCK=BLOCK,
            BLOCKS=triton.next_power_of_2(num_blocks),
        )
    return own, top, top_logprobs


@triton.jit
def _blocks(logits, likeliest, masses, stride, V, BLOCK: tl.constexpr):
    # A block's likeliest token, and the mass of all its tokens relative to that one's.
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    logit, number = _numbered(logits + row * stride, V, block * BLOCK, BLOCK)
    greatest = tl.max(number)
    most = logit_of(greatest >> 32)
    mass = tl.sum(tl.where(logit == float("-inf"), 0.0, tl.exp(logit - most)))
    target = row * tl.num_programs(1) + block
    tl.store(likeliest + target, greatest)
    tl.store(masses + target, mass)


@triton.jit(do_not_specialize=["num_top"])  # for each number of tokens the same code
def _tokens(
    logits,
    chosen,
    likeliest,
    masses,
    own,
    top,
    top_logprobs,
    stride,
    V,
    num_blocks,
    num_top,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    block = tl.arange(0, BLOCKS)
    inside = block < num_blocks
    best = tl.load(likeliest + row * num_blocks + block, mask=inside, other=NONE)  # of each block, among those left
    mass = tl.load(masses + row * num_blocks + block, mask=inside, other=0.0)
    most = logit_of(tl.max(best) >> 32)
    relative = tl.exp(logit_of(best >> 32) - most)
    log_mass = tl.log(tl.sum(tl.where(inside, mass * relative, 0.0)))
    tl.store(own + row, tl.load(logits + tl.load(chosen + row)) - most - log_mass)
    for place in range(num_top):
        greatest = tl.max(best)
        token = IDS - (greatest & IDS)
        tl.store(top + row * num_top + place, token)
        tl.store(top_logprobs + row * num_top + place, logit_of(greatest >> 32) - most - log_mass)
        its_block = (token // BLOCK).to(tl.int32)
        _, number = _numbered(logits, V, its_block * BLOCK, BLOCK)
        best = tl.where(block == its_block, tl.max(tl.where(number < greatest, number, NONE)), best)


@triton.jit
def _numbered(row, V, first, BLOCK: tl.constexpr):
    # Logits, and their tokens as numbers in their order.
    logit, key = read(row, V, first, BLOCK)
    key = tl.where(logit == logit, key, NAN_KEY)  # noqa: PLR0124  # NaN equals nothing; some have a sign
    return logit, (key.to(tl.int64) << 32) | (IDS - first - tl.arange(0, BLOCK))
