"""An engine from a checkpoint: backend, decoder, cache, scheduler and runner put together.

Owns what the settings leave open: device, number format and the cache's size follow from the machine and the model.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.blocks import BlockCache
from engine.config import DRAFTS_MAX, EngineConfig, num_blocks_within
from engine.core import Core
from engine.drafters import forward_into, load_draft_model, make_drafter
from engine.drafting import Drafting
from engine.errors import EngineMisconfigured
from engine.followers import Followers
from engine.loader import Progress, load
from engine.metering import Meter
from engine.models.decoder import Decoder, KVCache
from engine.models.layers import AUTO
from engine.models.spec import ModelSpec
from engine.ranks import Ranks
from engine.runner import Runner
from engine.scheduler import Scheduler
from engine.types import Capacity
from kernels.backends import pick
from kernels.cache import CACHE_DTYPES
from kernels.ops import Ops


@dataclass(frozen=True)
class Model:
    """What every rank has: its part of the model, and of the cache of `num_blocks` blocks. A model that drafts has its
    own.
    """

    decoder: Decoder
    cache: KVCache
    draft_model: Decoder | None
    draft_cache: KVCache | None
    num_blocks: int
    ops: Ops


def build(config: EngineConfig, model_path: Path, progress: Progress | None = None) -> Core:
    """An engine that is ready to step. `progress` hears of the weights in bytes.

    Raises ModelError where the checkpoint cannot be used, EngineMisconfigured where the settings do not suit it,
    RankLost where another rank's process ends.
    """
    device = pick_device(config.device, 0, config.ranks)
    followers = Followers.start(config, model_path, device)
    try:
        with followers.blaming():
            model = open_model(config, model_path, followers.ranks, progress)
        blocks = BlockCache(model.num_blocks, config.block_size)
        capacity = _capacity(config, model.decoder, blocks)
        drafter = make_drafter(config, model.decoder, model.cache, model.draft_model, model.draft_cache, model.ops)
        forward = followers.leading(forward_into(model.decoder, model.cache))
        return Core(
            Scheduler(config, blocks, capacity.context_max),
            Drafting(drafter, blocks, _drafts_max(config, device), config.draft_cost),
            Runner(forward, model.ops, config.block_size, device),
            Meter(),
            capacity,
            followers,
            overlap=_overlaps(config, device),
        )
    except BaseException:
        followers.end()
        raise


def open_model(config: EngineConfig, model_path: Path, ranks: Ranks, progress: Progress | None = None) -> Model:
    """One rank's part of the model, ready to compute. All ranks call it, and raise what `build` does."""
    device = pick_device(config.device, ranks.rank, ranks.size)
    dtype = activation_dtype(device)
    ops = pick(device)
    ops.use_threads(config.threads or _threads(ranks))
    decoder = load(model_path, ops, weights=config.weights, dtype=dtype, device=device, ranks=ranks, progress=progress)
    draft_model = load_draft_model(config, decoder, ops)
    kept = cache_dtype(config.cache, dtype)
    models = [decoder, draft_model] if draft_model else [decoder]
    block_bytes = sum(bytes_per_block(model.part, config.block_size, kept) for model in models)
    num_blocks = ranks.least(_num_blocks(config, decoder, block_bytes, ranks))
    caches = [KVCache.allocate(model.part, num_blocks, config.block_size, kept, device) for model in models]
    return Model(decoder, caches[0], draft_model, caches[1] if draft_model else None, num_blocks, ops)


