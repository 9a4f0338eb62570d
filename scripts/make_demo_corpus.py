#!/usr/bin/env python3
"""Generate a German-English corpus with gold word alignments from a synchronous grammar.

    python scripts/make_demo_corpus.py --out DIR [--seed 1] [--train 20000 --valid 500 --test 500]

writes ``DIR/{train,valid,test}.{de,en,align}``: tokenised text, one sentence per line, and each pair's alignment in
Pharaoh format (``i-j``: German token i expresses English token j, from 0)::

    de     gestern hat der Arzt die alte Frau nicht angerufen .
    en     the doctor did not call the old woman yesterday .
    align  0-8 1-2 2-0 3-1 4-5 5-6 6-7 7-3 8-4 9-9

The grammar has what makes German hard to translate word by word: verbs second, at the end of subordinate clauses, and
in two pieces ("ruft ... an", "hat ... angerufen"); case and gender on articles, adjectives and pronouns; objects
before their subject; nicht for English do-support; and questions.
"""

import random
import re
from pathlib import Path

from multimax_fairseq import tools

# Gender, German, English; "_" is a space inside an entry.
PERSONS = """m Mann man, m Freund friend, m Arzt doctor, m Vater father, m Lehrer teacher, m Onkel uncle, m Koch cook,
    m Bruder brother, m König king, m Sohn son, f Frau woman, f Tochter daughter, f Tante aunt, f Schwester sister,
    f Mutter mother, f Königin queen, f Ärztin doctor, f Freundin friend, n Kind child, n Mädchen girl"""
THINGS = """n Buch book, m Brief letter, n Gedicht poem, m Bericht report, f Geschichte story, f Zeitung newspaper,
    m Apfel apple, m Kuchen cake, f Suppe soup, f Birne pear, n Ei egg, n Bild picture, m Schlüssel key, f Uhr clock,
    f Blume flower, m Mantel coat, f Flasche bottle, n Geschenk present, m Stuhl chair, m Koffer suitcase"""
PLACES = """m Garten garden, f Stadt city, m Park park, f Küche kitchen, n Haus house, m Wald forest, n Büro office,
    n Zimmer room, n Dorf village, f Schule school"""
PRONOUNS = {"nominative": "er he, sie she", "accusative": "ihn him, sie her", "dative": "ihm him, ihr her"}
ADJECTIVES = """klein small, groß big, schön beautiful, alt old, neu new, gut good, schlecht bad, berühmt famous,
    seltsam strange, wichtig important, wunderbar wonderful, schwer heavy, leicht light, weiß white"""
# What a verb has beside its subject; (particle|)infinitive, its form of er and sie, participle ("+": with sein);
# English, its form of he and she, its past.
VERBS = [
    ({"accusative": THINGS}, """kaufen kauft gekauft buy buys bought, verkaufen verkauft verkauft sell sells sold,
        aus|suchen sucht gesucht choose chooses chose, tragen trägt getragen carry carries carried,
        mit|bringen bringt gebracht bring brings brought, an|sehen sieht gesehen look_at looks_at looked_at,
        finden findet gefunden find finds found"""),
    ({"accusative": PERSONS}, """besuchen besucht besucht visit visits visited, hören hört gehört hear hears heard,
        treffen trifft getroffen meet meets met, an|rufen ruft gerufen call calls called,
        ein|laden lädt geladen invite invites invited, sehen sieht gesehen see sees saw"""),
    ({"dative": PERSONS}, """helfen hilft geholfen help helps helped, danken dankt gedankt thank thanks thanked,
        folgen folgt +gefolgt follow follows followed, zu|hören hört gehört listen_to listens_to listened_to"""),
    ({"dative": PERSONS, "accusative": THINGS}, """geben gibt gegeben give gives gave,
        schicken schickt geschickt send sends sent, zeigen zeigt gezeigt show shows showed"""),
    ({}, """schlafen schläft geschlafen sleep sleeps slept, arbeiten arbeitet gearbeitet work works worked,
        tanzen tanzt getanzt dance dances danced, an|kommen kommt +gekommen arrive arrives arrived,
        auf|wachen wacht +gewacht wake_up wakes_up woke_up, lachen lacht gelacht laugh laughs laughed"""),
]
MODALS = "wird will, kann can, soll should, muss must"
TIMES = {"present": "heute today, jetzt now, am_Abend in_the_evening, am_Montag on_Monday",
         "past": "gestern yesterday, letzte_Woche last_week, am_Montag on_Monday",
         "modal": "heute today, morgen tomorrow, nächste_Woche next_week, am_Abend in_the_evening"}
