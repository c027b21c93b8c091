"""The log: one clean record per event, without secrets, and never in the way."""

import io
import json
import logging
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiverse_gateway.observability.log_records import MAX_VALUE, clean, read_record
from multiverse_gateway.observability.logging import Logs, configure, note, redact
from multiverse_gateway.observability.redaction import MASK, Redactor
from multiverse_gateway.observability.writer import QUEUE_LENGTH, LogFile
from multiverse_gateway.settings import Settings
from support.sockets import wait_until

KEY = "an-admin-key-of-the-test"
LOG = logging.getLogger("multiverse_gateway.registry")


@attrs.define
class Written:
    """A configured log and the console it writes to."""

    logs: Logs
    console: io.StringIO

    def lines(self) -> list[str]:
        """Close, and return what was written."""
        self.logs.close()
        return self.console.getvalue().splitlines()


class Begin:
    """Configure logs and close them in the end."""

    def __init__(self) -> None:
        self.begun: list[Logs] = []

    def __call__(self, console: io.StringIO | None = None, *, outputs: bool = True, **settings: Any) -> Written:
        console = io.StringIO() if console is None else console
        logs = configure(Settings(**settings), console=console, outputs=outputs)
        self.begun.append(logs)
        return Written(logs, console)


@pytest.fixture
def begin() -> Iterator[Begin]:
    """Give a function that configures the log."""
    begin = Begin()
    yield begin
    for logs in begin.begun:
        logs.close()


def test_text_is_one_line_with_fields(begin: Begin) -> None:
    """Time, level, component, message, fields."""
    written = begin()
    LOG.info("server %s", "registered", extra={"fields": {"model": "tiny", "owner": "Ada Lovelace", "streaming": True, "reason": None}})
    (line,) = written.lines()
    assert line[10] == "T"
    assert line.endswith('+00:00 INFO     registry server registered model=tiny owner="Ada Lovelace" streaming=true')


def test_json_has_the_same_facts(begin: Begin) -> None:
    """A field cannot pass for one of ours."""
    written = begin(log_format="json")
    LOG.warning("server lost", extra={"fields": {"request_id": "r1", "level": "forged", "seconds": 0.5}})
    (line,) = written.lines()
    record = json.loads(line)
    assert record.pop("time").endswith("+00:00")
    assert record == {
        "level": "WARNING",
        "component": "registry",
        "message": "server lost",
        "request_id": "r1",
        "level_": "forged",
        "seconds": 0.5,
    }


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_nobody_forges_a_line(begin: Begin, log_format: str) -> None:
    """Line ends and terminal codes are escaped, in messages, fields and names of fields."""
    written = begin(log_format=log_format)
    LOG.info("one\ntwo\x1b[2J", extra={"fields": {"model": "a\r\nb\u2028c\u202ed", "na\nme": "\x00"}})
    (line,) = written.lines()
    assert line.isprintable()


def test_long_values_are_cut(begin: Begin) -> None:
    """At 256 characters."""
    written = begin(log_format="json")
    LOG.info("x", extra={"fields": {"long": "y" * 1000}})
    assert len(json.loads(written.lines()[0])["long"]) == MAX_VALUE


@pytest.mark.parametrize(
    "text",
    [
        KEY,
        f"x{KEY}y",
        "Authorization: Bearer abc.def-ghi",
        "key sk-abcdefgh1234",
        "x-api-key: abcdefgh1234",
        "https://user:abcdefgh@host/",
        "mvg-admin-abcdefghijklmnopqrst",
    ],
)
def test_secrets_are_taken_out(begin: Begin, text: str) -> None:
    """The settings' own, and what looks like a key, wherever it stands."""
    written = begin(admin_api_key=KEY)
    LOG.info(text, extra={"fields": {"value": text, "list": [text]}})
    (line,) = written.lines()
    assert line.count(MASK) == 3
    assert not [secret for secret in (KEY, "abc.def", "abcdefgh") if secret in line]


def test_a_secret_learnt_later_is_taken_out(begin: Begin) -> None:
    """A server's key is told to all logs of the process, also to those that begin after that."""
    first = begin()
    redact("backend-key-1")
    second = begin()
    redact(None)
    LOG.info("backend-key-1")
    for written in (first, second):
        assert [entry.message for entry in written.logs.tail.entries()] == [MASK]


def test_a_secret_is_not_cut_in_half() -> None:
    """Redaction comes before the cut."""
    redactor = Redactor()
    redactor.add(KEY)
    assert KEY[:8] not in clean("x" * (MAX_VALUE - 10) + KEY, redactor)


def test_short_secrets_do_not_black_out_words() -> None:
    """They would also tell what they are."""
    redactor = Redactor()
    redactor.add("a")
    assert redactor("banana") == "banana"


@given(st.text())
def test_any_text_comes_out_printable(text: str) -> None:
    """Whatever a client sent."""
    assert not [character for character in clean(text, Redactor()) if ord(character) < 32 or character in "\x7f\x85\u2028\u2029\u202e"]


