"""Secrets in what a server answers."""

import base64
import html
import json
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
from chat_stub import Answer, Stub, says
from lorsa.analyze.explain.chat import Chat
from lorsa.analyze.explain.config import ExplainConfig
from lorsa.analyze.explain.endpoint import EndpointError, url_secrets
from lorsa.analyze.explain.explain import explain
from lorsa.analyze.explain.secrets import CUT, Secrets

from reading import make_analysis

KEY = "sk-Secret/0123_456+789="


def _each(spelled: Callable[[str], str]) -> str:
    return "".join(spelled(char) for char in KEY)


SPELLINGS = {
    "plain": KEY,
    "JSON": _each(lambda c: f"\\u{ord(c):04x}"),
    "JSON, capital": _each(lambda c: f"\\u{ord(c):04X}"),
    "JSON, some": KEY.replace("S", "\\u0053"),
    "JSON in JSON": _each(lambda c: f"\\\\\\u{ord(c):04x}"),
    "JSON, slash": KEY.replace("/", "\\/"),
    "Python": _each(lambda c: f"\\x{ord(c):02x}"),
    "URL": quote(KEY, safe=""),
    "URL, all": _each(lambda c: f"%{ord(c):02X}"),
    "URL in URL": quote(quote(KEY, safe=""), safe=""),
    "HTML": _each(lambda c: f"&#{ord(c)};"),
    "HTML, hexadecimal": _each(lambda c: f"&#x{ord(c):x};"),
    "HTML in HTML": html.escape(_each(lambda c: f"&#x{ord(c):X};")),
    "apart": "\u200b".join(KEY),
    "apart in JSON": "\\u200b".join(KEY),
    "in lines": "\n".join(KEY),
    "hexadecimal": KEY.encode().hex(),
}


@pytest.mark.parametrize("spelled", SPELLINGS.values(), ids=SPELLINGS)
def test_a_secret_is_cut_out_in_any_spelling(spelled: str) -> None:
    """Only the plain key was looked for, so an escaped one was decoded, written and printed."""
    assert Secrets([KEY]).cut(f"is it {spelled}, or") == f"is it {CUT}, or"


@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
@pytest.mark.parametrize("before", ["", "a", "ab", "Bearer "])
def test_a_secret_in_base64_is_cut_out(encode: Callable[[bytes], bytes], before: str) -> None:
    """A character at either end, which something else has a part in, may stay."""
    text = encode(f"{before}{KEY}!".encode()).decode()
    left = Secrets([KEY]).cut(text)
    assert CUT in left
    assert len(left.replace(CUT, "")) <= len(encode(before.encode())) + 4


def test_other_texts_are_left_alone() -> None:
    text = 'reads \\u0073k- and %73k, sk-Secret/0123 and {"a": "\\n"}'
    assert Secrets([KEY]).cut(text) == text
    assert Secrets([]).cut(text) == text


@pytest.mark.parametrize("text", ["\\" * 10**6, "%25" * 10**5, "s " * 10**5, "\\u0073" * 10**5])
def test_hostile_texts_take_no_time_that_grows_faster(text: str) -> None:
    """It ends: without bounds, the first would take hours."""
    assert Secrets(["ssssssss-secret"]).cut(text) == text


@pytest.mark.parametrize("spelled", SPELLINGS.values(), ids=SPELLINGS)
def test_no_spelling_reaches_a_file_or_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelled: str
) -> None:
    """In an explanation, in a refusal and in one that is cut to a length."""
    monkeypatch.setenv("LORSA_API_KEY", KEY)
    make_analysis(tmp_path / "analysis")
    raw = spelled.replace("\n", "\\n")
    with Stub() as stub:
        config = ExplainConfig(run=tmp_path, endpoint=stub.url, model="m", heads="2,5,7")
        inner = f'{{"explanation": "it is {raw} here", "fires": []}}'
        stub.answer = lambda _: says(inner)
        explain(config)
        stub.answer = lambda _: Answer(f'{{"error": {{"message": "{"x" * 120} {raw}"}}}}', 401)
        with pytest.raises(EndpointError) as error:
            explain(ExplainConfig(run=tmp_path, endpoint=stub.url, model="m", heads="1,3"))
    written = (tmp_path / "analysis" / "explanations.jsonl").read_text()
    for text in (written, json.dumps(str(error.value)), str(error.value)):
        assert KEY not in text
        assert spelled not in text
        assert KEY[:8] not in text
    assert CUT in written


def test_a_status_line_with_the_key_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that is no HTTP was printed as it came."""
    monkeypatch.setenv("LORSA_API_KEY", KEY)
    with Stub() as stub:
        monkeypatch.setattr(
            stub.RequestHandlerClass,
            "do_POST",
            lambda handler: handler.wfile.write(f"no {KEY} here\r\n\r\n".encode()),
        )
        with pytest.raises(EndpointError) as error:
            Chat(stub.url, "m", max_tokens=9, timeout_s=20).ask("a")
    assert KEY not in str(error.value)
    assert CUT in str(error.value)


def test_a_key_in_a_url_is_a_secret_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that tells which URL was asked had its query printed."""
    monkeypatch.setenv("LORSA_API_KEY", "")
    url = "http://h/v1?api-key=a%2Bbcdefgh&api-version=2024-02-01&token="
    assert url_secrets(url) == ["a+bcdefgh"]
    with Stub() as stub:
        stub.answer = lambda _: Answer("no /v1?api-key=a%2Bbcdefgh", 404)
        with pytest.raises(EndpointError) as error:
            Chat(f"{stub.url}?api-key=a%2Bbcdefgh", "m", max_tokens=9, timeout_s=20).ask("a")
    assert "bcdefgh" not in str(error.value)
