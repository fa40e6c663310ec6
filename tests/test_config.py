"""Settings: where they come from, what is refused, and that secrets stay in their files."""

import json
import tomllib
from dataclasses import fields, replace
from pathlib import Path

import pytest

import engine.config
from worker import start
from worker.cli import main
from worker.config import Engine, Kafka, Security, Settings, Topics, read_secret
from worker.errors import Misconfigured
from worker.folders import model_folder
from worker.setting_sources import as_flags, flat, setting_names, unknown_variables

EXIT_CONFIG = Misconfigured.exit_code


@pytest.fixture(autouse=True)
def bare(tmp_path, monkeypatch):
    """No settings but those that a test gives."""
    monkeypatch.chdir(tmp_path)
    for name in ("TOKENMILL_BROKERS", "TOKENMILL_CONFIG"):
        monkeypatch.delenv(name, raising=False)


def shown(capsys, *flags: str) -> dict[str, object]:
    assert main(["config", "show", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments: str) -> str:
    """What is said, in one line, of a command line that fails."""
    assert main(list(arguments)) != 0
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


class TestWhereSettingsComeFrom:
    def test_a_flag_wins_over_a_variable_and_that_over_the_file_and_that_over_the_default(
        self, capsys, monkeypatch, tmp_path
    ):
        name, flag = "engine.block_size", "--engine.block-size"
        assert shown(capsys)[name] == 16
        (tmp_path / "tokenmill.toml").write_text("[engine]\nblock_size = 32\n")
        assert shown(capsys)[name] == 32
        monkeypatch.setenv("TOKENMILL_ENGINE_BLOCK_SIZE", "64")
        assert shown(capsys)[name] == 64
        assert shown(capsys, flag, "128")[name] == 128

    def test_the_brokers_are_a_flag_a_variable_and_a_line_like_any_setting(self, capsys, monkeypatch, tmp_path):
        (tmp_path / "tokenmill.toml").write_text('brokers = "localhost:1"\n')
        assert shown(capsys)["brokers"] == "localhost:1"
        monkeypatch.setenv("TOKENMILL_BROKERS", "localhost:2")
        assert shown(capsys)["brokers"] == "localhost:2"
        assert shown(capsys, "--brokers", "localhost:3")["brokers"] == "localhost:3"

    def test_another_file_is_named_by_flag_or_variable(self, capsys, monkeypatch, tmp_path):
        (tmp_path / "other.toml").write_text('group = "others"\n')
        assert shown(capsys, "--config", "other.toml")["group"] == "others"
        monkeypatch.setenv("TOKENMILL_CONFIG", "other.toml")
        assert shown(capsys)["group"] == "others"

    def test_every_setting_is_reachable_by_its_flag(self, capsys):
        values = {**shown(capsys), "security.insecure": True, "model": "m", "worker": "w", "security.username": "u"}
        values |= {"security.password_file": "p", "security.ca_file": "c", "bill.price_book": "b"}
        assert values.keys() == setting_names()
        assert shown(capsys, *as_flags(values)) == values

    def test_what_is_shown_is_a_file_that_gives_the_same_settings(self, capsys, tmp_path):
        flags = ["--drain-s", "3.5", "--bill.events", "request", "--security.insecure", "--engine.threads", "2"]
        expected = shown(capsys, *flags)
        assert main(["config", "show", *flags]) == 0
        (tmp_path / "again.toml").write_text(capsys.readouterr().out)
        assert shown(capsys, "--config", "again.toml") == expected

    def test_the_engine_section_has_names_of_the_engines_own_settings(self):
        ours = {field.name for field in fields(Engine)}
        assert ours <= {field.name for field in fields(engine.config.EngineConfig)}
        engine.config.EngineConfig(**dict(flat(Engine())))  # and the defaults fit each other

    def test_every_setting_reaches_the_engine(self, monkeypatch, tmp_path):
        reached: list[engine.config.EngineConfig] = []
        monkeypatch.setattr(start, "build", lambda config, _folder: reached.append(config))
        changed = Engine(
            device="cuda:1",
            weights="int8",
            cache="fp8",
            threads=3,
            block_size=32,
            cache_tokens=64,
            cache_memory_share=0.25,
            context_max=48,
            tokens_per_step_max=256,
            sequences_max=8,
            drafts_max=2,
            overlap="off",
            graphs="off",
            draft_experts=2,
        )
        (tmp_path / "config.json").touch()
        with_model = replace(changed, draft_experts=0, draft_model=str(tmp_path), draft_weights="int4")
        with_heads = replace(changed, draft_experts=0, draft_heads=True)
        with_ranks = replace(changed, draft_experts=0, ranks=2, experts="whole")  # for which no model drafts
        each = (changed, with_model, with_heads, with_ranks)
        for settings in each:
            start._build(settings, Path())
        for name, default in flat(Engine()):
            asked = [getattr(settings, name) for settings in each]
            assert asked != [default] * len(each), f"{name} is not tested"
            assert [str(getattr(one, name) or "") for one in reached] == [str(one or "") for one in asked]


class TestWhatIsRefused:
    def test_an_unknown_key_is_refused_with_the_files_name_and_the_nearest_setting(self, capsys, tmp_path):
        (tmp_path / "tokenmill.toml").write_text("[engine]\nblok_size = 32\n")
        said = refused(capsys, "config", "show")
        assert "tokenmill.toml: engine.blok_size is no setting" in said
        assert "engine.block_size" in said

    def test_the_whole_file_is_checked_whatever_part_of_it_the_command_takes(self, capsys, tmp_path):
        (tmp_path / "tokenmill.toml").write_text("[engine]\nblok_size = 32\n")
        assert main(["topics", "list"]) == EXIT_CONFIG

    @pytest.mark.parametrize("content", ["brokers = ", "\x00", "a" * (2 << 20)], ids=["cut off", "binary", "too long"])
    def test_a_file_that_is_none_is_refused_by_name(self, capsys, tmp_path, content):
        (tmp_path / "tokenmill.toml").write_text(content)
        assert "tokenmill.toml" in refused(capsys, "config", "show")

    def test_a_file_that_is_named_and_missing_is_refused(self, capsys):
        assert "cannot read nowhere.toml" in refused(capsys, "config", "show", "--config", "nowhere.toml")

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("engine.block_size", "0"),
            ("engine.block_size", "sixteen"),
            ("engine.cache_memory_share", "nan"),
            ("flush_interval_ms", "-1"),
            ("health.port", "65536"),
            ("drain_s", "inf"),
            ("log.level", "loud"),
            ("bill.device_rate", "1e3"),
            ("bill.device_rate", "-1"),
            ("topics.prefix", "no spaces"),
            ("brokers", "kafka"),
            ("brokers", "kafka:99999"),
            ("limits.output_tokens_default", "4097"),
            ("security.protocol", "none"),
        ],
    )
    def test_a_value_that_cannot_be_meant_is_refused_wherever_it_comes_from(
        self, capsys, monkeypatch, tmp_path, name, value
    ):
        key = name.rpartition(".")[2]
        assert key.replace("_", "-") in refused(capsys, "config", "show", f"--{name.replace('_', '-')}", value).replace(
            "_", "-"
        )
        variable = "TOKENMILL_" + name.upper().replace(".", "_")
        monkeypatch.setenv(variable, value)
        refused(capsys, "config", "show")
        monkeypatch.delenv(variable)
        table, _, key = name.rpartition(".")
        (tmp_path / "tokenmill.toml").write_text(f'{f"[{table}]" if table else ""}\n{key} = "{value}"\n')
        refused(capsys, "config", "show")

    def test_an_unencrypted_connection_leaves_the_machine_only_where_that_is_said(self):
        for brokers in (
            "127.0.0.1:9092",
            "localhost:9092",
            "[::1]:9092",
            "kafka:9092",
        ):  # the last: one compose network
            Kafka(brokers=brokers)
        for brokers in ("kafka.example.com:9092", "10.0.0.1:9092", "localhost:9092,10.0.0.1:9092"):
            with pytest.raises(Misconfigured, match=r"security\.insecure"):
                Kafka(brokers=brokers)
            Kafka(brokers=brokers, security=Security(insecure=True))
            Kafka(brokers=brokers, security=Security(protocol="SSL"))

    def test_a_login_needs_a_name_and_a_password(self, capsys):
        for flags in ([], ["--security.username", "u"], ["--security.password-file", "f"]):
            said = refused(capsys, "config", "show", "--security.protocol", "SASL_SSL", *flags)
            assert "security.password_file" in said

    def test_variables_that_look_like_settings_and_are_none_are_named_by_the_check(self, capsys, monkeypatch):
        monkeypatch.setenv("TOKENMILL_ENGINE_BLOK_SIZE", "1")
        main(["config", "check"])
        assert "TOKENMILL_ENGINE_BLOK_SIZE" in capsys.readouterr().out
        assert unknown_variables({"TOKENMILL_GROUP": "g", "TOKENMILL_CONFIG": "f", "HOME": "/"}) == []

    def test_the_check_names_every_fault_at_once_and_fails(self, capsys, tmp_path):
        (tmp_path / "book.toml").write_text("")
        flags = ["--bill.price-book", "book.toml", "--model", "nothing", "--security.protocol", "SASL_SSL"]
        flags += ["--security.username", "u", "--security.password-file", "nowhere"]
        assert main(["config", "check", "--json", *flags]) == EXIT_CONFIG
        assert len(json.loads(capsys.readouterr().out)["faults"]) == 3


