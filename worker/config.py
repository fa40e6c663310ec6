"""The settings of every command: one tree of frozen dataclasses. Where their values come from: `setting_sources.py`.

Never holds a secret: passwords stay in their files and are read by whoever connects, so the whole tree may be shown.
"""

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from schemas.cost import picodollars
from worker.errors import Misconfigured

if TYPE_CHECKING:
    from worker.brokers.kafka_settings import KafkaSettings

SECRET_BYTES_MAX = 64 << 10  # a password or a key: a bigger file is a mistaken path


def between(low: float, high: float) -> Parameter:
    """The range of a setting, checked when its value is read."""
    return Parameter(validator=Number(gte=low, lte=high))


@dataclass(frozen=True, kw_only=True)
class Security:
    """How to prove to the brokers who we are, and they to us. Every secret is in a file of its own."""

    protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    """Use SASL_SSL wherever a network is crossed."""
    mechanism: Literal["SCRAM-SHA-512", "SCRAM-SHA-256", "PLAIN"] = "SCRAM-SHA-512"
    """How the password is proved."""
    username: str = ""
    """Who we are, for SASL."""
    password_file: Path | None = None
    """File with the password, for SASL."""
    ca_file: Path | None = None
    """PEM file of the authorities to trust. Default: the system's."""
    insecure: bool = False
    """Allow an unencrypted connection that leaves this machine."""

    @property
    def encrypted(self) -> bool:
        """Whether nobody on the way can read along."""
        return self.protocol in ("SSL", "SASL_SSL")

    @property
    def authenticated(self) -> bool:
        """Whether a user name and a password are asked for."""
        return self.protocol.startswith("SASL")

    def __post_init__(self) -> None:
        if self.authenticated and not (self.username and self.password_file):
            raise Misconfigured(f"{self.protocol} needs security.username and security.password_file")


@dataclass(frozen=True, kw_only=True)
class Kafka:
    """Where the brokers are."""

    brokers: str = "127.0.0.1:9092"
    """Addresses to start from: host:port, comma-separated."""
    security: Annotated[Security, Parameter(group="Security")] = field(default_factory=Security)

    def client(self, *, worker: str = "tokenmill-cli", group: str = "tokenmill") -> "KafkaSettings":
        """What the broker's side needs to know, the password read from its file. Raises Misconfigured."""
        from worker.brokers.kafka_settings import KafkaSettings  # brings ssl: --help can do without

        security = self.security
        return KafkaSettings(
            brokers=",".join(address.strip() for address in self.brokers.split(",")),
            worker=worker,
            group=group,
            security_protocol=security.protocol,
            sasl_mechanism=security.mechanism,
            sasl_username=security.username or None,
            sasl_password=read_secret(security.password_file) if security.password_file else None,
            ssl_cafile=security.ca_file,
        )

    def __post_init__(self) -> None:
        for address in self.brokers.split(","):
            host = _check_address("brokers", address.strip())
            if not (self.security.encrypted or self.security.insecure or _is_local(host)):
                raise Misconfigured(
                    f"brokers: {host} is on a network, and {self.security.protocol} is readable on the way: set "
                    "security.protocol to SASL_SSL or SSL, or security.insecure where the network itself is trusted"
                )


