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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(campaign, "workplace", lambda: folder)
        yield campaign.with_a_run(folder)


def rounds(number):
    counter = itertools.count()
    return lambda: next(counter) < number


def test_a_short_campaign_finds_nothing(place):
    counts, failures = campaign.campaign(1, rounds(12), ["damage"])
    assert counts == {"damage": 12} and not failures
    assert not list(place.glob("attack-*"))


@pytest.mark.parametrize("result, said", [(lambda *_: None, "succeeds after"), (lambda *_: 1 / 0, "ZeroDivision")])
def test_what_fails_is_a_line_that_repeats_it(result, said, monkeypatch, capsys):
    """A tool that takes everything for intact, and one that falls over, are found out."""
    monkeypatch.setattr(campaign, "error_of", result)
    _, failures = campaign.campaign(1, rounds(20), ["damage"])
    assert failures and capsys.readouterr().out.splitlines() == [f"FAILED {failure}" for failure in failures]
    name, number, text = failures[0].split(":", 2)
    assert said in text and campaign.attack(name, int(number)) == text.strip()
