#!/usr/bin/env python3
"""Generate a German-English corpus with gold word alignments from a synchronous grammar.

    python scripts/make_demo_corpus.py --out DIR [--seed 1] [--train 20000 --valid 500 --test 500]

writes ``DIR/{train,valid,test}.{de,en,align}``: tokenised text, one sentence per line, and each pair's alignment in
Pharaoh format (``i-j``: German token i expresses English token j, from 0)::

    de     gestern hat der Polizist die alten Frauen nicht angerufen .
    en     the policeman did not call the old women yesterday .
    align  0-8 1-2 2-0 3-1 4-5 5-6 6-7 7-3 8-4 9-9

The grammar covers what makes German hard to translate word by word: verb-second order, whatever comes first;
verb-final clauses (dass, ob, weil); perfect and modals with the lexical verb at the end; separable
verbs ("ruft ... an", "anruft", "angerufen"); case, gender and number on articles, adjectives, nouns and pronouns;
objects before their subject ("den Mann sieht die Frau"); nicht and kein for English do-support; and questions.

In both languages every word carries the units of meaning that it expresses; words that share one are aligned.
"""

import random
from collections import namedtuple
from pathlib import Path

from multimax_fairseq import tools

# The lexicon consists of text tables; "_" is a space inside a cell, "-" an empty cell.
# Gender, singular, plural, English. Gender "w": a weak masculine; outside the nominative its singular is the plural.
NOUN_TABLES = {
    "person": """m Mann Männer man/men  m Freund Freunde friend  m Arzt Ärzte doctor  m Vater Väter father
        m Lehrer Lehrer teacher  m Onkel Onkel uncle  w Student Studenten student  w Junge Jungen boy
        w Polizist Polizisten policeman/policemen  w Nachbar Nachbarn neighbour  w Bauer Bauern farmer
        f Frau Frauen woman/women  f Tochter Töchter daughter  f Tante Tanten aunt  f Schwester Schwestern sister
        f Mutter Mütter mother  f Königin Königinnen queen  n Kind Kinder child/children  n Mädchen Mädchen girl""",
    "text": """n Buch Bücher book  m Brief Briefe letter  n Gedicht Gedichte poem  m Bericht Berichte report
        f Geschichte Geschichten story  f Zeitung Zeitungen newspaper""",
    "food": "m Apfel Äpfel apple  m Kuchen Kuchen cake  f Suppe Suppen soup  f Birne Birnen pear  n Ei Eier egg",
    "opening": "f Tür Türen door  f Kiste Kisten box  m Koffer Koffer suitcase  n Fenster Fenster window",
    "object": """n Bild Bilder picture  m Schlüssel Schlüssel key  f Uhr Uhren clock  f Blume Blumen flower
        m Mantel Mäntel coat  f Flasche Flaschen bottle  n Geschenk Geschenke present  m Stuhl Stühle chair""",
    "place": """m Garten - garden  f Stadt - city  m Park - park  f Küche - kitchen  n Haus - house  m Wald - forest
        n Büro - office  n Zimmer - room  n Dorf - village  f Schule - school""",
}
ADJECTIVE_TABLES = {
    "person": """jung young  krank ill  reich rich  arm poor  freundlich friendly  nett nice  glücklich happy
        traurig sad  berühmt famous  klein small  groß big  schön beautiful  alt old""",
    "thing": """neu new  billig cheap  schwer heavy  leicht light  rot red  blau blue  grün green  schwarz black
        weiß white  klein small  groß big  schön beautiful  alt old""",
}
# Frame, kind of object, perhaps preposition, case and English preposition: (particle|)infinitive, the stem of du and
# er, participle ("+": perfect with sein), English base and past. "-" is the regular form.
VERB_TABLES = {
    "accusative thing": """kaufen - - buy bought  verkaufen - verkauft sell sold  aus|suchen - - choose chose
        tragen träg getragen carry carried  mit|bringen - gebracht bring brought""",
    "accusative any": """finden - gefunden find found  suchen - - look_for looked_for  sehen sieh gesehen see saw
        an|sehen sieh gesehen look_at looked_at""",
    "accusative text": "lesen lies gelesen read read",
    "accusative food": "essen iss gegessen eat ate",
    "accusative opening": "auf|machen - - open opened  zu|machen - - close closed",
    "accusative person": """besuchen - besucht visit visited  hören - - hear heard  treffen triff getroffen meet met
        an|rufen - gerufen call called  ein|laden läd geladen invite invited""",
    "dative person": """helfen hilf geholfen help helped  danken - - thank thanked  folgen - +gefolgt follow followed
        zu|hören - - listen_to listened_to  zu|sehen sieh gesehen watch watched""",
    "ditransitive thing": "geben gib gegeben give gave  schicken - - send sent  zeigen - - show showed",
    "intransitive -": """schlafen schläf geschlafen sleep slept  arbeiten - - work worked  tanzen - - dance danced
        singen - gesungen sing sang  auf|stehen - +gestanden get_up got_up  auf|wachen - +gewacht wake_up woke_up
        an|kommen - +gekommen arrive arrived  zurück|kommen - +gekommen come_back came_back""",
    "goal place in accusative into": "gehen - +gegangen go went  kommen - +gekommen come came",
    "goal any auf accusative for": "warten - - wait waited",
    "goal any von dative of": "träumen - - dream dreamed",
    "goal person mit dative with": "sprechen sprich gesprochen speak spoke",
    "reporting -": "sagen - - say said  wissen - gewusst know knew  fragen - - ask asked",
    "copula -": "sein - +gewesen be -",
}
# Forms for ich, du, er, wir, ihr, sie; the index into such a row is called `slot`.
FORMS = {
    "sein": "bin bist ist sind seid sind", "haben": "habe hast hat haben habt haben",
    "wissen": "weiß weißt weiß wissen wisst wissen", "werden": "werde wirst wird werden werdet werden",
    "können": "kann kannst kann können könnt können", "sollen": "soll sollst soll sollen sollt sollen",
    "present": "am are is are are are", "past": "was were was were were were",
}  # fmt: skip
MODALS = {"werden": "will", "können": "can", "sollen": "should"}
# Nominative, accusative, dative, English subject and object, slot. An accusative "sie" is always "her", never "them".
PRONOUNS = """ich mich mir I me 0  du dich dir you you 1  er ihn ihm he him 2  sie sie ihr she her 2
    wir uns uns we us 3  ihr euch euch you you 4  sie - ihnen they them 5"""