SUBJUNCTIONS = "weil because, obwohl although, während while, wenn if"
# Masculine, feminine and neuter in each of the cases: ending of a determiner, and of an adjective after it.
CASES = ("nominative", "accusative", "dative")
ENDINGS = {"der": ("er ie as en ie as em er em", "e e e en e e en en en"),
           "dieser": ("er e es en e es em er em", "e e e en e e en en en"),
           "ein": ("- e - en e - em er em", "er e es en e es en en en")}
DETERMINERS = """der d the, der d the, der d the, ein ein a, ein ein a, ein ein a, dieser dies this, ein mein my,
    ein dein your, ein unser our"""
GERMAN_ORDER = ("subject", "dative", "accusative", "time", "negation", "place")
ENGLISH_ORDER = ("dative", "accusative", "place", "time")


def entries(table):
    return [tuple(cell.replace("_", " ") for cell in row.split()) for row in table.split(",")]


def words(text, *units):
    """The words of a text, each with the units of meaning that it expresses."""
    return [(word, set(units)) for word in text.split()]


def aligned(*pairs):
    """German and English words of texts in the same order: each pair of texts is a unit."""
    units = [object() for _ in pairs]
    return tuple([word for pair, unit in zip(pairs, units) for word in words(pair[side], unit)] for side in (0, 1))


def joined(*texts):
    return tuple(sum(sides, []) for sides in zip(*texts))


def phrase(rng, nouns, case, preposition=None):
    """German and English words of a noun phrase; of persons sometimes a pronoun."""
    if nouns is PERSONS and rng.random() < 0.3:
        return aligned(rng.choice(entries(PRONOUNS[case])))
    gender, noun, english = rng.choice(entries(nouns))
    declension, stem, determiner = rng.choice(entries(DETERMINERS))
    cell = 3 * CASES.index(case) + "mfn".index(gender)
    ending, of_adjective = (endings.split()[cell].strip("-") for endings in ENDINGS[declension])
    pairs = [(stem + ending, determiner), (noun, english)]
    if rng.random() < 0.4:
        adjective, translated = rng.choice(entries(ADJECTIVES))
        pairs.insert(1, (adjective + of_adjective, translated))
    if preposition:
        pairs[:1] = [("im", "in the")] if pairs[0][0] == "dem" else [(preposition, preposition), pairs[0]]
    return aligned(*pairs)


