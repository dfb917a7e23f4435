"""Output equals the kept transcripts, and any cut of the bytes on the way gives the same."""

import golden
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex._fast.chat_events import ChatEvents
from cortex._fast.usage_scanner import UsageScanner

FILES = sorted(golden.FOLDER.glob("*.txt"))
CUTS = st.lists(st.integers(0, 1 << 20), max_size=8)


def test_transcripts_equal_the_golden_files() -> None:
    made = dict(golden.transcripts())
    assert {path.name for path in FILES} == {path.name for path in made}
    for path, text in made.items():
        assert path.read_bytes() == text, f"{path.name}: see python tests/support/golden.py"


def cut(data: bytes, places: list[int]) -> list[bytes]:
    at = sorted(place % (len(data) + 1) for place in places)
    return [data[start:end] for start, end in zip([0, *at], [*at, len(data)], strict=True)]


def stream_of(name: str) -> bytes:
    return (golden.FOLDER / name).read_bytes().partition(b"----\n")[0]


@pytest.mark.parametrize("name", [path.name for path in FILES])
@settings(max_examples=25)
@given(places=CUTS)
def test_a_gateway_passes_it_on_however_it_is_cut(name: str, places: list[int]) -> None:
    scanner, stream = UsageScanner(), stream_of(name)
    assert b"".join(scanner.feed(data) for data in cut(stream, places)) == stream
    assert scanner.failed is ("fail" in name)
    assert scanner.terminated or scanner.failed


@pytest.mark.parametrize("dialect", ["messages", "responses"])
@pytest.mark.parametrize("scenario", [name for name in golden.SCENARIOS if name not in golden.ONE_CHOICE])
@settings(max_examples=25)
@given(places=CUTS)
def test_a_chat_is_translated_into_it_however_it_is_cut(dialect: str, scenario: str, places: list[int]) -> None:
    make = golden.messages_stream if dialect == "messages" else golden.responses_stream
    whole, pieces = make(scenario), make(scenario)
    stream, reader, other = stream_of(f"chat-{scenario}.txt"), ChatEvents(), ChatEvents()
    translated = b"".join(pieces.sse_events(reader.feed(data)) for data in cut(stream, places))
    assert golden.timeless(translated) == golden.timeless(whole.sse_events(other.feed(stream)))
    if scenario != "fail":
        # The kept transcript, but for the counts, which a chat has at its end.
        kept = (golden.FOLDER / f"{dialect}-{scenario}.txt").read_bytes().partition(b"----\n")[2]
        answer = whole.whole()
        assert golden.timeless(golden.msgspec.json.format(answer, indent=1)) + b"\n" == kept