TIMES = {
    "present": "heute today  jetzt now  am_Montag on_Monday  am_Abend in_the_evening",
    "past": "gestern yesterday  letzte_Woche last_week  am_Montag on_Monday",
    "modal": "heute today  morgen tomorrow  nächste_Woche next_week  am_Abend in_the_evening",
}
# Endings for m, f, n and plural in the nominative, accusative and dative.
CASES, GENDERS = ("nominative", "accusative", "dative"), ("m", "f", "n", "plural")
ENDINGS = {
    "article": "er ie as ie en ie as ie em er em en", "ein": "- e - e en e - e em er em en",
    "strong": "er e es e en e es e em er em en", "weak": "e e e en en e e en en en en en",
    "mixed": "er e es en en e es en en en en en", "none": "- - - - - - - - - - - -",
}  # fmt: skip
CONTRACTIONS = {"in dem": "im", "in das": "ins", "von dem": "vom"}
# Stem, its declension, that of an adjective after it, English for one and for many.
DETERMINERS = """d article weak the the  ein ein mixed a -  kein ein mixed a any  dies strong weak this these
    jed strong weak every -  mein ein mixed my my  dein ein mixed your your  sein ein mixed his his
    ihr ein mixed her her  unser ein mixed our our  zwei none strong - two  drei none strong - three"""
CHOICES = {  # with nicht no number and no "jeder": the scope would be unclear
    "singular": "d d d d ein ein ein mein dein sein unser dies jed", "plural": "d d d d mein unser dies zwei drei",
    "definite": "d d d d d mein dein ihr dies", "negated": "d d d kein kein kein mein dies",
}  # fmt: skip
# Relative frequencies of the grammar's choices.
SENTENCES = {"statement": 6, "question": 3, "subordination": 5, "report": 3}
FRAMES = {"accusative": 10, "dative": 4, "ditransitive": 4, "intransitive": 6, "goal": 8, "copula": 4}
OBJECTS = {"accusative": ["accusative"], "dative": ["dative"], "ditransitive": ["dative", "accusative"]}
TENSES = {"present": 8, "past": 8, "werden": 3, "können": 3, "sollen": 2}
FRONTS = {"subject": 6, "time": 8, "place": 3, "accusative": 4, "dative": 4}
SUBJUNCTIONS = {"weil": "because", "obwohl": "although", "während": "while", "wenn": "if", "als": "when"}
GERMAN_ORDER = ("subject", "pronoun", "time", "dative", "accusative", "negation", "place", "goal", "predicate")
ENGLISH_ORDER = ("predicate", "pronoun", "dative", "accusative", "goal", "place", "time")

