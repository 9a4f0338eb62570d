"""scripts/make_demo_corpus.py: its files, and the German, English and alignments in them.

The oracles for the language are lists written by hand: they share no table with the generator.
"""

import itertools
import re
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, load_script, run

SIZES = {"train": 4000, "valid": 200, "test": 500}
SMALL = ("--train=60", "--valid=5", "--test=20")
SUFFIXES = ("de", "en", "align")


def generate(out, *options, check=True, hash_seed="0"):
    return run(sys.executable, ROOT / "scripts" / "make_demo_corpus.py", f"--out={out}", *options, check=check,
               env={"PYTHONHASHSEED": hash_seed})  # fmt: skip


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def lines(folder, name):
    return (folder / name).read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "not" / "there" / "yet"
    generate(folder, *(f"--{split}={size}" for split, size in SIZES.items()))
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    small = tmp_path_factory.mktemp("small") / "out"
    generate(small, *SMALL)
    return small


@pytest.fixture(scope="module")
def pairs(folder):
    """The sentence pairs of all the splits: both sides as text and as words, links as index pairs."""
    return [
        SimpleNamespace(
            split=split, de=de, en=en, german=de.split(), english=en.split(),
            links=[tuple(map(int, link.split("-"))) for link in links.split()],
        )
        for split in SIZES
        for de, en, links in zip(*(lines(folder, f"{split}.{suffix}") for suffix in SUFFIXES))
    ]  # fmt: skip


@pytest.fixture(scope="module")
def grammar():
    """The script as a module."""
    return load_script("make_demo_corpus")


# ------------------------------------------------------------------------------------------- files
def test_nine_files_of_the_sizes_asked_for(folder):
    assert {name: text.count(b"\n") for name, text in contents(folder).items()} == {
        f"{split}.{suffix}": size for split, size in SIZES.items() for suffix in SUFFIXES
    }


def test_the_seed_decides_and_more_training_data_leaves_the_rest_alone(small, tmp_path):
    generate(tmp_path / "again", *SMALL, hash_seed="12345")
    assert contents(tmp_path / "again") == contents(small)
    generate(tmp_path / "other", *SMALL, "--seed=2")
    assert len(set(lines(small, "test.de")) & set(lines(tmp_path / "other", "test.de"))) < 3
    generate(tmp_path / "larger", *SMALL, "--train=70")
    larger = contents(tmp_path / "larger")
    assert {name for name, text in contents(small).items() if larger[name] != text} == {
        "train.de", "train.en", "train.align"
    }  # fmt: skip


def test_no_sentence_occurs_twice_and_lengths_vary(pairs):
    assert len({pair.de for pair in pairs}) == len({pair.en for pair in pairs}) == len(pairs)
    lengths = [len(words) for pair in pairs for words in (pair.german, pair.english)]
    assert 4 <= min(lengths) and 20 < max(lengths) <= 25 and 10 < sum(lengths) / len(lengths) < 12.5


def test_a_test_sentence_is_seldom_a_training_sentence_with_another_word(pairs):
    """Otherwise a model could look translations up instead of learning to make them."""

    def with_a_hole(words):
        return {(*words[:i], None, *words[i + 1 :]) for i in range(len(words))}

    seen = set().union(*(with_a_hole(pair.german) for pair in pairs if pair.split == "train"))
    near = [pair for pair in pairs if pair.split == "test" and with_a_hole(pair.german) & seen]
    assert len(near) < 0.15 * SIZES["test"]