def clause(rng, kind, opening=()):
    """German and English words of a clause.

    Args:
        kind: "statement", "question" or "subordinate".
        opening: German words before the verb of a statement.
    """
    objects, verbs = rng.choice(VERBS)
    verb, third, participle, base, english_third, english_past = rng.choice(entries(verbs))
    particle, _, infinitive = verb.rpartition("|")
    tense = rng.choice(list(TIMES))
    parts = {"subject": phrase(rng, PERSONS, "nominative")}
    parts |= {case: phrase(rng, nouns, case) for case, nouns in objects.items()}
    if rng.random() < 0.4:
        parts["time"] = aligned(rng.choice(entries(TIMES[tense])))
    if rng.random() < 0.2:
        parts["place"] = phrase(rng, PLACES, "dative", preposition="in")
    fronts = [role for role, (german, _) in parts.items()  # an object only if its case shows that it is one
              if role != "accusative" or german[0][0].endswith("en")]
    if rng.random() < 0.2:
        parts["negation"] = aligned(("nicht", "not"))

    finite, lexical = object(), object()  # "hat angerufen" is "called", or "did" and "call"
    supported = kind == "question" or "negation" in parts
    if tense == "modal":
        modal, auxiliary = rng.choice(entries(MODALS))
        german_verb, main = (words(modal, finite), words(particle + infinitive, lexical)), base
    elif tense == "past":
        helper, participle = ("ist" if participle[0] == "+" else "hat"), participle.strip("+")
        german_verb = words(helper, finite), words(particle + participle, lexical)
        auxiliary, main = ("did", base) if supported else ("", english_past)
    else:
        german_verb = words(third, finite, lexical), words(particle, lexical)
        if kind == "subordinate":
            german_verb = [], words(particle + third, finite, lexical)
        auxiliary, main = ("does", base) if supported else ("", english_third)

    german, english = ({role: part[side] for role, part in parts.items()} for side in (0, 1))
    front = list(opening) or (german.pop(rng.choice(fronts)) if kind == "statement" else [])
    middle = sum((german.get(role, []) for role in GERMAN_ORDER), [])
    second, last = german_verb
    german_order = [middle, last, second] if kind == "subordinate" else [front, second, middle, last]
    english_order = [english["subject"], words(auxiliary, finite)][:: -1 if kind == "question" else 1]
    english_order += [english.get("negation", []), words(main, lexical, *([] if auxiliary else [finite]))]
    return sum(german_order, []), sum(english_order + [english.get(role, []) for role in ENGLISH_ORDER], [])


def sentence(rng):
    """German, English and alignment as text."""
    kind = rng.choices(["statement", "question", "main clause first", "main clause last"], [6, 4, 4, 3])[0]
    end = aligned(("?", "?") if kind == "question" else (".", "."))
    if kind in ("statement", "question"):
        german, english = joined(clause(rng, kind), end)
    else:
        other = joined(aligned(rng.choice(entries(SUBJUNCTIONS))), clause(rng, "subordinate"))
        if kind == "main clause first":
            german, english = joined(clause(rng, "statement"), (words(","), []), other, end)
        else:
            opening, start = joined(other, aligned((",", ",")))
            german, english = joined(([], start), clause(rng, "statement", opening), end)
    links = [f"{i}-{j}" for i, (_, a) in enumerate(german) for j, (_, b) in enumerate(english) if a & b]
    german, english = (" ".join(word for word, _ in side) for side in (german, english))
    return german, re.sub(r"\ba (?=[aeiou])", "an ", english), " ".join(links)


def distinct_sentences(rng):
    """Yield sentences of 4 to 25 words, none of them twice in either language."""
    seen = set()
    while True:
        german, english, alignment = sentence(rng)
        lengths = [len(side.split()) for side in (german, english)]
        if 4 <= min(lengths) and max(lengths) <= 25 and not seen & {german, english}:
            seen |= {german, english}
            yield german, english, alignment


def main():
    parser = tools.ArgumentParser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the nine files")
    parser.add_argument("--seed", type=int, default=1, help="same seed, same files (default: 1)")
    sizes = {"test": 500, "valid": 500, "train": 20000}  # training data last: its size does not change the others
    for split, size in sizes.items():
        parser.add_argument(f"--{split}", type=tools.positive, default=size, help=f"sentence pairs (default: {size})")
    options = parser.parse_args()
    sentences = distinct_sentences(random.Random(options.seed))
    with tools.errors_in_a_line():
        options.out.mkdir(parents=True, exist_ok=True)
        for split in sizes:
            triples = [next(sentences) for _ in range(getattr(options, split))]
            for column, suffix in enumerate(("de", "en", "align")):
                with tools.replacing(options.out / f"{split}.{suffix}") as file:
                    file.writelines(f"{triple[column]}\n".encode() for triple in triples)


if __name__ == "__main__":
    main()