Noun = namedtuple("Noun", "gender weak singular plural english english_plural kind")
Verb = namedtuple("Verb", "frame objects preposition particle infinitive forms participle english past")
Word = namedtuple("Word", "text units")
# Words in both languages; the verb form it takes as a subject; its noun; whether it cannot be a nominative.
Phrase = namedtuple("Phrase", "german english slot noun marked", defaults=(2, None, True))


def table(text, width):
    """Cut a text table into rows of `width` cells."""
    cells = ["" if cell == "-" else cell.replace("_", " ") for cell in text.split()]
    return [cells[start : start + width] for start in range(0, len(cells), width)]


def add_s(word):
    """A plural or a third person; the first word changes: look for -> looks for."""
    first, *rest = word.split()
    if first.endswith("y") and first[-2] not in "aeiou":
        first = first[:-1] + "ie"
    return " ".join([first + ("es" if first.endswith(("s", "sh", "ch", "x", "o")) else "s"), *rest])


def read_noun(kind, gender, singular, plural, english):
    english, _, many = english.partition("/")
    return Noun(gender.replace("w", "m"), gender == "w", singular, plural, english, many or add_s(english), kind)


def read_verb(heading, infinitive, changed, participle, english, past):
    frame, objects, *preposition = heading.split()
    particle, _, infinitive = infinitive.rpartition("|")
    stem = infinitive.removesuffix("en")
    e = "e" if stem[-1] in "td" else ""
    er = changed or stem + e
    forms = [stem + "e", er + ("t" if er[-1] in "sz" else "st"), er + "t", infinitive, stem + e + "t", infinitive]
    forms = FORMS[infinitive].split() if infinitive in FORMS else forms
    participle = participle or f"ge{stem}{e}t"
    return Verb(frame, objects, preposition, particle, infinitive, forms, participle, english, past)


NOUNS = {kind: [read_noun(kind, *row) for row in table(text, 4)] for kind, text in NOUN_TABLES.items()}
NOUNS["thing"] = NOUNS["text"] + NOUNS["food"] + NOUNS["object"]
NOUNS["any"] = NOUNS["person"] + NOUNS["thing"] + NOUNS["opening"]
VERBS = [read_verb(heading, *row) for heading, text in VERB_TABLES.items() for row in table(text, 5)]


def words(text, *units):
    return [Word(word, frozenset(units)) for word in text.split()]


def fixed(german, english, *properties):
    """A phrase and its translation: aligned word by word if they have equally many words, else as a whole."""
    sides = german.split(), english.split()
    units = [object() for _ in sides[0]] if len(sides[0]) == len(sides[1]) else [object()] * max(map(len, sides))
    return Phrase(*([Word(text, {unit}) for text, unit in zip(side, units)] for side in sides), *properties)


def noun_phrase(noun, determiner="d", plural=False, adjective=("", ""), case="nominative", negation=None):
    """`negation`: the unit of a "not" that German expresses by kein."""
    stem, *declensions, one, many = next(row for row in table(DETERMINERS, 5) if row[0] == determiner)

    def inflected(case):
        cell = 4 * CASES.index(case) + GENDERS.index("plural" if plural else noun.gender)
        article_ending, ending = (ENDINGS[name].split()[cell].strip("-") for name in declensions)
        name = noun.plural if plural or noun.weak and case != "nominative" else noun.singular
        name += "n" if plural and case == "dative" and name[-1] not in "ns" else ""
        return [stem + article_ending, adjective[0] and adjective[0] + ending, name]

    translated = [many, adjective[1], noun.english_plural] if plural else [one, adjective[1], noun.english]
    units = [[object(), *([negation] if determiner == "kein" else [])], [object()], [object()]]
    german, english = (
        sum((words(text, *unit) for text, unit in zip(texts, units)), []) for texts in (inflected(case), translated)
    )
    return Phrase(german, english, 5 if plural else 2, noun, inflected(case) != inflected("nominative"))


def prepositional(preposition, phrase, english):
    """ "in dem" becomes one word, "im", that expresses both."""
    unit, (first, *rest) = object(), phrase.german
    contraction = CONTRACTIONS.get(f"{preposition} {first.text}")
    german = [Word(contraction, first.units | {unit})] if contraction else [*words(preposition, unit), first]
    return Phrase(german + rest, words(english, unit) + phrase.english)


