"""Chat templates that take more time or memory than a conversation needs, and what is as it was for honest ones."""

import signal
import threading

import pytest
from tiny_models import TEMPLATE, letters

from rewards import rendering
from rewards.rendering import OutOfBounds, Unrendered, rendered

ASKED = [{"role": "user", "content": "a b"}]
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLE = "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (LOOP, "more than 0.5 s of computing"),
        ("{{ 'a' * 10**10 }}", "more than 1 GiB of memory"),
        ("{{ ([0] * 10**9) | length }}", "more than 1 GiB of memory"),
        ("{{ '%9999999999s' % 'a' }}", "more than 1 GiB of memory"),
        ("{{ 'a' | center(10**10) }}", "more than 1 GiB of memory"),
        (DOUBLE, "more than"),
        ("{{ 'a' * 2**21 }}", "it writes 2,097,152 characters for one conversation, and 1,048,576 are the most"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "calls itself without end"),
    ],
)
def test_a_template_out_of_bounds_is_a_sentence(monkeypatch, template, said):
    for name, value in (("SECONDS", 0.5), ("ROOM", 2**30), ("LONGEST", 2**20)):
        monkeypatch.setattr(rendering, name, value)
    with pytest.raises(OutOfBounds, match=said):
        rendered(letters(template=template), ASKED)


def test_a_limit_that_the_shell_has_set_is_no_reason_to_set_none(monkeypatch):
    monkeypatch.setattr(rendering, "ROOM", 2**30)
    limits = rendering.resource.getrlimit(rendering.resource.RLIMIT_AS)
    rendering.resource.setrlimit(rendering.resource.RLIMIT_AS, (2**46, limits[1]))
    try:
        with pytest.raises(OutOfBounds, match="more than 1 GiB of memory"):
            rendered(letters(template="{{ ([0] * (3 * 10**8)) | length }}"), ASKED)
        assert rendering.resource.getrlimit(rendering.resource.RLIMIT_AS)[0] == 2**46
    finally:
        rendering.resource.setrlimit(rendering.resource.RLIMIT_AS, limits)


@pytest.mark.parametrize(
    "template",
    ["{{ 1 / 0 }}", "{% if %}", "{{ messages.__class__.__mro__ }}", "{{ nothing.at }}", "{{ raise_exception('no') }}"],
)
def test_whatever_a_template_raises_is_one_kind(template):
    with pytest.raises(Unrendered):
        rendered(letters(template=template), ASKED)


def test_an_honest_template_writes_what_transformers_writes_and_leaves_no_limit_behind():
    before = rendering.resource.getrlimit(rendering.resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    words = letters(template=TEMPLATE)
    expected = words.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    assert rendered(words, ASKED, add_generation_prompt=True) == expected
    found = []
    thread = threading.Thread(target=lambda: found.append(rendered(words, ASKED, add_generation_prompt=True)))
    thread.start()
    thread.join()
    assert found == [expected]
    assert before == (rendering.resource.getrlimit(rendering.resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM))
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