class TestSecrets:
    def test_a_password_is_read_from_its_file_and_shown_nowhere(self, capsys, tmp_path):
        (tmp_path / "password").write_text("open sesame\n")
        flags = ["--security.protocol", "SASL_SSL", "--security.username", "u", "--security.password-file", "password"]
        for command in ("show", "check"):
            main(["config", command, *flags])
            assert "sesame" not in "".join(capsys.readouterr())
        kafka = Kafka(security=Security(protocol="SASL_SSL", username="u", password_file=tmp_path / "password"))
        assert kafka.client().sasl_password == "open sesame"

    def test_a_password_in_the_settings_file_is_refused_and_not_repeated(self, capsys, tmp_path):
        (tmp_path / "tokenmill.toml").write_text('[security]\npassword = "open sesame"\n')
        said = refused(capsys, "config", "show")
        assert "security.password_file" in said
        assert "sesame" not in said

    @pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe", b"x" * (65 << 10)])
    def test_a_file_that_holds_no_secret_is_refused_by_name_and_not_quoted(self, tmp_path, content):
        (tmp_path / "secret").write_bytes(content)
        with pytest.raises(Misconfigured, match="secret") as refusal:
            read_secret(tmp_path / "secret")
        assert "xxx" not in str(refusal.value)

    def test_redaction_hides_addresses_names_and_paths(self, capsys):
        flags = ["--brokers", "db1:9092", "--worker", "ann", "--security.username", "bob", "--security.ca-file", "/k"]
        assert main(["config", "show", "--redacted", *flags]) == 0
        text = capsys.readouterr().out
        assert not {value for value in ("db1", "ann", "bob", "/k") if f'"{value}' in text}
        assert tomllib.loads(text)["engine"]["block_size"] == 16


class TestModels:
    def test_a_model_is_found_by_name_among_the_fetched_or_by_its_path(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        for folder in (tmp_path / "cache/tokenmill/models/small", tmp_path / "mine"):
            folder.mkdir(parents=True)
            (folder / "config.json").write_text("{}")
        assert model_folder("small") == tmp_path / "cache/tokenmill/models/small"
        assert model_folder("mine") == tmp_path / "mine"

    @pytest.mark.parametrize("model", ["", "absent"])
    def test_a_model_that_is_not_there_is_refused_with_what_to_do(self, model):
        with pytest.raises(Misconfigured, match="smollm2-moe"):
            model_folder(model)


def test_all_topics_share_the_prefix_and_differ():
    names = Topics(prefix="a.b").by_setting.values()
    assert all(name.startswith("a.b.") for name in names)
    assert len(set(names)) == 7


def test_settings_are_values():
    assert Settings() == Settings()
    assert Path("x") not in {value for _, value in flat(Settings())}