class Clause:
    """A verb and its `parts`, by the roles of GERMAN_ORDER, before either language orders them."""

    def __init__(self, subject, verb, tense="present", negated=False, **parts):
        self.subject, self.verb, self.tense, self.negated, self.parts = subject, verb, tense, negated, parts
        self.finite, self.lexical, self.negation = object(), object(), object()

    def german(self, front="subject", opening=(), last=False):
        """Verb second, after the part `front` or an `opening`; first without them; last with `last` (subordinate)."""
        fields = {role: phrase.german for role, phrase in self.parts.items()} | {"subject": self.subject.german}
        if self.negated and not any(self.negation in word.units for field in fields.values() for word in field):
            fields["negation"] = words("nicht", self.negation)  # unless kein says it
        verb, slot = self.verb, self.subject.slot
        if self.tense == "present":
            form, final = (verb.particle + verb.forms[slot], "") if last else (verb.forms[slot], verb.particle)
            finite, final = words(form, self.finite, self.lexical), words(final, self.lexical)
        else:
            helper, final = self.tense, verb.infinitive
            if self.tense == "past":
                helper, final = "sein" if verb.participle[0] == "+" else "haben", verb.participle.strip("+")
            final = words(verb.particle + final, self.lexical)
            finite = words(FORMS[helper].split()[slot], self.finite)
        first = list(opening) if opening or not front else fields.pop(front)
        middle = sum((fields.get(role, []) for role in GERMAN_ORDER), [])
        return first + (middle + final + finite if last else finite + middle + final)

    def english(self, inverted=False):
        """`inverted` puts the auxiliary before the subject; negations and questions use do as one."""
        tense, slot, verb = self.tense, self.subject.slot, self.verb.english
        negation, auxiliary, main = words("not" if self.negated else "", self.negation), [], words(verb, self.lexical)
        if tense == "können" and self.negated and not inverted:
            auxiliary, negation = words("cannot", self.finite, self.negation), []
        elif tense in MODALS:
            auxiliary = words(MODALS[tense], self.finite)
        elif verb == "be":
            auxiliary, main = words(FORMS[tense].split()[slot], self.finite, self.lexical), []
        elif inverted or self.negated:
            auxiliary = words("did" if tense == "past" else "does" if slot == 2 else "do", self.finite)
        else:
            form = self.verb.past if tense == "past" else add_s(verb) if slot == 2 else verb
            main = words(form, self.finite, self.lexical)
        rest = sum((self.parts[role].english for role in ENGLISH_ORDER if role in self.parts), [])
        start = auxiliary + self.subject.english if inverted else self.subject.english + auxiliary
        return start + negation + main + rest

    def subordinate(self, introducer):
        return self.german("", introducer.german, last=True), introducer.english + self.english()


def render(german, english, mark="."):
    """German, English and alignment as text; "a" becomes "an" before a vowel."""
    german, english = german + words(mark, "end"), english + words(mark, "end")
    texts = [word.text for word in english]
    texts = ["an" if text == "a" and texts[at + 1][0] in "aeiou" else text for at, text in enumerate(texts)]
    links = [f"{i}-{j}" for i, a in enumerate(german) for j, b in enumerate(english) if a.units & b.units]
    return " ".join(word.text for word in german), " ".join(texts), " ".join(links)


