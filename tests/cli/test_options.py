"""The options `-i` and `--metadata`, the parsing of their values, and what is written."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import typer

from promptlayer_exec._integration import duration
from promptlayer_exec.cli._options import read_inputs, read_metadata
from promptlayer_exec.cli._printing import preview, wrapped


class TestInputs:
    """`-i`."""

    @pytest.mark.parametrize(
        ("argument", "inputs"),
        [
            ("n=3", {"n": 3}),
            ("rows=[1, {}]", {"rows": [1, {}]}),
            ("flag=true", {"flag": True}),
            ("none=null", {"none": None}),
            ("big=123456789012345678901", {"big": 123456789012345678901}),
            ("name=Maria", {"name": "Maria"}),
            ("zip=01234", {"zip": "01234"}),
            ('zip="12345"', {"zip": "12345"}),
            ("formula=a=b@c\nd", {"formula": "a=b@c\nd"}),
            ("handle=@maria", {"handle": "@maria"}),
            ("empty=", {"empty": ""}),
            ("two words=é", {"two words": "é"}),
        ],
    )
    def test_key_and_value(
        self, argument: str, inputs: dict[str, Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A value is JSON, or text if it is not valid JSON; the key ends at the first `=`."""
        assert read_inputs([argument]) == inputs
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize("value", ["[1, 2", "{name: 3}", '"half'])
    def test_invalid_json(self, value: str, capsys: pytest.CaptureFixture[str]) -> None:
        """Invalid JSON is sent as text, with a warning that says where the mistake is."""
        assert read_inputs([f"x={value}"]) == {"x": value}
        err = capsys.readouterr().err
        assert err.startswith("warning: the value of 'x' looks like JSON but is not valid")
        assert "line 1 column" in err

    def test_files(self, tmp_path: Path) -> None:
        """`KEY@FILE` is the whole text of a file, and `@FILE` a JSON object of inputs."""
        text = tmp_path / "a=b@c.txt"
        text.write_bytes(b"\xef\xbb\xbf[1]\r\n")
        inputs = tmp_path / "inputs.json"
        inputs.write_text('{"n": 3, "letter": "\u65e5"}', encoding="utf-8")
        assert read_inputs([f"letter@{text}"]) == {"letter": "[1]\r\n"}
        assert read_inputs([f"@{inputs}"]) == {"n": 3, "letter": "日"}

    def test_the_last_value_of_a_key_wins(self, tmp_path: Path) -> None:
        """Inputs override those of an earlier file, and a file overrides earlier inputs."""
        path = tmp_path / "inputs.json"
        path.write_text('{"a": 1, "b": 1}')
        assert read_inputs(["a=0", "c=0", f"@{path}", "b=2"]) == {"a": 1, "b": 2, "c": 0}

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["letter"], "'letter' is not KEY=VALUE, KEY@FILE or @FILE"),
            (["=3"], "'=3' is not KEY=VALUE"),
            (["@/no/such/file"], "cannot read '/no/such/file': No such file or directory"),
            (["@"], "cannot read '': Is a directory"),
        ],
    )
    def test_errors(self, arguments: list[str], message: str) -> None:
        """An invalid argument is refused with the reason."""
        with pytest.raises(typer.BadParameter) as caught:
            read_inputs(arguments)
        assert message in caught.value.message
        assert caught.value.param_hint == "'--input'"

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b'{"a": 1,\n "b" 2}', "is not valid JSON: Expecting ':' delimiter: line 2 column 6"),
            (b"", "is not valid JSON: Expecting value: line 1 column 1"),
            (b"[1]", 'must contain a JSON object like {"name": "Maria"}, not \'[1]\''),
            (b'{"a": "\xff"}', "is not UTF-8 text: byte 8 is invalid"),
        ],
    )
    def test_errors_in_files(self, content: bytes, message: str, tmp_path: Path) -> None:
        """A file without a JSON object is refused with its name and the position."""
        path = tmp_path / "x.json"
        path.write_bytes(content)
        with pytest.raises(typer.BadParameter) as caught:
            read_inputs([f"@{path}"])
        assert "x.json'" in caught.value.message
        assert message in caught.value.message


class TestMetadata:
    """`--metadata`."""

    def test_strings(self) -> None:
        """Every value is text; the last value of a key wins."""
        assert read_metadata(["run=7", "a=b=@c", "run=8"]) == {"run": "8", "a": "b=@c"}


class TestText:
    """What commands write."""

    def test_preview_of_large_values(self) -> None:
        """The preview of a large or deep value is one short line, made without the rest of it."""
        deep: list[Any] = []
        for _ in range(100_000):
            deep = [deep]
        values = ("x" * 10**7, list(range(10**6)), deep)
        tracemalloc.start()
        previews = [preview(value) for value in values]
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 10**6
        assert [len(text) for text in previews] == [200, 200, 200]
        assert [text[:3] + text[-1] for text in previews] == ['"xx…', "[0,…", "[[[…"]

    def test_lines_are_wrapped_between_words(self) -> None:
        """An indented line and a command in backticks stay whole, so that they can be copied."""
        command = "  promptlayer-exec watch 787 --base-url http://localhost:8787"
        text = f"a first-rate reason; see `run it` or `run this`\n\n{command}"
        lines = ["a first-rate", "reason; see", "`run it` or", "`run this`", "", command]
        assert wrapped(text, 14).split("\n") == lines
        assert wrapped("  why: it failed", 14, hanging="    ") == "  why: it\n    failed"

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [
            (0, "<0.1 s"),
            (0.05, "0.1 s"),
            (59.94, "59.9 s"),
            (59.96, "1 min 00 s"),
            (3600, "1 h 00 min"),
        ],
    )
    def test_duration(self, seconds: float, text: str) -> None:
        """Durations are written in seconds, minutes or hours."""
        assert duration(seconds) == text
