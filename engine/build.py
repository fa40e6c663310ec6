"""An engine from a checkpoint: backend, decoder, cache, scheduler and runner put together.

Owns what the settings leave open: device, number format and the cache's size follow from the machine and the model.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from engine.blocks import BlockCache, blocks_for
from engine.config import DRAFTS_MAX, SHARE_ON_GPU, SHARE_ON_HOST, EngineConfig, num_blocks_within
from engine.core import Core
from engine.drafters import forward_into, load_draft_model, make_drafter
from engine.drafting import Drafting
from engine.errors import EngineMisconfigured
from engine.followers import Followers
from engine.graphs import Capture, Forward, Graphs, cuda_capture, sizes_of
from engine.loader import Progress, load
from engine.memory import GRAPH_BYTES, CudaProbe, Demand, Probe, largest_batch
from engine.metering import Meter
from engine.models.decoder import Decoder, KVCache
from engine.models.layers import AUTO
from engine.models.spec import ModelSpec
from engine.ranks import ALONE, Ranks
from engine.runner import Runner
from engine.scheduler import Scheduler
from engine.types import Capacity
from kernels.backends import pick
from kernels.cache import CACHE_DTYPES
from kernels.ops import Ops, SamplingRow


@dataclass(frozen=True)
class Model:
    """What every rank has: its part of the model, and of a cache with a block more than the `num_blocks` that sequences
    may hold. A model that drafts has its own.
    """

    decoder: Decoder
    cache: KVCache
    draft_model: Decoder | None
    draft_cache: KVCache | None
    num_blocks: int
    ops: Ops

    @classmethod
    def of(
        cls,
        config: EngineConfig,
        decoder: Decoder,
        ops: Ops,
        *,
        draft_model: Decoder | None = None,
        ranks: Ranks = ALONE,
        probe: Probe | None = None,
    ) -> Self:
        """With a cache as large as the settings say, or the memory allows. Raises EngineMisconfigured."""
        device, kept = decoder.device, cache_dtype(config.cache, decoder.dtype)
        models = [decoder, draft_model] if draft_model else [decoder]
        block_bytes = sum(bytes_per_block(model.part, config.block_size, kept) for model in models)
        if probe is None and device.type == "cuda":
            probe = CudaProbe(device)
        if probe:
            num = _measured_blocks(config, decoder, ops, block_bytes, probe)
        else:
            num = _num_blocks(config, decoder, block_bytes, ranks)
        num = ranks.least(num)
        cache, *rest = (KVCache.allocate(model.part, num + 1, config.block_size, kept, device) for model in models)
        return cls(decoder, cache, draft_model, rest[0] if rest else None, num, ops)

    @property
    def forward(self) -> Forward:
        """A batch's logits (R, V) fp32; the cache holds its keys and values."""
        return forward_into(self.decoder, self.cache)


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
        return engine_of(config, model, followers)
    except BaseException:
        followers.end()
        raise


def open_model(config: EngineConfig, model_path: Path, ranks: Ranks, progress: Progress | None = None) -> Model:
    """One rank's part of the model, ready to compute. All ranks call it, and raise what `build` does."""
    device = pick_device(config.device, ranks.rank, ranks.size)
    dtype = activation_dtype(device)
    ops = pick(device)
    ops.use_threads(config.threads or _threads(ranks))
    decoder = load(
        model_path,
        ops,
        weights=config.weights,
        dtype=dtype,
        device=device,
        ranks=ranks,
        draft_heads=config.draft_heads,
        progress=progress,
    )
    return Model.of(config, decoder, ops, draft_model=load_draft_model(config, decoder, ops), ranks=ranks)


def engine_of(
    config: EngineConfig, model: Model, followers: Followers | None = None, capture: Capture | None = None
) -> Core:
    """An engine that is ready to step. Raises EngineMisconfigured.

    `capture`: as in `engine/graphs.py`; None: as the settings and the device have it. Several ranks record nothing:
    each would have to replay at the others' word.
    """
    followers = followers or Followers((), ALONE)
    device, decoder, ops = model.decoder.device, model.decoder, model.ops
    drafter = make_drafter(config, decoder, model.cache, model.draft_model, model.draft_cache, ops)
    blocks = BlockCache(model.num_blocks, config.block_size, drafter.num_seen_behind)
    capacity = _capacity(config, decoder, blocks)
    drafts_max = _drafts_max(config, device)
    sizes = sizes_of(config.sequences_max, 1 + drafts_max)
    graphs = Graphs(followers.leading(model.forward), sizes, model.num_blocks, config.block_size)
    if capture is None and device.type == "cuda" and _is_recorded(config):
        capture = cuda_capture()
    if capture:
        graphs.record(capture, blocks_for(capacity.context_max, config.block_size), device)
    return Core(
        Scheduler(config, blocks, capacity.context_max),
        Drafting(drafter, blocks, drafts_max, config.draft_cost),
        Runner(graphs, ops, config.block_size, device, graphs.padded),
        Meter(),
        capacity,
        followers,
        overlap=_overlaps(config, device),
    )


def _is_recorded(config: EngineConfig) -> bool:
    return config.graphs == "auto" and config.ranks == 1


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
    memory_bytes = int(free_memory_bytes(decoder.device) * (config.cache_memory_share or SHARE_ON_HOST)) // num_sharing
    return min(_useful_blocks(config, decoder), num_blocks_within(memory_bytes, block_bytes))


def _useful_blocks(config: EngineConfig, decoder: Decoder) -> int:
    """More than all sequences at their longest could fill is of no use."""
    return config.sequences_max * blocks_for(config.context_max or decoder.spec.context_max, config.block_size)


def _measured_blocks(config: EngineConfig, decoder: Decoder, ops: Ops, block_bytes: int, probe: Probe) -> int:
    """As many as fit beside the largest step and the graphs."""
    step_bytes = _step_bytes(config, decoder, ops, probe)
    graph_bytes = 0
    if _is_recorded(config):
        sizes = sizes_of(config.sequences_max, 1 + _drafts_max(config, decoder.device))
        result_bytes = 4 * max(map(max, sizes.values())) * decoder.spec.vocab_size  # fp32
        # What they share is less than the largest step takes, and not given back after a replay.
        graph_bytes = GRAPH_BYTES * sum(map(len, sizes.values())) + step_bytes + result_bytes
    demand = Demand(probe.total_bytes(), probe.free_bytes(), step_bytes, graph_bytes)
    if config.cache_tokens:
        num = config.cache_tokens // config.block_size
        return demand.blocks(1.0, block_bytes, num_wanted=num, num_least=num)
    num_least = blocks_for(config.context_max or 1, config.block_size)
    share = config.cache_memory_share or SHARE_ON_GPU
    return demand.blocks(share, block_bytes, num_wanted=_useful_blocks(config, decoder), num_least=num_least)


@torch.inference_mode()
def _step_bytes(config: EngineConfig, decoder: Decoder, ops: Ops, probe: Probe) -> int:
    """What the largest step takes for a moment, its sampling with it."""
    batch, num_blocks = largest_batch(config, decoder.device)
    kept = cache_dtype(config.cache, decoder.dtype)
    cache = KVCache.allocate(decoder.part, num_blocks, config.block_size, kept, decoder.device)
    rows = [SamplingRow(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, uniform=0.5)] * len(batch.rows)

    def compute() -> None:
        ops.sample(decoder.forward(batch.token_ids, batch.positions, batch.attention, cache, batch.rows), rows)

    return probe.peak_bytes(compute)


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