@dataclass(frozen=True, kw_only=True)
class Topics:
    """The names of the topics, all under one prefix."""

    prefix: str = "tokenmill"
    """First part of every topic's name."""

    def __post_init__(self) -> None:
        # Kafka's own rule for topic names, with room for our longest suffix within its 249 characters.
        if not (0 < len(self.prefix) <= 200 and self.prefix.isascii() and self.prefix.replace(".", "_").isidentifier()):
            raise Misconfigured(f"topics.prefix: {self.prefix!r} is not letters, digits, '.' and '_'")

    @property
    def requests(self) -> str:
        """Requests of the realtime tier."""
        return f"{self.prefix}.requests"

    @property
    def batch(self) -> str:
        """Requests of the batch tier: served when no realtime request waits."""
        return f"{self.prefix}.requests.batch"

    @property
    def completions(self) -> str:
        """One answer for each request, in transactions."""
        return f"{self.prefix}.completions"

    @property
    def costs(self) -> str:
        """The bill of each answer, in its transaction, and the workers' meter readings."""
        return f"{self.prefix}.costs"

    @property
    def chunks(self) -> str:
        """Streamed pieces of text: previews, best effort."""
        return f"{self.prefix}.chunks"

    @property
    def handoff(self) -> str:
        """The rest of requests that a leaving worker had begun, in the transaction that takes them from their topic."""
        return f"{self.prefix}.handoff"

    @property
    def dead_letters(self) -> str:
        """Requests that could not be understood, byte for byte."""
        return f"{self.prefix}.dead-letters"

    @property
    def intake(self) -> tuple[str, str]:
        """Where requests come in, the more urgent first."""
        return (self.requests, self.batch)

    @property
    def consumed(self) -> tuple[str, ...]:
        """What workers consume, the most urgent first."""
        return (self.handoff, *self.intake)

    @property
    def written(self) -> tuple[str, ...]:
        """What workers write."""
        return (*self.transacted, self.chunks)

    @property
    def transacted(self) -> tuple[str, ...]:
        """What workers write in transactions: everything but previews."""
        return (self.completions, self.costs, self.handoff, self.dead_letters)

    @property
    def by_setting(self) -> dict[str, str]:
        """Every topic that must exist, by what it is for."""
        names = ("requests", "batch", "completions", "costs", "chunks", "handoff", "dead_letters")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How the engine uses the machine. Its fields are `engine/config.py`'s, which also says how they must fit."""

    device: str = "auto"
    """Where to compute: cpu, cuda, cuda:1; auto: cuda where there is one."""
    weights: str = "auto"
    """Weights: fp32, bf16, int8, fp8, fp8-blocks, int4, int4-g64, int4-g128, mxfp4; auto: the checkpoint's."""
    cache: Literal["auto", "fp32", "bf16", "fp8", "int8"] = "auto"
    """Number format of the cache; auto: fp32 on a CPU, bf16 on a GPU."""
    threads: Annotated[int, between(0, 1024)] = 0
    """Processor threads of a rank; 0: all cores, shared among the ranks."""
    ranks: Annotated[int, between(1, 16)] = 1
    """Processes that compute the model together, each on a GPU of its own."""
    experts: Literal["sharded", "whole"] = "sharded"
    """Of several ranks: each has a part of every expert, or some experts whole."""
    block_size: Annotated[int, between(1, 1024)] = 16
    """Tokens in one block of the cache."""
    cache_tokens: Annotated[int, between(0, 1 << 30)] = 0
    """Tokens that the cache holds; 0: as its memory allows."""
    cache_memory_share: Annotated[float, between(0, 0.99)] = 0.0
    """Share of the free memory for the cache; 0: half of a host's, and on a GPU 0.9 of what a step leaves."""
    context_max: Annotated[int, between(0, 1 << 24)] = 0
    """Tokens of a prompt and its answer; 0: as the model allows."""
    tokens_per_step_max: Annotated[int, between(1, 1 << 20)] = 512
    """Tokens computed in one step."""
    sequences_max: Annotated[int, between(1, 4096)] = 32
    """Sequences computed in one step."""
    drafts_max: Annotated[int, between(0, 64)] | None = None
    """Tokens drafted ahead for a sequence, at most and where it pays; 0: none. Default: 8 on a CPU, 0 on a GPU."""
    draft_experts: Annotated[int, between(0, 64)] = 0
    """The model drafts for itself with so many experts a token; 0: drafts are looked up in the text."""
    draft_heads: bool = False
    """The model's own layer for multi-token prediction drafts (DeepSeek-V3)."""
    draft_model: str = ""
    """A smaller model with the same tokens, which drafts: by its name, or its folder."""
    draft_weights: str = "auto"
    """Weights of the draft model, as in weights."""
    overlap: Literal["auto", "on", "off"] = "auto"
    """Plan a step while the one before runs; auto: on a GPU, without drafts."""
    graphs: Literal["auto", "off"] = "auto"
    """Record decodes at the start and replay them; auto: on a GPU."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may ask for; more is answered with an error."""

    record_bytes_max: Annotated[int, between(1 << 10, 64 << 20)] = 1 << 20
    """Bytes of a request's record."""
    output_tokens_max: Annotated[int, between(1, 1 << 20)] = 4096
    """Tokens of one answer."""
    output_tokens_default: Annotated[int, between(1, 1 << 20)] = 256
    """Tokens of one answer where the request names none."""
    choices_max: Annotated[int, between(1, 128)] = 16
    """Answers to one request (n)."""