def test_tracebacks_are_kept_and_redacted(begin: Begin) -> None:
    """With the lines of the source, without the key in the exception."""
    written = begin(admin_api_key=KEY)
    try:
        raise ValueError(f"bad {KEY}\nforged line")
    except ValueError:
        LOG.exception("it failed")
    lines = written.lines()
    assert "it failed" in lines[0]
    assert all(line.startswith("  | ") for line in lines[1:])
    assert any("test_tracebacks_are_kept_and_redacted" in line for line in lines)
    assert KEY not in "\n".join(lines)
    assert written.logs.tail.entries()[0].traceback is not None


def test_levels_are_obeyed(begin: Begin) -> None:
    """And set back in the end."""
    before = logging.getLogger("multiverse_gateway").level
    written = begin(log_level="WARNING")
    LOG.info("quiet")
    LOG.error("loud")
    assert len(written.lines()) == 1
    assert logging.getLogger("multiverse_gateway").level == before


def test_the_file_is_private_and_rotates(tmp_path: Path) -> None:
    """Only the owner may read it; older ones are kept beside it, whether lines come one by one or many at once."""
    path = tmp_path / "logs" / "gateway.log"
    file = LogFile(path, max_bytes=4096)
    for number in range(50):
        file.write([f"number={number} padding={'x' * 100}"])
    file.write(f"number={number} padding={'x' * 100}" for number in range(50, 100))
    file.close()
    files = list(path.parent.iterdir())
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert len(files) > 2
    assert all(file.stat().st_size <= 4096 for file in files)
    assert "number=99" in path.read_text()


def test_several_processes_write_one_file(tmp_path: Path) -> None:
    """Each line arrives whole, and what is full is put aside once, not by every process again."""
    script = (
        "import sys; from pathlib import Path; from multiverse_gateway.observability.writer import LogFile\n"
        "file = LogFile(Path(sys.argv[1]), max_bytes=40_000)\n"
        "for number in range(100): file.write([f'{sys.argv[2]} {number} {part} ' + 'x' * 80 for part in range(5)])\n"
    )
    path = tmp_path / "gateway.log"
    writers = [subprocess.Popen([sys.executable, "-c", script, str(path), str(number)]) for number in range(3)]
    assert [writer.wait(30) for writer in writers] == [0, 0, 0]
    files = sorted(tmp_path.iterdir())
    lines = [line for file in files for line in file.read_text().splitlines()]
    assert {len(line.split()) for line in lines} == {4}
    assert len(lines) == len(set(lines)) == 1500
    assert len(files) <= 5
    assert min(file.stat().st_size for file in files if file != path) > 20_000


def test_a_file_that_was_moved_away_is_made_anew(begin: Begin, tmp_path: Path) -> None:
    """As logrotate does it, and a person who deletes a file that is in use."""
    path = tmp_path / "gateway.log"
    begin(log_file=str(path))
    LOG.info("first")
    wait_until(lambda: "first" in path.read_text())
    path.rename(tmp_path / "old.log")
    LOG.info("second")
    wait_until(path.exists)
    wait_until(lambda: "second" in path.read_text())
    assert "second" not in (tmp_path / "old.log").read_text()


def test_a_full_disk_is_counted_and_stops_nothing(begin: Begin) -> None:
    """Records are dropped, the console still gets them."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    written = begin(log_file="/dev/full")
    LOG.info("record")
    assert len(written.lines()) == 1
    assert written.logs.dropped >= 1


class Stalled(io.StringIO):
    """A console that does not take anything until it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.go_on = threading.Event()

    def write(self, text: str) -> int:
        """Wait."""
        self.entered.set()
        self.go_on.wait(10)
        return super().write(text)


def test_a_stalled_console_drops_records_and_blocks_nobody(begin: Begin) -> None:
    """What does not fit is dropped, counted and told."""
    console = Stalled()
    written = begin(console)
    LOG.info("first")
    assert console.entered.wait(10)
    for _ in range(QUEUE_LENGTH + 50):
        LOG.info("more")
    assert written.logs.dropped == 50
    console.go_on.set()
    wait_until(lambda: "50 log records were dropped" in console.getvalue())


def test_the_tail_filters(begin: Begin) -> None:
    """By level, component, text, time and number; the newest first."""
    logs = begin(outputs=False, log_level="DEBUG").logs
    LOG.debug("small", extra={"fields": {"model": "Tiny"}})
    LOG.error("large")
    logging.getLogger("multiverse_gateway.health").info("other")
    tail = logs.tail
    assert [entry.message for entry in tail.entries()] == ["other", "large", "small"]
    assert [entry.message for entry in tail.entries(level="warning")] == ["large"]
    assert [entry.message for entry in tail.entries(component="health")] == ["other"]
    assert [entry.message for entry in tail.entries(text="tiny")] == ["small"]
    LOG.info("of alice", extra={"fields": {"client": "id-1"}})
    (of_alice,) = tail.entries(client="id-1")
    assert (of_alice.message, tail.entries(client="id"), tail.entries(client="")) == ("of alice", [], [])
    assert of_alice.as_text().endswith(" of alice client=id-1")
    assert of_alice.as_json()["client"] == "id-1"
    assert [entry.message for entry in tail.entries(limit=2)] == ["of alice", "other"]
    newest = tail.entries()[0]
    assert tail.entries(after=newest.number) == []
    assert tail.entries(since=newest.time + 1) == []
    shown = tail.select(level=None, component=None, text="tiny", since=None, limit=10)
    assert [(record["message"], record["model"]) for record in shown] == [("small", "Tiny")]
    with pytest.raises(ValueError, match="level must be one of"):
        tail.entries(level="loud")


