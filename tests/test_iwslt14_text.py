"""scripts/iwslt14_text.py, against what Moses' tokenizer.perl has printed, with its lists of abbreviations."""

import pytest
from conftest import load_script

pytest.importorskip("sacremoses")
pytest.importorskip("subword_nmt")
module = load_script("iwslt14_text")

TOKENS = [
    # abbreviations and ordinals keep their full stop, but not at the end of the line
    ("de", "Er mag Äpfel usw. und Birnen.", "Er mag Äpfel usw. und Birnen ."),
    ("de", "Er mag Äpfel, Birnen usw.", "Er mag Äpfel , Birnen usw ."),
    ("de", "Das war im 3. Jahrhundert v. Chr.", "Das war im 3. Jahrhundert v. Chr ."),
    ("de", "Am 3. Mai um 10:30 Uhr kam Dr. Müller, z.B. mit dem Bus.",
     "Am 3. Mai um 10 : 30 Uhr kam Dr. Müller , z.B. mit dem Bus ."),
    ("en", "Mr. Smith e.g. paid $5,300 to the U.S. in No. 5, not No. Five, at 5 p.m.",
     "Mr. Smith e.g. paid $ 5,300 to the U.S. in No. 5 , not No . Five , at 5 p.m ."),
    # numbers and commas
    ("de", "Nr. 5, 3,5 Mio. Euro, S. 12", "Nr. 5 , 3,5 Mio. Euro , S. 12"),
    ("de", "Das kostet 1.000,50 € (rund 5,- mehr) [sic]...",
     "Das kostet 1.000,50 € ( rund 5 , - mehr ) &#91; sic &#93; ..."),
    ("en", "A,B,C 1,2,3,x and 4,", "A , B , C 1,2,3 , x and 4 ,"),
    # apostrophes and quotes
    ("de", "„Wie geht's?“, fragte er – ‚gut‘.", "„ Wie geht &apos; s ? “ , fragte er – ‚ gut ‘ ."),
    ("en", "I can't believe it's the 1990's, don't you?",
     "I can &apos;t believe it &apos;s the 1990 &apos;s , don &apos;t you ?"),
    ("en", "He said 'no' and left.'", "He said &apos; no &apos; and left . &apos; "),  # the blank is Moses'
    ("en", '"Stop," she said; "please..."', "&quot; Stop , &quot; she said ; &quot; please ... &quot;"),
    ("en", "don’t — it’s fine…", "don ’ t — it ’ s fine …"),
    # markup and entities are text
    ("en", "a|b <i>x</i> & y [z] & Q&amp;A",
     "a &#124; b &lt; i &gt; x &lt; / i &gt; &amp; y &#91; z &#93; &amp; Q &amp; amp ; A"),
    # dots and hyphens
    ("en", "Wait.... What? Hm.. No.", "Wait .... What ? Hm .. No ."),
    ("en", "well-known co-op -- yes", "well-known co-op -- yes"),
    # other scripts, white space, control characters
    ("en", "The character 中文 means 한국, ½ of Ⅷ.", "The character 中文 means 한국 , ½ of Ⅷ ."),
    ("en", "a\x1db\u00a0c\u2028d\te\x07f", "ab c d ef"),
    ("en", "  two  spaces . , ", "two spaces . ,"),
    ("en", "", ""),
]


@pytest.mark.parametrize(("language", "line", "tokens"), TOKENS, ids=[line for _, line, _ in TOKENS])
def test_tokens_are_those_of_moses(language, line, tokens):
    assert module.MosesTokenizer(language)(line) == tokens


def test_lower_case_is_that_of_perl():
    assert module.lower_case("ÄÖÜ ẞ &APOS; İI ΟΔΟΣ") == "äöü ß &apos; i̇i οδοσ"


def test_cleaning():
    """Words of a letter, by their number on either side; then a word of so many letters."""
    for german, english, clean in ((1, 1, True), (175, 175, True), (3, 2, True), (2, 3, True), (176, 176, False),
                                   (120, 176, False), (100, 151, False), (151, 100, False), (0, 1, False),
                                   (1, 0, False), (0, 0, False)):  # fmt: skip
        assert module.is_clean(" ".join("w" * german), " ".join("w" * english)) == clean
    assert module.is_clean("x" * 1000, "y")
    assert not module.is_clean("x" * 1001, "y") and not module.is_clean("x", f"y {'z' * 1001}")


def test_a_sentence_becomes_subwords_of_lower_case_tokens_and_comes_back(tmp_path):
    codes = tmp_path / "codes"
    module.learn_codes(["der hund läuft über die straße , die alte straße ."] * 3, codes, 20)
    encode, decode = module.encoder(codes, "de"), module.decoder("en")
    units = [encode(line) for line in ("Der Hund läuft über die »Straße«.", "", "Wie geht's, Dr. Maier.\u2028?")]
    assert [line.replace("@@ ", "") for line in units] == [
        "der hund läuft über die » straße « .", "", "wie geht &apos; s , dr. maier . ?"]
    assert "d@@ r@@ " in units[2] and "straße" in units[0]
    lines = ["i can &apos;t be@@ lie@@ ve it &apos;s &quot; true &quot; , q &amp; a .", "", "end@@"]
    assert [decode(line) for line in lines] == ['i can\'t believe it\'s "true", q & a.', "", "end"]