@dataclass(frozen=True, kw_only=True)
class Bill:
    """What tokens are sold for, and what the device costs us."""

    price_book: Path | None = None
    """TOML file of prices. Default: the one in the package."""
    device_rate: str = "0.10"  # two cores of a public cloud
    """US dollars for an hour of the device."""
    events: Literal["token", "request"] = "token"
    """A cost event for each output token, or one a request."""

    def __post_init__(self) -> None:
        try:
            rate = picodollars(self.device_rate)
        except ValueError as error:
            raise Misconfigured(f"bill.device_rate: {error}; write it as 1.25") from None
        if not 0 <= rate <= picodollars("10000"):  # the dearest machines on sale are near 100 dollars an hour
            raise Misconfigured(f"bill.device_rate: {self.device_rate} is not between 0 and 10000 dollars an hour")


@dataclass(frozen=True, kw_only=True)
class Notice:
    """Who may tell a worker to leave, beside SIGTERM."""

    file: Path | None = None
    """Leave when this file is there."""
    cloud: Literal["none", "aws", "gcp"] = "none"
    """Leave when this cloud's metadata service says that the spot machine will be taken away."""
    address: str = ""
    """host:port of the metadata service. Default: the cloud's own."""
    interval_s: Annotated[float, between(0.1, 60)] = 2  # of the 30 seconds that the hastier cloud gives
    """Time between two looks."""

    def __post_init__(self) -> None:
        if self.address:
            _check_address("notice.address", self.address)


@dataclass(frozen=True, kw_only=True)
class Health:
    """Where /livez, /readyz and /metrics answer."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 in a container."""
    port: Annotated[int, between(0, 65535)] = 9464  # OpenTelemetry's for a Prometheus exporter
    """Port to listen on; 0: any free one, named in the log."""


@dataclass(frozen=True, kw_only=True)
class Log:
    """What the worker says on stderr."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is said."""
    format: Literal["auto", "text", "json"] = "auto"
    """auto: text on a terminal, JSON lines elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that a worker is told from outside. Other commands take the parts that they need."""

    kafka: Annotated[Kafka, Parameter(name="*")] = field(default_factory=Kafka)
    topics: Annotated[Topics, Parameter(group="Topics")] = field(default_factory=Topics)
    group: str = "tokenmill"
    """Consumer group: the workers that share the requests."""
    model: str = ""
    """Name of a fetched model, or the path of a checkpoint's folder."""
    worker: str = ""
    """This worker's name, one at a time. Default: the host's name and a number that is free there."""
    engine: Annotated[Engine, Parameter(group="Engine")] = field(default_factory=Engine)
    limits: Annotated[Limits, Parameter(group="Limits")] = field(default_factory=Limits)
    bill: Annotated[Bill, Parameter(group="Bill")] = field(default_factory=Bill)
    flush_interval_ms: Annotated[int, between(1, 10_000)] = 30
    """Time between two transactions."""
    attempts_max: Annotated[int, between(3, 100)] = 4  # the first may go uncounted, the last is made alone
    """Attempts at one request that may end with the worker's death, before it is answered POISONED."""
    drain_s: Annotated[float, between(0, 3600)] = 8
    """Time to finish what runs once told to leave; the rest is handed over."""
    handover_tokens_min: Annotated[int, between(1, 1 << 20)] = 8
    """Tokens of an answer from which its request is handed over; fewer are computed again."""
    notice: Annotated[Notice, Parameter(group="Notice")] = field(default_factory=Notice)
    ageing_s: Annotated[float, between(0, 86_400)] = 5
    """Time that batch requests wait at most behind realtime ones."""
    health: Annotated[Health, Parameter(group="Health")] = field(default_factory=Health)
    log: Annotated[Log, Parameter(group="Log")] = field(default_factory=Log)

    def __post_init__(self) -> None:
        if self.limits.output_tokens_default > self.limits.output_tokens_max:
            raise Misconfigured("limits.output_tokens_default is above limits.output_tokens_max")


def read_secret(path: Path) -> str:
    """The file's text without its last line break. Raises Misconfigured, which names the path and never the content."""
    try:
        with path.open("rb") as file:
            content = file.read(SECRET_BYTES_MAX + 1)
        secret = content.decode().removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise Misconfigured(f"cannot read the secret in {path}: {reason}") from None
    if not secret or len(content) > SECRET_BYTES_MAX:
        raise Misconfigured(f"the secret in {path} is empty or longer than {SECRET_BYTES_MAX} bytes")
    return secret


def _check_address(name: str, address: str) -> str:
    """The host of host:port."""
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise Misconfigured(f"{name}: {address!r} is not host:port")
    return host


def _is_local(host: str) -> bool:
    """Whether the host is this machine, or a bare name as the containers of one compose network have."""
    host = host.strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return "." not in host
