"""Tokens and text: what comes out is what went in, whatever the seams."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library

from schemas.requests import Message, TextPart
from schemas.results import ErrorCode
from tests.tiny_tokenizer import save_byte_fallback, save_byte_level
from worker.errors import Misconfigured, RequestError
from worker.text import BYTES_PER_TOKEN_MAX, StopString, TextStream, Tokenizer, load_tokenizer

ROOM = 4096


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_byte_level(tmp_path_factory.mktemp("byte-level"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def fallback(tmp_path_factory):
    return load_tokenizer(save_byte_fallback(tmp_path_factory.mktemp("byte-fallback")))


def stream(tokenizer: Tokenizer, tokens, *stops: str, tokens_min: int = 0) -> tuple[list[str], bool]:
    """The pieces of text that the tokens make, up to a stop string, and whether there was one."""
    text = TextStream(tokenizer, [StopString(stop) for stop in stops], tokens_min)
    pieces = []
    for token in tokens:
        pieces.append(text.feed(token))
        if text.stopped:
            break
    return [*pieces, text.end()], text.stopped


def one_token_a_character(tokenizer: Tokenizer, text: str) -> list[int]:
    return [token for char in text for token in tokenizer.encode(char, ROOM)]


# ------------------------------------------------------------------------------------------------------------ encoding


def test_text_survives_encoding_and_decoding(tokenizer):
    for text in (
        "hello world",
        "über 日本語 😀",
        " leading and trailing ",
        "\n\n\ttabs",
        "\x00nul",
        "\u202eright to left",
    ):
        assert tokenizer.decode(tokenizer.encode(text, ROOM)) == text


def test_sentencepiece_tokens_with_byte_fallback_decode_to_their_text(fallback):
    assert fallback.decode(fallback.encode("hello 日本 world", ROOM)) == " hello 日本 world"


@given(tokens=st.lists(st.integers(0, 420), max_size=60))
@settings(max_examples=200, deadline=None)
def test_decoding_agrees_with_the_library_on_any_tokens(tokenizer, folder, tokens):
    library = Library.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.decode(tokens) == library.decode(tokens, skip_special_tokens=True)


def test_special_tokens_make_no_text_but_have_a_name(tokenizer):
    assert tokenizer.decode([1]) == ""
    assert tokenizer.token_bytes(1) == b"<|end|>"


def test_a_number_that_is_no_token_makes_no_text(tokenizer):
    assert tokenizer.decode([10**9, -1]) == ""


def test_a_chat_goes_through_the_models_template(tokenizer):
    chat = [
        Message(role="developer", content="be brief"),
        Message(role="user", content=[TextPart(text="a"), TextPart(text="b")]),
    ]
    tokens = tokenizer.encode_chat(chat, ROOM)
    assert tokenizer.decode(tokens) == "system\nbe brief\nuser\na\nb\nassistant\n"
    assert tokens.count(0) == 3  # a start token for each turn and for the answer


def test_what_the_template_refuses_is_the_requests_fault(tokenizer):
    with pytest.raises(RequestError, match="a chat begins with the user"):
        tokenizer.encode_chat([Message(role="assistant", content="secret")], ROOM)


def test_a_template_that_never_ends_is_stopped(tmp_path):
    endless = "{% for a in range(100000) %}{% for b in range(100000) %}{{ b }}{% endfor %}{% endfor %}"
    with pytest.raises(RequestError, match="does not take these messages"):
        load_tokenizer(save_byte_level(tmp_path, endless)).encode_chat([Message(role="user", content="secret")], ROOM)


def test_a_model_without_a_template_takes_no_chats(tmp_path):
    with pytest.raises(RequestError, match="/v1/completions"):
        load_tokenizer(save_byte_level(tmp_path, None)).encode_chat([Message(role="user", content="hi")], ROOM)


def test_braces_in_a_message_are_text_not_template(tokenizer):
    tokens = tokenizer.encode_chat([Message(role="user", content="{{ 7 * 7 }}{% raw %}")], ROOM)
    assert "{{ 7 * 7 }}{% raw %}" in tokenizer.decode(tokens)


def test_text_that_cannot_fit_is_refused_before_it_is_tokenised(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "_inner", None)  # any use of it would raise
    for text in ("a" * (8 * BYTES_PER_TOKEN_MAX + 1), "日" * (8 * BYTES_PER_TOKEN_MAX // 3 + 1)):
        with pytest.raises(RequestError) as refused:
            tokenizer.encode(text, tokens_max=8)
        assert refused.value.code == ErrorCode.CONTEXT_EXCEEDED


def test_a_prompt_of_more_tokens_than_there_is_room_is_refused(tokenizer):
    with pytest.raises(RequestError, match="5 tokens long; there is room for 4"):
        tokenizer.encode("@#@#@", tokens_max=4)


# ------------------------------------------------------------------------------------------------------------- loading


def test_a_template_in_a_file_of_its_own_comes_first(tmp_path):
    save_byte_level(tmp_path, "old")
    (tmp_path / "chat_template.jinja").write_text("new")
    assert load_tokenizer(tmp_path).encode_chat([Message(role="user", content="hi")], ROOM) == load_tokenizer(
        tmp_path
    ).encode("new", ROOM)


def test_of_several_named_templates_the_default_is_taken(tmp_path):
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]
    save_byte_level(tmp_path, named)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode_chat([Message(role="user", content="hi")], ROOM)) == "yes"


def test_end_tokens_come_from_the_generation_config_before_the_models(tmp_path):
    save_byte_level(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert load_tokenizer(tmp_path).eos_token_ids == {1}
    (tmp_path / "generation_config.json").unlink()
    assert load_tokenizer(tmp_path).eos_token_ids == {7}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"decoder": {"type": "WordPiece"}}'),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"chat_template": "{% for %}"}'),
        ("generation_config.json", '{"eos_token_id": "one"}'),
        ("tokenizer.json", "[" * 100_000),
    ],
)
def test_a_broken_model_folder_is_named_with_its_file(tmp_path, name, content):
    save_byte_level(tmp_path)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_text(content)
    with pytest.raises(Misconfigured, match=name):
        load_tokenizer(tmp_path)


def test_a_decoder_of_an_unknown_kind_is_refused_when_loading(tmp_path):
    save_byte_level(tmp_path)
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({**file, "decoder": {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True}})
    )
    with pytest.raises(Misconfigured, match="neither ByteLevel nor ByteFallback"):
        load_tokenizer(tmp_path)


# ----------------------------------------------------------------------------------------------------------- streaming


@given(tokens=st.lists(st.integers(0, 420), max_size=60))
@settings(max_examples=300, deadline=None)
def test_pieces_put_together_are_the_whole_text(tokenizer, tokens):
    pieces, _ = stream(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens)


def test_a_character_is_held_back_until_its_bytes_are_whole(tokenizer):
    tokens = [tokenizer._inner.token_to_id(name) for name in "ðŁĺĢ"]  # the four bytes of one emoji
    assert stream(tokenizer, tokens) == (["", "", "", "😀", ""], False)
    assert stream(tokenizer, tokens[:3]) == (["", "", "", "\ufffd"], False)


text_of_few_letters = st.text("ab ", max_size=40)
stops_of_few_letters = st.lists(st.text("ab ", min_size=1, max_size=5), min_size=1, max_size=4)


def first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The slow definition: the text before whichever stop string is complete first; of several, the longest."""
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, found))], True
    return text, False