class Grammar:
    """Draws phrases, clauses and sentences at random."""

    def __init__(self, rng):
        self.rng = rng

    def draw(self, weights):
        """Draw a key of `weights` with a probability proportional to its value."""
        return self.rng.choices(list(weights), list(weights.values()))[0]

    def sentence(self):
        """German, English and alignment."""
        return render(*getattr(self, self.draw(SENTENCES))())

    def adjective(self, noun):
        return self.rng.choice(table(ADJECTIVE_TABLES["thing" if noun and noun.kind != "person" else "person"], 2))

    def phrase(self, kind, case, negated=False, negation=None, pronouns=0.3):
        """A noun phrase or, for persons with probability `pronouns`, a pronoun."""
        noun, plural = self.rng.choice(NOUNS[kind]), kind != "place" and self.rng.random() < 0.3
        if noun.kind == "person" and self.rng.random() < pronouns:
            at = CASES.index(case)
            row = self.rng.choice([row for row in table(PRONOUNS, 6) if row[at]])
            return fixed(row[at], row[4 if at else 3], int(row[5]), None, row[at] != row[0])
        choices = "negated" if negation else "definite" if negated else "plural" if plural else "singular"
        determiner = "d" if kind == "place" else self.rng.choice(CHOICES[choices].split())
        adjective = self.adjective(noun) if self.rng.random() < 0.4 else ("", "")
        return noun_phrase(noun, determiner, plural, adjective, case, negation)

    def clause(self, tense="", verb=None):
        negated, tense = self.rng.random() < 0.2, tense or self.draw(TENSES)
        subject = self.phrase("person", "nominative", negated)
        clause = Clause(subject, verb or self.verb(self.draw(FRAMES)), tense, negated)
        frame, parts = clause.verb.frame, clause.parts
        if frame == "copula":
            parts["predicate"] = fixed(*self.adjective(subject.noun))
        elif frame == "goal":
            preposition, case, english = clause.verb.preposition
            goal = self.phrase(clause.verb.objects, case, negated, pronouns=0)
            parts["goal"] = prepositional(preposition, goal, english)
        for case in OBJECTS.get(frame, ()):
            kind = "person" if case == "dative" else clause.verb.objects
            negation = clause.negation if negated and (case == "accusative" or frame == "dative") else None
            phrase = self.phrase(kind, case, negated, negation)
            while phrase.slot % 3 == subject.slot % 3 != 2:  # no reflexives: "ich sehe mich"
                phrase = self.phrase(kind, case, negated, negation)
            parts[case if phrase.noun else "pronoun"] = phrase
        if self.rng.random() < 0.4:
            parts["time"] = fixed(*self.rng.choice(table(TIMES.get(tense, TIMES["modal"]), 2)))
        if frame not in ("copula", "goal", "reporting") and self.rng.random() < 0.25:
            parts["place"] = prepositional("in", self.phrase("place", "dative"), "in")
        return clause

    def verb(self, frame):
        return self.rng.choice([verb for verb in VERBS if verb.frame == frame])

    def front(self, clause):
        """What stands before the verb; an object only if its case shows that it is one."""
        marked = {role for role, phrase in clause.parts.items() if phrase.marked}
        return self.draw({role: weight for role, weight in FRONTS.items() if role in marked | {"subject"}})

    def statement(self):
        clause = self.clause()
        return clause.german(self.front(clause)), clause.english()

    def question(self):
        clause = self.clause()
        return clause.german(front=""), clause.english(inverted=True), "?"

    def subordination(self):
        """Main and subordinate clause, in either order."""
        introducer = self.rng.choice(list(SUBJUNCTIONS))
        tense = {"als": "past", "wenn": "present"}.get(introducer) or self.rng.choice(["present", "past"])
        main, other = self.clause(tense), self.clause(tense)
        other.parts.pop("time", None)
        german, english = other.subordinate(fixed(introducer, SUBJUNCTIONS[introducer]))
        if self.rng.random() < 0.6:
            return main.german(self.front(main)) + words(",") + german, main.english() + english
        comma = words(",", "comma")
        return main.german("", german + comma), english + comma + main.english()

    def report(self):
        """Somebody says that, asks whether. "Knew that" needs a past, too: "knew that he called"."""
        clause = self.clause(self.rng.choice(["present", "past"]), verb=self.verb("reporting"))
        whether = clause.verb.english == "ask" or clause.verb.english == "know" and clause.negated
        other = self.clause("past" if clause.tense == "past" else "")
        german, english = other.subordinate(fixed(*(("ob", "whether") if whether else ("dass", "that"))))
        clause.parts.clear()
        return clause.german() + words(",") + german, clause.english() + english


def distinct_sentences(draw, patience=10_000):
    """Yield the results of `draw` that are new and have 4 to 25 words on both sides.

    Raises:
        UserError: `patience` draws in a row give no such sentence.
    """
    seen, failures = set(), 0
    while failures < patience:
        german, english, alignment = draw()
        lengths, keys = {len(german.split()), len(english.split())}, {("de", german), ("en", english)}
        if 4 <= min(lengths) and max(lengths) <= 25 and not seen & keys:
            seen |= keys
            failures = 0
            yield german, english, alignment
        else:
            failures += 1
    raise tools.UserError(f"the grammar makes no more than {len(seen) // 2} distinct sentences; ask for fewer")


def main():
    parser = tools.ArgumentParser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the nine files")
    parser.add_argument("--seed", type=int, default=1, help="same seed, same files (default: 1)")
    sizes = {"test": 500, "valid": 500, "train": 20000}  # training data last: its size does not change the others
    for split, size in sizes.items():
        parser.add_argument(f"--{split}", type=tools.positive, default=size, help=f"sentence pairs (default: {size})")
    options = parser.parse_args()
    sentences = distinct_sentences(Grammar(random.Random(options.seed)).sentence)
    with tools.errors_in_a_line():
        splits = {split: [next(sentences) for _ in range(getattr(options, split))] for split in sizes}
        options.out.mkdir(parents=True, exist_ok=True)
        for split, triples in splits.items():
            for column, suffix in enumerate(("de", "en", "align")):
                with tools.replacing(options.out / f"{split}.{suffix}") as file:
                    file.writelines(f"{triple[column]}\n".encode() for triple in triples)


if __name__ == "__main__":
    main()
