"""What a kill leaves of a journal is all of its whole lines."""

import pytest

from align.rollout.journal import Journal, read_lines


def lines(*names):
    return [{"id": name, "text": f"{name}\n\u2028\u00e9"} for name in names]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.jsonl"


def test_lines_come_out_in_the_order_asked_for(path):
    journal = Journal(path)
    journal.append(lines("b", "a"))
    journal.append(lines("c"))
    assert not journal.whole
    journal.finish(["a", "b", "c"])
    assert list(read_lines(path)) == lines("a", "b", "c")
    assert [file.name for file in path.parent.iterdir()] == ["rows.jsonl"]
    assert Journal(path).whole and list(Journal(path).lines) == ["a", "b", "c"]


def test_a_cut_line_is_written_again_and_no_other(path):
    journal = Journal(path)
    journal.append(lines("a", "b"))
    content = journal.partial.read_bytes()
    for size in range(len(content)):
        journal.partial.write_bytes(content[:size])
        again = Journal(path)
        left = [name for name in ("a", "b") if name not in again.lines]
        assert len(left) == 2 - content[:size].count(b"\n")
        again.append(lines(*left))
        assert sorted(line["id"] for line in read_lines(again.partial)) == ["a", "b"]
        assert list(Journal(path).lines.values()) == lines("a", "b")


def test_a_kill_between_the_last_two_steps_of_finish(path):
    journal = Journal(path)
    journal.append(lines("a"))
    partial = journal.partial.read_bytes()
    journal.finish(["a"])
    journal.partial.write_bytes(partial)
    assert Journal(path).whole and not journal.partial.exists()