def test_the_tail_is_bounded(begin: Begin) -> None:
    """Two thousand records."""
    logs = begin(outputs=False).logs
    for number in range(2100):
        LOG.info("record", extra={"fields": {"number": number}})
    entries = logs.tail.entries(limit=10_000)
    assert (len(entries), entries[-1].fields["number"]) == (2000, 100)


def test_outputs_are_not_doubled(begin: Begin) -> None:
    """A second configuration in the process writes nothing; it only has a tail."""
    first, second = begin(), begin()
    LOG.info("once")
    assert len(first.logs.tail.entries()) == len(second.logs.tail.entries()) == 1
    assert (len(second.lines()), len(first.lines())) == (0, 1)


def test_closing_twice_is_harmless(begin: Begin) -> None:
    """And nothing is written after it."""
    written = begin()
    written.logs.close()
    written.logs.close()
    LOG.warning("late")
    assert written.console.getvalue() == ""


def test_bad_arguments_do_not_raise() -> None:
    """A wrong format string costs the formatting only."""
    record = logging.LogRecord("multiverse_gateway.api", logging.INFO, __file__, 1, "%d servers", ("many",), None)
    assert read_record(record, Redactor()).message == "%d servers"


class Listening(logging.Handler):
    """A handler of somebody else's."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the record."""
        self.records.append(record)


@pytest.mark.parametrize("others", [False, True])
def test_a_note_is_logged_as_any_record_is(begin: Begin, monkeypatch: pytest.MonkeyPatch, others: bool) -> None:
    """The short way, where only we listen, writes what the long one does, which others hear too."""
    other = Listening()
    monkeypatch.setattr(logging.root, "handlers", [other] if others else [])
    written = begin(log_format="json", admin_api_key=KEY)
    note(LOG, "request finished", {"model": f"tiny\n{KEY}", "status": 200, "code": None}, time.time())
    assert [entry.fields["status"] for entry in written.logs.tail.entries()] == [200]
    (line,) = written.lines()
    record = json.loads(line)
    assert record.pop("time")
    assert record == {
        "level": "INFO",
        "component": "registry",
        "message": "request finished",
        "model": f"tiny\\n{MASK}",
        "status": 200,
        "code": None,
    }
    assert [record.getMessage() for record in other.records] == ["request finished"] * others


def test_a_note_reaches_who_took_our_place(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `logging.config.dictConfig` takes it from the handlers of a logger that it is told of."""
    other = Listening()
    monkeypatch.setattr(logging.root, "handlers", [])
    written = begin()
    monkeypatch.setattr(logging.getLogger("multiverse_gateway"), "handlers", [other])
    note(LOG, "request finished", {}, time.time())
    assert [record.getMessage() for record in other.records] == ["request finished"]
    assert not written.logs.tail.entries()
    monkeypatch.undo()


def test_filters_of_a_logger_hold_for_notes(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only we listen, too."""
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(LOG, "filters", [lambda record: "dull" not in record.msg])
    written = begin()
    note(LOG, "request finished", {}, time.time())
    note(LOG, "a dull request finished", {}, time.time())
    assert [entry.message for entry in written.logs.tail.entries()] == ["request finished"]


def test_a_second_gateway_in_the_process_has_its_secrets_kept_too(begin: Begin) -> None:
    """What it logs is written by the first one as well."""
    first = begin()
    begin(admin_api_key=KEY)
    LOG.info("a key", extra={"fields": {"key": f"<{KEY}>"}})
    assert first.logs.tail.entries()[0].fields == {"key": f"<{MASK}>"}
    assert not [line for line in first.lines() if KEY in line]


def test_nothing_is_lost_between_two_sleeps_of_the_writer(begin: Begin) -> None:
    """Several threads log while the writer falls asleep and wakes up: every record is written once."""
    written = begin(log_format="json")

    def log(name: str) -> None:
        for number in range(200):
            LOG.info("one of many", extra={"fields": {"name": f"{name}{number}"}})
            if number % 50 == 0:
                threading.Event().wait(0.03)

    threads = [threading.Thread(target=log, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = [json.loads(line)["name"] for line in written.lines()]
    assert sorted(names) == sorted(f"{name}{number}" for name in "abcd" for number in range(200))