def test_a_second_run_replaces_the_files_and_keeps_strangers(small, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "test.de").write_text("old")
    (out / "notes.txt").write_text("mine")
    generate(out, *SMALL)
    assert contents(out) == {**contents(small), "notes.txt": b"mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("text", ["-1", "many", "1.5", "1000001"])
def test_bad_numbers_are_refused(grammar, text):
    with pytest.raises(grammar.argparse.ArgumentTypeError, match=f"'{text}' is not a number from 0 to 1,000,000"):
        grammar.sentence_count(text)


def test_out_must_not_be_a_file_and_no_sentence_is_an_allowed_number(tmp_path):
    (tmp_path / "out").write_text("mine")
    result = generate(tmp_path / "out", *SMALL, check=False)
    assert result.returncode == 1 and re.fullmatch("make_demo_corpus: error: .*out.*\n", result.stderr)
    assert contents(tmp_path) == {"out": b"mine"}
    generate(tmp_path / "none", "--train=0", "--valid=0", "--test=1")
    assert lines(tmp_path / "none", "train.de") == [] and len(lines(tmp_path / "none", "test.de")) == 1


def test_a_failure_while_writing_leaves_everything_as_it_was(grammar, tmp_path):
    out = tmp_path / "out"
    good = {"test": [("de", "en", "0-0")]}
    grammar.write_corpus(out, good)
    before = contents(out)
    with pytest.raises(TypeError):
        grammar.write_corpus(out, {**good, "train": [("fine", "fine", None)]})
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_it_gives_up_when_the_grammar_has_no_more(grammar):
    """Twelve pairs, but three German sentences, and two English ones as their translations."""
    pairs = [(f"das ist {i % 3} .", f"that is {i % 3 // 2} .", "") for i in range(12)]
    endless = itertools.cycle(pairs)
    sentences = grammar.distinct_sentences(lambda: next(endless), patience=50)
    assert [next(sentences) for _ in range(2)] == [pairs[0], pairs[2]]
    with pytest.raises(ValueError, match="no more than 2 distinct sentences"):
        next(sentences)


@pytest.mark.parametrize("length, fits", [(3, False), (4, True), (25, True), (26, False)])
def test_sentences_that_are_too_short_or_too_long_are_left_out(grammar, length, fits):
    long, usual = " ".join(["wort"] * length), "a usual sentence ."
    for pair in ((long, usual, ""), (usual, long, "")):
        sentences = grammar.distinct_sentences(lambda pair=pair: pair, patience=5)
        if fits:
            assert next(sentences) == pair
        with pytest.raises(ValueError, match=f"no more than {int(fits)} distinct"):
            next(sentences)


# -------------------------------------------------------------------------------------- alignments
def test_alignments_are_sorted_links_and_only_commas_have_none(folder, pairs):
    for split in SIZES:
        assert all(re.fullmatch(r"\d+-\d+( \d+-\d+)*", line) for line in lines(folder, f"{split}.align"))
    for pair in pairs:
        assert pair.links == sorted(set(pair.links))
        words = {i for i, word in enumerate(pair.german) if word != ","}
        assert words <= {i for i, _ in pair.links} <= set(range(len(pair.german))), pair.de
        assert {j for _, j in pair.links} == set(range(len(pair.english))), pair.en


# Two spaces between entries. A verb's finite form also means the "do" that supports it in English.
DICTIONARY = """
    Frau: woman           Frauen: women          Kind: child           Kindern: children
    Student: student      Männer: men            Onkeln: uncles        Bauern: farmer farmers
    Buch: book            Bücher: books          Ei: egg               Schlüssel: key keys
    Uhren: clocks         Tür: door              Küche: kitchen        schöner: beautiful
    gekauft: bought buy   angerufen: called call     anruft: calls call does
    gesehen: saw see      angesehen: looked look at  aussucht: chooses choose does
    geholfen: helped help     gewusst: knew know     tanzt: dances dance does do
    weil: because         obwohl: although       dass: that            ob: whether
    wenn: if              während: while         Abend: in the evening     zwei: two
    gestern: yesterday    Woche: week            mir: me               uns: us
    ihnen: them           nicht: not cannot      kann: can cannot      soll: should
    mein: my              unserem: our           diese: this these     jeden: every
    im: in the            ins: into the          vom: of the
"""


def test_words_are_aligned_to_their_dictionary_translations(pairs):
    entries = [entry.split(": ") for entry in re.split(r"\s{2,}", DICTIONARY.strip())]
    dictionary = {german: set(english.split()) for german, english in entries}
    met = set()
    for pair in pairs:
        for i, word in enumerate(pair.german):
            if word in dictionary:
                linked = {pair.english[j] for i_linked, j in pair.links if i_linked == i}
                assert linked and linked <= dictionary[word], (word, linked, pair.de, pair.en)
                met.add(word)
    assert met == set(dictionary)


@pytest.mark.parametrize("german, english", [
    ("Frau Frauen", "woman women"), ("Student Studenten", "student students"), ("Garten", "garden"),
    ("Buch Bücher Büchern", "book books"), ("weil", "because"),
    ("nicht kein keine keinen keinem keiner", "not cannot"),
])  # fmt: skip
def test_both_sides_say_a_thing_equally_often(pairs, german, english):
    german, english = set(german.split()), set(english.split())
    for pair in pairs:
        count = sum(word in german for word in pair.german)
        assert count == sum(word in english for word in pair.english), (pair.de, pair.en)


# -------------------------------------------------------------------------------------- word order
# Verbs that take an infinitive or a participle to the end of the clause, or are forms of sein.
AUXILIARY = ("bin bist ist sind seid habe hast hat haben habt werde wirst wird werden werdet "
             "kann kannst können könnt soll sollst sollen sollt").split()  # fmt: skip
PARTICLES = "an auf aus ein mit zu zurück".split()


@pytest.mark.parametrize("subjunction", ["dass", "ob", "weil", "obwohl", "wenn", "als", "während"])
def test_subordinate_clauses_end_in_their_finite_verb(pairs, subjunction):
    # At the end of the sentence or at its start; commas inside would start another clause.
    pattern = re.compile(rf", {subjunction} ([^,]+) [.?]$|^{subjunction} ([^,]+) ,")
    matches = [match for pair in pairs for match in [pattern.search(pair.de)] if match]
    clauses = [(match[1] or match[2]).split() for match in matches]
    assert len(clauses) > 10
    for clause in clauses:
        assert clause[-1][0].islower() and clause[-1] not in PARTICLES, clause
        assert not any(word in AUXILIARY for word in clause[:-1]), clause
        assert clause[-1] in AUXILIARY or re.search("(e|t|en|weiß)$", clause[-1]), clause


def test_the_finite_verb_is_second_after_a_fronted_adverb(pairs):
    matches = [re.match(r"(gestern|letzte Woche) (\S+)", pair.de) for pair in pairs]
    followers = {match[2] for match in matches if match}
    assert {"hat", "haben", "ist", "sind"} <= followers <= set(AUXILIARY)


@pytest.mark.parametrize("finite, particle, english", [
    ("ruft", "an", "call calls called"), ("lädt", "ein", "invite invites invited"),
    ("sucht", "aus", "choose chooses chose"), ("sieht", "an", "look looks looked"),
    ("hört", "zu", "listen listens listened"), ("kommt", "zurück", "come comes came"),
])  # fmt: skip
def test_separable_verbs_are_split_in_main_clauses_and_joined_at_the_end(pairs, finite, particle, english):
    split = [p for p in pairs if re.match(rf"[^,]* {finite} [^,]*\b{particle} [.,]", p.de)]
    joined = [p for p in pairs if re.search(rf"\b{particle}{finite}\b", p.de)]
    assert split and joined and any(re.search(rf"\b{particle}ge\w+", p.de) for p in pairs)
    for pair in split + joined:
        assert set(english.split()) & set(pair.english), (pair.de, pair.en)
    for pair in split:
        verb = pair.german.index(finite)
        end = next(i for i in range(verb, len(pair.german)) if pair.german[i + 1] in ".,")
        verb_links, particle_links = ({j for i, j in pair.links if i == at} for at in (verb, end))
        assert pair.german[end] == particle
        assert particle_links and particle_links <= verb_links, pair.de  # the verb may add "does"


def test_english_do_support_goes_with_the_bare_verb(pairs):
    after = {match for p in pairs for match in re.findall(r"\b(?:do|does|did) not (\w+)", p.en)}
    assert len(after) > 20
    assert not [verb for verb in after if re.search("(s|ed)$", verb)]
    assert not {"went", "saw", "bought", "has", "was"} & after


# --------------------------------------------------------------------------------------- agreement
ADJECTIVE = ("(?:jung|krank|reich|arm|freundlich|nett|glücklich|traurig|berühmt|klein|groß|schön|alt|"
             "neu|billig|schwer|leicht|rot|blau|grün|schwarz|weiß)")  # fmt: skip


def endings(text):
    """A table from text: determiner, the ending of an adjective after it, and so on."""
    cells = text.split()
    return dict(zip(cells[::2], cells[1::2]))


# "ein" stands for kein, mein, unser, ...; "-" for a number.
WEAK_NOMINATIVE = endings("der e  ein er  dieser e  jeder e")
MASCULINE = WEAK_NOMINATIVE | endings("den en  einen en  diesen en  jeden en")
MASCULINE |= endings("dem en  einem en  diesem en  jedem en  vom en")
FEMININE = endings("die e  eine e  diese e  jede e  der en  einer en  dieser en  jeder en")
NEUTER = endings("das e  ein es  dieses e  jedes e  dem en  einem en  diesem en  jedem en  vom en")
PLURAL = endings("die en  eine en  diese en  - e")
DATIVE_PLURAL = endings("den en  einen en  diesen en  - en")
DETERMINERS = {*MASCULINE, *FEMININE, *NEUTER, *PLURAL, *DATIVE_PLURAL}
NOUNS = {
    "Mann": MASCULINE, "Brief": MASCULINE, "Nachbar": WEAK_NOMINATIVE, "Student": WEAK_NOMINATIVE, "Frau": FEMININE,
    "Zeitung": FEMININE, "Kind": NEUTER, "Buch": NEUTER, "Männer": PLURAL, "Kinder": PLURAL, "Bücher": PLURAL,
    "Männern": DATIVE_PLURAL, "Kindern": DATIVE_PLURAL, "Freunden": DATIVE_PLURAL,
}  # fmt: skip


def determiner_class(word, plural):
    """keinem and unserem inflect like einem; any other word, such as a number, is no determiner."""
    if plural and word == "ihr":
        return "-"  # "kauft ihr Bücher ?": you
    word = re.sub("^[kmds]ein|^(ihr|unser)(?=(e|en|em|er)?$)", "ein", word)
    return word if word in DETERMINERS else "-"


@pytest.mark.parametrize("noun", NOUNS)
def test_determiner_adjective_and_noun_agree(pairs, noun):
    allowed = NOUNS[noun]
    pattern = re.compile(rf"(, )?(\S+) (?:{ADJECTIVE}(e[mnrs]?) )?{noun} ")
    phrases = {m[0]: m for pair in pairs for m in pattern.finditer(f"- {pair.de}")}
    assert len(phrases) > 5
    for phrase, (comma, word, ending) in ((phrase, m.groups()) for phrase, m in phrases.items()):
        if comma and word in ("der", "die", "das", "den", "dem"):
            continue  # perhaps a relative pronoun
        determiner = determiner_class(word, plural="-" in allowed)
        assert determiner in allowed, phrase
        assert ending is None or ending == allowed[determiner], phrase


@pytest.mark.parametrize("start, verb", [
    ("ich", r"\w+e|bin|kann|soll|weiß"), ("du", r"\w+st|tanzt|weißt"), ("wir", r"\w+en|sind"),
    ("ihr", r"\w+t|seid"),  # where English says you: "ihr Freund" is hers
    (r"das (?:\w+e )?Kind", r"\w+t|kann|soll|wird|weiß"), (r"die (?:\w+en )?Frauen", r"\w+en|sind"),
])  # fmt: skip
def test_subject_and_verb_agree(pairs, start, verb):
    chosen = [pair for pair in pairs if start != "ihr" or pair.english[0] == "you"]
    verbs = [m[1] for pair in chosen for m in [re.match(rf"{start} (\w+)", pair.de)] if m]
    assert len(verbs) > 3
    assert [word for word in verbs if not re.fullmatch(verb, word)] == []


def test_english_uses_an_before_vowels_only_and_nobody_acts_on_themselves(pairs):
    """ "ich sehe mich" would need "myself"; the grammar has no reflexives."""
    reflexive = re.compile(r"(ich \w+ mi(ch|r)|du \w+ di(ch|r)|wir \w+ uns|ihr \w+ euch) ")
    for pair in pairs:
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", pair.en), pair.en
        assert not reflexive.match(pair.de), pair.de


PHENOMENA = [
    ("de", ", dass "), ("de", "^(weil|obwohl|wenn|als|während) .* , "),
    ("en", r"\w who \w+ "), ("de", ", (der|die|das) .* [.?]$"),  # relative clauses
    ("de", r"\bhat .*\bge\w+(t|en) "), ("de", r"\b(ist|sind) .*(gegangen|gekommen|gefolgt) "),  # perfect
    ("de", r"\bwird .*en [.,?]"), ("de", r"\b(kann|soll) .*en [.,?]"),  # future, modals
    ("de", r"\bden \w+n "), ("de", r"\b(zwei|drei) \w+e [A-ZÄÖÜ]"),  # dative plural, strong adjective
    ("de", r"\b(dem|einem) (\w+en )?(Studenten|Nachbarn|Jungen)"),  # weak masculine
    ("de", r"\bnicht "), ("de", r"\bkein(e|en|em|er)? "), ("en", r"\b(does|do|did) not "),
    ("de", r"^(hat|ist|kann|wird|\w+t) .* \?"), ("de", r"^wer .* \?"), ("de", r"^we[nm] .* \?"),
    ("de", r"^was .* \?"), ("de", r"^warum .* \?"),
    ("de", r"^(heute|gestern|morgen|jetzt) \w+ (der|die|das|er|wir|ich) "),
    ("de", r"^den (\w+en )?\w+ \w+ (der|die|das|ein|eine|er|ich|wir) "),  # object first
    ("de", r"\b(im|vom) "), ("de", r"\b(ins|in den|in die) "),
]  # fmt: skip


@pytest.mark.parametrize("side, pattern", PHENOMENA)
def test_every_phenomenon_is_in_the_test_data(pairs, side, pattern):
    assert any(re.search(pattern, getattr(pair, side)) for pair in pairs if pair.split == "test")


# ------------------------------------------------------------------------------ derivations by hand
@pytest.fixture(scope="module")
def make(grammar):
    """Short names for the parts of a sentence."""

    def noun_phrase(noun, case="nominative", **properties):
        noun = next(entry for kind in grammar.NOUNS.values() for entry in kind if entry.singular == noun)
        return grammar.noun_phrase(noun, case=case, **properties)

    def clause(subject, infinitive, tense="present", negated=False, **parts):
        verb = next(verb for verb in grammar.VERBS if verb.particle + verb.infinitive == infinitive)
        return grammar.Clause(subject, verb, tense, negated, **parts)

    return SimpleNamespace(noun_phrase=noun_phrase, clause=clause)


def statement(grammar, clause, front="subject"):
    return grammar.render(clause.german(front), clause.english())


def test_the_example_of_the_docstring(grammar, make):
    women = make.noun_phrase("Frau", "accusative", plural=True, adjective=("alt", "old"))
    yesterday = grammar.fixed("gestern", "yesterday")
    clause = make.clause(make.noun_phrase("Polizist"), "anrufen", "past", True, accusative=women, time=yesterday)
    example = re.findall(r"^    (?:de|en|align) +(.*)", grammar.__doc__, re.M)
    assert list(statement(grammar, clause, front="time")) == example
    assert example == [
        "gestern hat der Polizist die alten Frauen nicht angerufen .",
        "the policeman did not call the old women yesterday .",
        "0-8 1-2 2-0 3-1 4-5 5-6 6-7 7-3 8-4 9-9",
    ]


def test_a_separable_verb_in_a_statement_a_question_and_a_subordinate_clause(grammar, make):
    student = make.noun_phrase("Student", "accusative", adjective=("jung", "young"))
    clause = make.clause(grammar.fixed("sie", "she", 2), "ansehen", accusative=student)
    assert statement(grammar, clause) == (
        "sie sieht den jungen Studenten an .",
        "she looks at the young student .",
        "0-0 1-1 1-2 2-3 3-4 4-5 5-1 5-2 6-6",
    )
    question = grammar.render(clause.german(front=""), clause.english(inverted=True), "?")
    assert question[:2] == ("sieht sie den jungen Studenten an ?", "does she look at the young student ?")
    assert grammar.render(*clause.subordinate(grammar.fixed("weil", "because"))) == (
        "weil sie den jungen Studenten ansieht .",
        "because she looks at the young student .",
        "0-0 1-1 2-4 3-5 4-6 5-2 5-3 6-7",
    )


def test_kein_and_a_contraction(grammar, make):
    clause = make.clause(grammar.fixed("du", "you", 1), "kaufen", negated=True)
    clause.parts["accusative"] = make.noun_phrase(
        "Buch", "accusative", determiner="kein", plural=True, adjective=("rot", "red"), negation=clause.negation
    )
    house = make.noun_phrase("Haus", "dative")
    clause.parts["place"] = grammar.prepositional("in", house, "in")
    assert statement(grammar, clause) == (
        "du kaufst keine roten Bücher im Haus .",
        "you do not buy any red books in the house .",
        "0-0 1-1 1-3 2-2 2-4 3-5 4-6 5-7 5-8 6-9 7-10",
    )


@pytest.mark.parametrize("tense, negated, german, english", [
    ("können", True, "kann nicht aufstehen", "cannot get up"),
    ("sollen", True, "soll nicht aufstehen", "should not get up"),
    ("werden", False, "wird aufstehen", "will get up"), ("past", False, "ist aufgestanden", "got up"),
    ("present", False, "steht auf", "gets up"), ("present", True, "steht nicht auf", "does not get up"),
])  # fmt: skip
def test_tenses_and_modals(grammar, make, tense, negated, german, english):
    clause = make.clause(make.noun_phrase("Lehrer"), "aufstehen", tense, negated)
    assert statement(grammar, clause)[:2] == (f"der Lehrer {german} .", f"the teacher {english} .")


@pytest.mark.parametrize("infinitive, forms", [
    ("kaufen", "kaufe kaufst kauft kaufen kauft kaufen"), ("laden", "lade lädst lädt laden ladet laden"),
    ("arbeiten", "arbeite arbeitest arbeitet arbeiten arbeitet arbeiten"),
    ("tanzen", "tanze tanzt tanzt tanzen tanzt tanzen"), ("essen", "esse isst isst essen esst essen"),
    ("sehen", "sehe siehst sieht sehen seht sehen"), ("wissen", "weiß weißt weiß wissen wisst wissen"),
])  # fmt: skip
def test_conjugation(grammar, infinitive, forms):
    assert {" ".join(verb.forms) for verb in grammar.VERBS if verb.infinitive == infinitive} == {forms}


@pytest.mark.parametrize("base, third", [
    ("go", "goes"), ("carry", "carries"), ("buy", "buys"), ("watch", "watches"), ("look for", "looks for"),
    ("close", "closes"),
])  # fmt: skip
def test_third_person(grammar, base, third):
    assert grammar.add_s(base) == third
