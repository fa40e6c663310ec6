"""Kafka's settings are refused where they cannot be meant, and become what aiokafka takes."""

import pytest

from worker.brokers.kafka_settings import KafkaSettings
from worker.errors import Misconfigured


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"brokers": "localhost"}, "host:port"),
        ({"brokers": "a:1,,b:2"}, "host:port"),
        ({"security_protocol": "TLS"}, "SASL_SSL"),
        ({"security_protocol": "SASL_SSL"}, "user name and a password"),
        (
            {
                "security_protocol": "SASL_SSL",
                "sasl_mechanism": "GSSAPI",
                "sasl_username": "me",
                "sasl_password": "secret",
            },
            "SCRAM-SHA-512",
        ),
        ({"transaction_version": 1}, "transaction version 1"),
        ({"session_timeout_s": 6, "heartbeat_s": 3}, "three heartbeats"),
        ({"worker": ""}, "a name"),
    ],
)
def test_what_cannot_be_meant_is_refused(change, message):
    with pytest.raises(Misconfigured, match=message):
        KafkaSettings(**{"brokers": "localhost:9092", **change})


def test_an_authority_file_that_is_none_is_named(tmp_path):
    file = tmp_path / "ca.pem"
    with pytest.raises(Misconfigured, match=r"ca\.pem: no such file"):
        KafkaSettings(brokers="localhost:9092", security_protocol="SSL", ssl_cafile=file)
    file.write_text("no certificate")
    with pytest.raises(Misconfigured, match=r"ca\.pem"):
        KafkaSettings(brokers="localhost:9092", security_protocol="SSL", ssl_cafile=file).client_options()


def test_the_transactional_id_is_the_same_for_every_life_of_a_worker():
    settings = KafkaSettings(brokers="localhost:9092", group="mill", worker="pod-3")
    assert settings.transactional_id == "mill/pod-3"
    assert settings.transactional_id.startswith(settings.transactional_id_prefix)


def test_no_group_has_a_right_to_the_transactions_of_one_whose_name_begins_like_its_own():
    mill = KafkaSettings(brokers="localhost:9092", group="mill")
    other = KafkaSettings(brokers="localhost:9092", group="mill-eu")
    assert not other.transactional_id.startswith(mill.transactional_id_prefix)
    with pytest.raises(Misconfigured, match="slash"):
        KafkaSettings(brokers="localhost:9092", group="mill/eu")


def test_only_with_tls_is_there_a_context():
    plain = KafkaSettings(
        brokers="localhost:9092", security_protocol="SASL_PLAINTEXT", sasl_username="me", sasl_password="secret"
    ).client_options()
    secure = KafkaSettings(
        brokers="localhost:9092", security_protocol="SASL_SSL", sasl_username="me", sasl_password="secret"
    ).client_options()
    assert plain["ssl_context"] is None
    assert secure["ssl_context"] is not None
    assert secure["sasl_mechanism"] == "SCRAM-SHA-512"


def test_the_password_is_not_shown():
    assert "secret" not in repr(KafkaSettings(brokers="localhost:9092", sasl_password="secret"))