def _threads(ranks: Ranks) -> int:
    """Of each rank, where the settings leave it open: together they have all cores. 0: as many as torch takes."""
    return 0 if ranks.size == 1 else max(1, len(os.sched_getaffinity(0)) // ranks.size)


def pick_device(name: str, rank: int = 0, num_ranks: int = 1) -> torch.device:
    """The device of this name, of several ranks a GPU for each; auto: GPUs where there are any.

    Raises EngineMisconfigured where it is not there.
    """
    if name == AUTO:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if num_ranks > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise EngineMisconfigured(f"device {name!r} is one GPU, and there are {num_ranks} ranks: take cuda")
        if num_ranks > torch.cuda.device_count():
            raise EngineMisconfigured(f"ranks is {num_ranks}, and there are {torch.cuda.device_count()} GPUs")
        name = f"cuda:{rank}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch has no type of its own for a device that is not there
        raise EngineMisconfigured(f"device {name!r} is of no use: {error}; take cpu, cuda or auto") from error
    return device


def activation_dtype(device: torch.device) -> torch.dtype:
    """In which the device computes."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _drafts_max(config: EngineConfig, device: torch.device) -> int:
    """Where steps overlap, the token that drafts would follow is not known when they are planned."""
    if config.drafts_max is not None:
        return config.drafts_max
    wants_drafts = device.type == "cpu" or config.has_drafting_model
    return DRAFTS_MAX if wants_drafts and config.overlap != "on" else 0


def _overlaps(config: EngineConfig, device: torch.device) -> bool:
    """Where the device is the host, a step that is launched ahead would only be waited for."""
    suits = device.type != "cpu" and not _drafts_max(config, device)
    return suits if config.overlap == "auto" else config.overlap == "on"


def cache_dtype(name: str, activations: torch.dtype) -> torch.dtype:
    """That of a cache of the format `name`. Raises EngineMisconfigured where there is none."""
    if name not in (AUTO, *CACHE_DTYPES):
        raise EngineMisconfigured(f"cache {name!r} is not one of {', '.join((AUTO, *CACHE_DTYPES))}")
    return activations if name == AUTO else CACHE_DTYPES[name]


def bytes_per_block(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> int:
    """What a block of the cache takes. Raises EngineMisconfigured where the format cannot keep what the model has."""
    try:
        return KVCache.bytes_per_block(spec, block_size, dtype)
    except ValueError as error:
        raise EngineMisconfigured(str(error)) from error


def _num_blocks(config: EngineConfig, decoder: Decoder, block_bytes: int, ranks: Ranks) -> int:
    if config.cache_tokens:
        return config.cache_tokens // config.block_size
    ranks.least(0)  # all have loaded their weights, and what is free now stays so
    num_sharing = ranks.size if decoder.device.type == "cpu" else 1
    memory_bytes = int(free_memory_bytes(decoder.device) * config.cache_memory_share) // num_sharing
    # More than all sequences at their longest could fill is of no use.
    useful = config.sequences_max * -(-(config.context_max or decoder.spec.context_max) // config.block_size)
    return min(useful, num_blocks_within(memory_bytes, block_bytes))


def _capacity(config: EngineConfig, decoder: Decoder, blocks: BlockCache) -> Capacity:
    spec, cache_tokens = decoder.spec, blocks.num_blocks * config.block_size
    if config.context_max > spec.context_max:
        raise EngineMisconfigured(f"context_max is {config.context_max}; the model was made for {spec.context_max}")
    if config.context_max > cache_tokens:
        raise EngineMisconfigured(
            f"context_max is {config.context_max}, and the cache holds {cache_tokens} tokens; "
            "lower context_max or raise cache_tokens"
        )
    return Capacity(
        cache_tokens=cache_tokens,
        # A sequence that has the cache to itself always fits, so that the scheduler can always go on.
        context_max=config.context_max or min(spec.context_max, cache_tokens),
        vocab_size=spec.vocab_size,
        eos_token_ids=spec.eos_token_ids,
    )


def free_memory_bytes(device: torch.device) -> int:
    """What the device could still give; on the host, within the container's limit where there is one."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    limit, used = (_cgroup_bytes(name) for name in ("memory.max", "memory.current"))
    return free_bytes if limit is None or used is None else min(free_bytes, max(0, limit - used))


def _cgroup_bytes(name: str) -> int | None:
    """A number of the control group (v2) that we are in; None where there is none or it says `max`."""
    path = Path("/sys/fs/cgroup") / name
    text = path.read_text().strip() if path.exists() else ""
    return int(text) if text.isdigit() else None
