"""tests/campaign.py for a few seconds, and that it finds what it is to find."""

import itertools

import campaign
import pytest


@pytest.fixture(scope="module", autouse=True)
def place(corpus, tmp_path_factory):
    """What the attacks begin with, of the suite's own corpus: a campaign makes its own."""
    folder = tmp_path_factory.mktemp("campaign")
    for name in ("data-bin", "text"):
        (folder / name).symlink_to(corpus / name)
    before, campaign.workplace = campaign.workplace, lambda: folder
    yield folder
    campaign.workplace = before


def rounds(number):
    counter = itertools.count()
    return lambda: next(counter) < number


def test_a_short_campaign_finds_nothing(place):
    counts, failures = campaign.campaign(1, rounds(12), ["damage"])
    assert counts == {"damage": 12} and not failures
    assert not list(place.glob("attack-*"))


def test_what_fails_is_a_line_that_repeats_it(place, monkeypatch, capsys):
    """A tool that takes everything for intact, and one that falls over, are found out."""
    monkeypatch.setattr(campaign, "in_process", lambda tool, arguments: None)
    counts, failures = campaign.campaign(1, rounds(20), ["damage"])
    assert counts["damage"] == 20 and 0 < len(failures) < 20
    assert capsys.readouterr().out.splitlines() == [f"FAILED {failure}" for failure in failures]
    name, number, said = failures[0].split(":", 2)
    assert campaign.attack(name, int(number)) == said.strip()
    monkeypatch.undo()
    monkeypatch.setattr(campaign, "script", lambda name: type("tool", (), {"main": lambda: 1 / 0}))
    with pytest.raises(campaign.Failure, match="record_run: traceback: ZeroDivisionError"):
        campaign.in_process("record_run", [])