@given(text=text_of_few_letters, stops=stops_of_few_letters)
@settings(max_examples=500, deadline=None)
def test_a_stop_string_is_found_at_any_seam(tokenizer, text, stops):
    expected = first_stop(text, stops)
    for tokens in (tokenizer.encode(text, ROOM), one_token_a_character(tokenizer, text)):
        pieces, stopped = stream(tokenizer, tokens, *stops)
        assert ("".join(pieces), stopped) == expected


@given(text=text_of_few_letters, stops=stops_of_few_letters)
@settings(max_examples=300, deadline=None)
def test_no_piece_ever_shows_a_part_of_the_stop_string_that_ends_the_text(tokenizer, text, stops):
    whole, stopped = first_stop(text, stops)
    shown = ""
    for piece in stream(tokenizer, one_token_a_character(tokenizer, text), *stops)[0]:
        shown += piece
        assert not stopped or whole.startswith(shown)


def test_only_what_may_begin_a_stop_string_is_held_back(tokenizer):
    pieces, stopped = stream(tokenizer, one_token_a_character(tokenizer, "xabaz"), "abc")
    assert pieces == ["x", "", "", "ab", "az", ""]
    assert not stopped


def test_a_held_back_beginning_comes_out_at_the_end(tokenizer):
    assert stream(tokenizer, one_token_a_character(tokenizer, "xab"), "abc") == (["x", "", "", "ab"], False)


def test_a_stop_string_counts_only_once_the_least_tokens_are_there(tokenizer):
    tokens = one_token_a_character(tokenizer, "a.b.c.")
    assert stream(tokenizer, tokens, ".", tokens_min=3) == (["a", ".", "b", "", ""], True)


def test_tokens_up_to_the_stop_string_are_counted(tokenizer):
    text = TextStream(tokenizer, [StopString("b")])
    for token in one_token_a_character(tokenizer, "ab"):
        text.feed(token)
    assert (text.stopped, text.num_tokens, text.num_chars) == (True, 2, 2)


def test_sixteen_long_stop_strings_take_microseconds_a_token(tokenizer):
    """The slowest texts for a stop search: all of one letter."""
    text = TextStream(tokenizer, [StopString("a" * 255 + "b") for _ in range(16)])
    tokens = one_token_a_character(tokenizer, "a") * 2000
    start = time.perf_counter()
    for token in tokens:
        text.feed(token)
    assert (time.perf_counter() - start) / len(tokens) < 1e-3  # 20 us here; a step takes milliseconds


def test_a_draft_model_must_call_the_same_tokens_by_the_same_numbers(tokenizer, tmp_path):
    folder = save_byte_level(tmp_path)
    tokenizer.check_same(load_tokenizer(folder), "the draft model")
    file = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = file["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(Misconfigured, match=r"token \d+ is b'[ab]' to the draft model and b'[ab]' to the model"):
        tokenizer.check_same(load_tokenizer(folder), "the draft model")
    (tmp_path / "other").mkdir()
    other = load_tokenizer(save_byte_fallback(tmp_path / "other"))
    with pytest.raises(Misconfigured, match=r"the draft model has \d+ tokens, the model \d+"):
        tokenizer.check_same(other, "the draft model")
