"""Texts that are not UTF-8: read if they say what they are, refused with a guess if they do not."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lorsa.errors import HarvestError
from lorsa.harvest.corpus.corpus import open_corpus
from lorsa.harvest.corpus.encodings import guess_encoding

TEXTS = {
    ("gbk", "GB18030"): "我们今天去学校学习语言和数学。这个国家的历史很长。",
    ("big5", "BIG5"): "我們今天去學校學習語言和數學。這個國家的歷史很長。",
    ("shift_jis", "SHIFT_JIS"): "今日は学校へ行って、言葉と数学を勉強しました。",
    ("euc_jp", "EUC-JP"): "今日は学校へ行って、言葉と数学を勉強しました。",
    ("cp949", "EUC-KR"): "오늘은 학교에 가서 언어와 수학을 공부했습니다.",
    ("cp1251", "WINDOWS-1251"): "Сегодня мы пошли в школу и изучали язык.",
    ("koi8_r", "KOI8-R"): "Сегодня мы пошли в школу и изучали язык.",
    ("cp1253", "WINDOWS-1253"): "Σήμερα πήγαμε στο σχολείο και μάθαμε γλώσσα.",
    ("cp1255", "WINDOWS-1255"): "היום הלכנו לבית הספר ולמדנו שפה.",
    ("cp1256", "WINDOWS-1256"): "ذهبنا اليوم إلى المدرسة وتعلمنا اللغة.",
    ("tis_620", "TIS-620"): "วันนี้เราไปโรงเรียนและเรียนภาษา",
    ("cp1250", "WINDOWS-1250"): "Příliš žluťoučký kůň úpěl ďábelské ódy a učil se.",
}


@pytest.mark.parametrize(("codec", "name"), TEXTS)
def test_a_text_in_another_encoding_is_refused(tmp_path: Path, codec: str, name: str) -> None:
    """A text in GBK was harvested as U+FFFD, nine of ten characters, and called repaired."""
    (tmp_path / "a.txt").write_bytes(40 * TEXTS[codec, name].encode(codec))
    found = open_corpus(str(tmp_path))
    message = f"a.txt is no text in UTF-8, looks like {name}: iconv -f {name} -t UTF-8"
    with pytest.raises(HarvestError, match=message):
        list(found.documents())
    (tmp_path / "b.txt").write_text(TEXTS[codec, name], "utf-8")
    found = open_corpus(str(tmp_path))
    assert [doc.name for doc in found.documents()] == ["b.txt"]
    assert str(found.counts) == (
        f"passed over: 1 text that is not UTF-8 (a.txt, looks like {name})"
    )
    assert found.counts.warning() == "passed over: 1 of 2 texts read"


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_rows_in_another_encoding_are_refused(tmp_path: Path, name: str) -> None:
    """Short rows, and rows of tables, were taken as U+FFFD as well; an endless file is not read."""
    value = "мы пошли".encode("cp1251")
    if name == "a.parquet":
        pq.write_table(pa.table({"text": pa.array([value] * 600, pa.binary())}), tmp_path / name)
    else:
        row = b'{"text": "%s"}\n' if name == "a.jsonl" else b"%s,1\n"
        head = b"" if name == "a.jsonl" else b"text,n\n"
        (tmp_path / name).write_bytes(head + row % value * 600)
    found = open_corpus(str(tmp_path / name))
    with pytest.raises(HarvestError, match=rf"{name}:0 is no text .* WINDOWS-1251"):
        list(found.documents())
    assert found.counts["garbled_documents"] == 256


def test_a_text_of_replacement_characters_is_refused(tmp_path: Path) -> None:
    """A text that was decoded wrongly before is valid UTF-8, and no text."""
    (tmp_path / "a.txt").write_text("\ufffd\ufffd \ufffd\ufffd\ufffd " * 9, "utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "\ud83d" * 9}))
    for name in ("a.txt", "b.jsonl"):
        with pytest.raises(HarvestError, match="is no text in UTF-8: convert it, or give another"):
            list(open_corpus(str(tmp_path / name)).documents())


def test_a_few_bad_bytes_are_repaired(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(("plain words " * 20).encode() + b"\xe9\xe8\xe0")
    found = open_corpus(str(tmp_path / "a.txt"))
    assert [doc.text[-3:] for doc in found.documents()] == ["\ufffd" * 3]
    assert found.counts.to_dict() == {"repaired_documents": 1}


@pytest.mark.parametrize("codec", ["utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-8-sig"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_utf16_and_utf32_are_read(tmp_path: Path, name: str, codec: str) -> None:
    """What Windows calls Unicode was 'no text', for its NUL bytes."""
    text = "caf\u00e9, said the \u732b"
    whole = {"a.txt": text, "a.jsonl": f'{{"text": "{text}"}}\n', "a.csv": f'text,n\n"{text}",1\n'}
    (tmp_path / name).write_bytes(whole[name].encode(codec))
    found = open_corpus(str(tmp_path / name))
    assert [doc.text for doc in found.documents()] == [text]
    assert found.counts.to_dict() == ({} if codec == "utf-8-sig" else {"converted_files": 1})


def test_what_is_no_text_has_no_encoding() -> None:
    assert guess_encoding(b"plain ASCII") is None
    assert guess_encoding(b"") is None
    assert guess_encoding(bytes(range(256)) * 20) is None
    assert guess_encoding("ab \u00e9\u00e8 \u0436\u4e16\uac00".encode()) is None
    assert guess_encoding(random.Random(0).randbytes(5000)) is None
