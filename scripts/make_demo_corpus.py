#!/usr/bin/env python3
"""Generate a German-English corpus with gold word alignments from a synchronous grammar.

    python scripts/make_demo_corpus.py --out DIR [--seed 1] [--train 20000 --valid 500 --test 500]

writes ``DIR/{train,valid,test}.{de,en,align}``: tokenised text, one sentence a line, and for each
pair its alignment in Pharaoh format (``i-j``: German token i expresses English token j, from 0)::

    de     gestern hat der Polizist die alten Frauen nicht angerufen .
    en     the policeman did not call the old women yesterday .
    align  0-8 1-2 2-0 3-1 4-5 5-6 6-7 7-3 8-4 9-9

The grammar has what makes German hard to translate word by word: verb-second order with anything in
front; verb-final clauses (dass, ob, weil, wenn, relative clauses); perfect, modals and future with
the lexical verb at the end; separable verbs ("ruft ... an", "anruft", "angerufen"); case, gender
and number on articles, adjectives, nouns and pronouns, down to objects before their subject ("den
Mann sieht die Frau"); nicht and kein against English do-support; questions; numbers; and pronouns
that a distant noun or verb decides (er: he or it; sie: she, they or it).

A sentence is built once, as a tree of `Clause`, `Argument` and `NounPhrase`, and put into order
twice, by the `german_*` and `english_*` functions. Every token carries the *units* of meaning that
it expresses, such as (this clause, "finite") or (this noun phrase, "noun"), and two tokens are
aligned when they share one. No sentence of either language occurs twice in the whole corpus.
"""

import argparse
import os
import random
import sys
import tempfile
from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

# ----------------------------------------------------------------------------------------- lexicon
# Tables are text, cut into rows by `table`; "_" is a space inside a cell, "-" an empty cell.

# Gender, singular, plural, English. "w" is a weak masculine: outside the nominative its singular is
# the plural form (der Student, den Studenten).
NOUN_TABLES = {
    "person": """
        m Mann Männer man men        m Freund Freunde friend friends   m Arzt Ärzte doctor doctors
        m Vater Väter father fathers m Lehrer Lehrer teacher teachers  m Gast Gäste guest guests
        m Onkel Onkel uncle uncles   w Student Studenten student students
        w Junge Jungen boy boys      w Kollege Kollegen colleague colleagues
        w Bauer Bauern farmer farmers   w Nachbar Nachbarn neighbour neighbours
        w Polizist Polizisten policeman policemen
        f Frau Frauen woman women    f Tochter Töchter daughter daughters
        f Tante Tanten aunt aunts    f Schwester Schwestern sister sisters
        f Mutter Mütter mother mothers  f Sängerin Sängerinnen singer singers
        f Königin Königinnen queen queens
        n Kind Kinder child children n Mädchen Mädchen girl girls      n Baby Babys baby babies""",
    "text": """
        n Buch Bücher book books     m Brief Briefe letter letters     n Gedicht Gedichte poem poems
        m Bericht Berichte report reports   f Geschichte Geschichten story stories
        f Zeitung Zeitungen newspaper newspapers""",
    "food": """
        m Apfel Äpfel apple apples   m Kuchen Kuchen cake cakes        f Suppe Suppen soup soups
        f Birne Birnen pear pears    f Kartoffel Kartoffeln potato potatoes  n Ei Eier egg eggs""",
    "opening": """
        f Tür Türen door doors       f Tasche Taschen bag bags         f Kiste Kisten box boxes
        m Koffer Koffer suitcase suitcases  m Schrank Schränke cupboard cupboards
        n Fenster Fenster window windows""",
    "object": """
        n Bild Bilder picture pictures  m Schlüssel Schlüssel key keys    f Uhr Uhren clock clocks
        f Blume Blumen flower flowers   n Geschenk Geschenke present presents
        m Mantel Mäntel coat coats      f Flasche Flaschen bottle bottles f Lampe Lampen lamp lamps
        n Fahrrad Fahrräder bicycle bicycles   m Stuhl Stühle chair chairs""",
}
KINDS = {kind: (kind,) for kind in NOUN_TABLES} | {
    "portable": ("text", "food", "object"),
    "thing": ("text", "food", "opening", "object"),
    "any": tuple(NOUN_TABLES),
}

# Gender, noun, English, the prepositions of a place (dative), those of a goal ("in" + accusative).
PLACE_TABLE = """
    m Garten garden in in in into     f Stadt city in in in into     m Park park in in in into
    f Küche kitchen in in in into     n Haus house in in in into     m Wald forest in in in into
    n Büro office in in in into       n Zimmer room in in in into    n Dorf village in in in into
    m Bahnhof station an at zu to     m Markt market auf at zu to    m Strand beach an at zu to
    f Schule school in in zu to       f Kirche church in in zu to    f Brücke bridge auf on zu to"""

# Predicate, stem before endings, English, what it describes: p(erson), t(hing), l(ocation).
ADJECTIVE_TABLE = """
    klein klein small ptl      groß groß big ptl          schön schön beautiful ptl
    alt alt old ptl            jung jung young p          müde müd tired p
    krank krank ill p          reich reich rich p         freundlich freundlich friendly p
    nett nett nice p           arm arm poor p             glücklich glücklich happy p
    traurig traurig sad p      ruhig ruhig quiet pl       berühmt berühmt famous pl
    neu neu new tl             teuer teur expensive t     billig billig cheap t
    schwer schwer heavy t      leicht leicht light t      rot rot red t
    blau blau blue t           grün grün green t          schwarz schwarz black t
    weiß weiß white t"""

# Infinitive (particle|verb), du, er, participle, auxiliary of the perfect, what the object can be,
# English base and past. A prepositional verb adds preposition, case and English preposition.
VERB_TABLES = {
    "accusative": """
        kaufen      kaufst    kauft    gekauft     haben thing     buy       bought
        verkaufen   verkaufst verkauft verkauft    haben thing     sell      sold
        finden      findest   findet   gefunden    haben any       find      found
        suchen      suchst    sucht    gesucht     haben any       look_for  looked_for
        sehen       siehst    sieht    gesehen     haben any       see       saw
        tragen      trägst    trägt    getragen    haben portable  carry     carried
        lesen       liest     liest    gelesen     haben text      read      read
        essen       isst      isst     gegessen    haben food      eat       ate
        besuchen    besuchst  besucht  besucht     haben person    visit     visited
        hören       hörst     hört     gehört      haben person    hear      heard
        treffen     triffst   trifft   getroffen   haben person    meet      met
        an|rufen    rufst     ruft     gerufen     haben person    call      called
        ein|laden   lädst     lädt     geladen     haben person    invite    invited
        an|sehen    siehst    sieht    gesehen     haben any       look_at   looked_at
        aus|suchen  suchst    sucht    gesucht     haben thing     choose    chose
        auf|machen  machst    macht    gemacht     haben opening   open      opened
        zu|machen   machst    macht    gemacht     haben opening   close     closed
        mit|bringen bringst   bringt   gebracht    haben portable  bring     brought
        weg|werfen  wirfst    wirft    geworfen    haben portable  discard   discarded""",
    "dative": """
        helfen      hilfst    hilft    geholfen    haben person    help      helped
        danken      dankst    dankt    gedankt     haben person    thank     thanked
        folgen      folgst    folgt    gefolgt     sein  person    follow    followed
        zu|hören    hörst     hört     gehört      haben person    listen_to listened_to
        zu|sehen    siehst    sieht    gesehen     haben person    watch     watched""",
    "ditransitive": """
        geben       gibst     gibt     gegeben     haben portable  give      gave
        zeigen      zeigst    zeigt    gezeigt     haben thing     show      showed
        schicken    schickst  schickt  geschickt   haben portable  send      sent""",
    "intransitive": """
        schlafen    schläfst  schläft  geschlafen  haben -         sleep     slept
        arbeiten    arbeitest arbeitet gearbeitet  haben -         work      worked
        tanzen      tanzt     tanzt    getanzt     haben -         dance     danced
        singen      singst    singt    gesungen    haben -         sing      sang
        auf|stehen  stehst    steht    gestanden   sein  -         get_up    got_up
        auf|wachen  wachst    wacht    gewacht     sein  -         wake_up   woke_up
        ein|schlafen schläfst schläft  geschlafen  sein  -         fall_asleep fell_asleep
        an|kommen   kommst    kommt    gekommen    sein  -         arrive    arrived
        zurück|kommen kommst  kommt    gekommen    sein  -         come_back came_back
        weg|laufen  läufst    läuft    gelaufen    sein  -         run_away  ran_away""",
    "direction": """
        gehen       gehst     geht     gegangen    sein  -         go        went
        kommen      kommst    kommt    gekommen    sein  -         come      came
        laufen      läufst    läuft    gelaufen    sein  -         run       ran""",
    "prepositional": """
        warten   wartest  wartet  gewartet   haben any    wait  waited  auf accusative for
        denken   denkst   denkt   gedacht    haben any    think thought an  accusative of
        sprechen sprichst spricht gesprochen haben person speak spoke   mit dative     with
        träumen  träumst  träumt  geträumt   haben any    dream dreamed von dative     of""",
    "possession": """
        gehören     gehörst   gehört   gehört      haben person    belong_to belonged_to
        gefallen    gefällst  gefällt  gefallen    haben person    please    pleased""",
    "reporting": """
        sagen       sagst     sagt     gesagt      haben -         say       said
        wissen      weißt     weiß     gewusst     haben -         know      knew
        glauben     glaubst   glaubt   geglaubt    haben -         believe   believed
        fragen      fragst    fragt    gefragt     haben -         ask       asked""",
}

# Forms for ich, du, er, wir, ihr, sie; the index into every such row is called `slot`.
IRREGULAR_FORMS = {
    "sein": "bin bist ist sind seid sind",
    "haben": "habe hast hat haben habt haben",
    "werden": "werde wirst wird werden werdet werden",
    "können": "kann kannst kann können könnt können",
    "müssen": "muss musst muss müssen müsst müssen",
    "wollen": "will willst will wollen wollt wollen",
    "sollen": "soll sollst soll sollen sollt sollen",
    "dürfen": "darf darfst darf dürfen dürft dürfen",
    "wissen": "weiß weißt weiß wissen wisst wissen",
}
PAST_OF_SEIN = "war warst war waren wart waren".split()
BE = {"present": "am are is are are are".split(), "past": "was were was were were were".split()}

# What stands in second place and leaves the lexical verb to the end. "want to" and "have to" take
# do-support, the other auxiliaries do not. The German perfect is the English past.
MODALS = {"werden": "will", "können": "can", "sollen": "should", "dürfen": "may",
          "wollen": "want to", "müssen": "have to"}
TENSE_WEIGHTS = {"present": 8, "past": 8, "werden": 3, "können": 2, "sollen": 1, "dürfen": 1,
                 "wollen": 2, "müssen": 2}

# Nominative, accusative, dative, English, slot. An accusative "sie" is always "her": every German
# sentence has one translation.
PRONOUN_TABLE = """
    ich mich mir I me 0     du  dich dir  you you  1     er  ihn  ihm he  him 2
    sie sie  ihr she her 2  wir uns  uns  we  us   3     ihr euch euch you you 4
    sie -    ihnen they them 5"""

# German, English and, where the words do not correspond one by one, their links.
TIME_TABLES = {
    "present": """
        heute today -                        jetzt now -
        montags on_Mondays 0-0_0-1           am_Abend in_the_evening 0-0_0-1_1-2""",
    "past": """
        gestern yesterday -                  vor_zwei_Tagen two_days_ago 0-2_1-0_2-1
        letzte_Woche last_week -             vor_drei_Jahren three_years_ago 0-2_1-0_2-1""",
    "werden": """
        morgen tomorrow -                    in_zwei_Tagen in_two_days -
        nächste_Woche next_week -            am_Montag on_Monday -""",
    "modal": """
        heute today -                        morgen tomorrow -
        am_Montag on_Monday -                am_Abend in_the_evening 0-0_0-1_1-2""",
}

# Subjunction, English, and the tenses that (main clause, subordinate clause) may have.
FREE = [(main, other) for main in TENSE_WEIGHTS for other in ("present", "past", "wollen")]
SUBJUNCTIONS = [
    ("weil", "because", FREE),
    ("obwohl", "although", FREE),
    ("wenn", "if", [(main, "present") for main in TENSE_WEIGHTS if main != "past"]),
    ("als", "when", [("past", "past")]),
    ("während", "while", [("present", "present"), ("past", "past")]),
]

# Columns m, f, n, plural. "article" and "ein" are endings of determiners, "weak" and "mixed" of
# adjectives, "strong" of both.
GENDERS = ("m", "f", "n", "plural")
ENDINGS = {
    "article": {"nominative": "der die das die", "accusative": "den die das die",
                "dative": "dem der dem den"},
    "ein": {"nominative": "- e - e", "accusative": "en e - e", "dative": "em er em en"},
    "weak": {"nominative": "e e e en", "accusative": "en e e en", "dative": "en en en en"},
    "mixed": {"nominative": "er e es en", "accusative": "en e es en", "dative": "en en en en"},
    "strong": {"nominative": "er e es e", "accusative": "en e es e", "dative": "em er em en"},
    "none": {"nominative": "- - - -", "accusative": "- - - -", "dative": "- - - -"},
}
ENDINGS["relative"] = ENDINGS["article"] | {"dative": "dem der dem denen"}
CONTRACTIONS = {("an", "dem"): "am", ("in", "dem"): "im", ("in", "das"): "ins",
                ("von", "dem"): "vom", ("zu", "dem"): "zum", ("zu", "der"): "zur"}


def table(text, width):
    """Cut a text table into rows of `width` cells."""
    cells = [cell.replace("_", " ") if cell != "-" else "" for cell in text.split()]
    return [cells[start : start + width] for start in range(0, len(cells), width)]


def ending(declension, case, gender):
    """A cell of ENDINGS."""
    return ENDINGS[declension][case].split()[GENDERS.index(gender)].strip("-")


Noun = namedtuple("Noun", "gender weak singular plural english english_plural kind")
Adjective = namedtuple("Adjective", "predicate stem english describes")
Verb = namedtuple(
    "Verb", "frame particle base forms participle auxiliary objects english past preposition"
)
# `own` is the declension of the determiner, `next` that of an adjective after it.
Determiner = namedtuple("Determiner", "stem own next english english_plural")


def conjugate(infinitive, second, third):
    """The six present forms; only du and er change the stem of a regular or strong verb."""
    if infinitive in IRREGULAR_FORMS:
        return tuple(IRREGULAR_FORMS[infinitive].split())
    stem = infinitive.removesuffix("en")
    second_plural = stem + ("et" if stem[-1] in "td" else "t")
    return (stem + "e", second, third, infinitive, second_plural, infinitive)


def read_verbs(frame):
    """The verbs of one table."""
    for row in table(VERB_TABLES[frame], 11 if frame == "prepositional" else 8):
        infinitive, second, third, participle, auxiliary, objects, english, past, *preposition = row
        particle, _, base = infinitive.rpartition("|")
        forms, kinds = conjugate(base, second, third), KINDS.get(objects, ())
        yield Verb(
            frame, particle, base, forms, participle, auxiliary, kinds, english, past, preposition
        )


def number_words():
    """German and English for 2 to 12, 20 to 39, 40, 50 and 60."""
    units = "ein one zwei two drei three vier four fünf five sechs six sieben seven acht eight"
    units = table(units + " neun nine", 2)
    tens = table("zwanzig twenty dreißig thirty vierzig forty fünfzig fifty sechzig sixty", 2)
    yield from units[1:] + table("zehn ten elf eleven zwölf twelve", 2) + tens
    for german_ten, english_ten in tens[:2]:
        for german, english in units:
            yield f"{german}und{german_ten}", f"{english_ten}-{english}"


NOUNS = {
    kind: [Noun(row[0].replace("w", "m"), row[0] == "w", *row[1:], kind) for row in table(text, 5)]
    for kind, text in NOUN_TABLES.items()
}
PLACES = [
    (Noun(gender, False, german, "", english, "", "location"), prepositions)
    for gender, german, english, *prepositions in table(PLACE_TABLE, 7)
]
ADJECTIVES = [Adjective(*row) for row in table(ADJECTIVE_TABLE, 4)]
VERBS = {frame: list(read_verbs(frame)) for frame in VERB_TABLES}
COPULA = Verb("copula", "", "sein", conjugate("sein", "", ""), "", "", (), "be", "", ())

THE = Determiner("", "article", "weak", "the", "the")
A = Determiner("ein", "ein", "mixed", "a", "")
NO = Determiner("kein", "ein", "mixed", "a", "any")
BARE = Determiner("", "none", "strong", "", "")
THIS = Determiner("dies", "strong", "weak", "this", "these")
EVERY = Determiner("jed", "strong", "weak", "every", "")
WHICH = Determiner("welch", "strong", "weak", "which", "which")
POSSESSIVES = tuple(
    Determiner(german, "ein", "mixed", english, english)
    for german, english in table("mein my  dein your  sein his  ihr her  unser our", 2)
)
NUMBERS = tuple(
    Determiner(german, "none", "strong", "", english) for german, english in number_words()
)


# ------------------------------------------------------------------------------------------- trees
class Token(NamedTuple):
    """A word and the units of meaning it expresses."""

    text: str
    units: frozenset = frozenset()


class Pair(NamedTuple):
    """German tokens and the English tokens that translate them."""

    german: list
    english: list


NOTHING = Pair([], [])


def words(text, *units):
    """The words of `text`, each expressing all the `units`."""
    return [Token(word, frozenset(units)) for word in text.split()]


def fixed_pair(german, english, links=""):
    """A phrase and its translation, linked word by word unless `links` says otherwise."""
    phrase = object()
    pairs = [tuple(map(int, link.split("-"))) for link in links.split()]
    pairs = pairs or [(index, index) for index in range(len(german.split()))]

    def side(text, position):
        return [
            Token(word, frozenset((phrase, pair) for pair in pairs if pair[position] == index))
            for index, word in enumerate(text.split())
        ]

    return Pair(side(german, 0), side(english, 1))


# eq=False: nodes compare by identity, so that (node, "noun") names one unit of one sentence.
@dataclass(eq=False)
class NounPhrase:
    """Determiner, adjectives and noun, perhaps with a relative clause."""

    noun: Noun
    determiner: Determiner = THE
    plural: bool = False
    adjectives: tuple = ()
    relative: Pair = NOTHING

    @property
    def gender(self):
        """The column of the inflection tables: in the plural, gender makes no difference."""
        return "plural" if self.plural else self.noun.gender

    @property
    def slot(self):
        """The verb form that agrees with this subject."""
        return 5 if self.plural else 2

    @property
    def kind(self):
        """What the noun names, which decides the verbs and adjectives that go with it."""
        return self.noun.kind

    def german(self, case):
        """Tokens in `case`; the clause around decides where the relative clause goes."""
        stem, own, following, *_ = self.determiner
        units = [(self, "determiner")] + [(self, "negation")] * (self.determiner is NO)
        own, following = ending(own, case, self.gender), ending(following, case, self.gender)
        return [
            *words(stem + own, *units),
            *(Token(adj.stem + following, frozenset([(self, adj)])) for adj in self.adjectives),
            *words(self.german_noun(case), (self, "noun")),
        ]

    def german_noun(self, case):
        """Weak masculines and the dative plural change the noun itself."""
        noun = self.noun
        if not self.plural:
            return noun.plural if noun.weak and case != "nominative" else noun.singular
        return noun.plural + ("n" if case == "dative" and noun.plural[-1] not in "ns" else "")

    def english(self, subject):
        """Tokens with the relative clause; only pronouns care whether they are the `subject`."""
        determiner = self.determiner.english_plural if self.plural else self.determiner.english
        noun = self.noun.english_plural if self.plural else self.noun.english
        return [
            *words(determiner, (self, "determiner")),
            *(Token(adj.english, frozenset([(self, adj)])) for adj in self.adjectives),
            *words(noun, (self, "noun")),
            *self.relative.english,
        ]


@dataclass(eq=False)
class Pronoun:
    """A personal, relative or interrogative pronoun."""

    forms: dict
    english_subject: str
    english_object: str
    slot: int = 2
    kind: str = "person"
    determiner = None
    relative = NOTHING

    def german(self, case):
        """The token in `case`."""
        return words(self.forms[case], (self, "pronoun"))

    def english(self, subject):
        """The token for its place in the English clause."""
        return words(self.english_subject if subject else self.english_object, (self, "pronoun"))


@dataclass(eq=False)
class Argument:
    """A noun phrase in the case that its verb or its preposition asks for."""

    phrase: NounPhrase | Pronoun
    case: str
    preposition: str = ""
    english_preposition: str = ""

    def german(self):
        """Preposition and phrase; "in dem" is one word, "im", that expresses both."""
        first, *rest = self.phrase.german(self.case)
        preposition = words(self.preposition, (self, "preposition"))
        contraction = CONTRACTIONS.get((self.preposition, first.text))
        if contraction:
            return [Token(contraction, preposition[0].units | first.units), *rest]
        return [*preposition, first, *rest]

    def english(self):
        """Preposition and phrase."""
        preposition = words(self.english_preposition, (self, "preposition"))
        return preposition + self.phrase.english(subject=False)

    def shows_case(self):
        """Whether the words themselves rule out that the phrase is a subject."""
        nominative = [token.text for token in self.phrase.german("nominative")]
        return bool(self.preposition) or [token.text for token in self.german()] != nominative


ROLES = ("dative", "accusative", "complement", "place")  # in English order


@dataclass(eq=False)
class Clause:
    """A verb and what goes with it, before either language puts it in order.

    The roles of `arguments` are "dative", "accusative", "place" and "complement", the prepositional
    phrase that the verb asks for. `reported` holds a dass-clause, comma included.
    """

    subject: NounPhrase | Pronoun
    verb: Verb
    tense: str
    negated: bool = False
    arguments: dict = field(default_factory=dict)
    time: Pair = NOTHING
    predicate: Pair = NOTHING
    reported: Pair = NOTHING

    def objects(self):
        """The arguments without preposition, by role."""
        return {role: self.arguments[role] for role in ROLES[:2] if role in self.arguments}

    def drop_adverbials(self):
        """Keep only what the verb itself asks for."""
        self.time = NOTHING
        self.arguments.pop("place", None)


# ------------------------------------------------------------------------------------------ German
def german_verbs(clause, verb_final):
    """The finite verb, and what ends the clause: participle, infinitive or separated particle."""
    verb, slot = clause.verb, clause.subject.slot
    finite, lexical = (clause, "finite"), (clause, "lexical")
    past_of_sein = verb is COPULA and clause.tense == "past"
    if clause.tense == "present" or past_of_sein:
        form = PAST_OF_SEIN[slot] if past_of_sein else verb.forms[slot]
        if verb_final:
            return words(verb.particle + form, finite, lexical), []
        return words(form, finite, lexical), words(verb.particle, lexical)
    if clause.tense == "past":
        helper, final = verb.auxiliary, verb.particle + verb.participle
    else:
        helper, final = clause.tense, verb.particle + verb.base
    return words(IRREGULAR_FORMS[helper].split()[slot], finite), words(final, lexical)


def german_relative(phrase):
    """The relative clause of a noun phrase, between its commas."""
    relative = phrase.relative.german
    return [*words(","), *relative, *words(",")] if relative else []


def german_fields(clause):
    """What stands between the verbs, by role and in order."""
    objects = {role: argument.german() for role, argument in clause.objects().items()}
    phrases = {role: argument.phrase for role, argument in clause.objects().items()}
    pronouns = [role for role, phrase in phrases.items() if isinstance(phrase, Pronoun)]
    has_kein = any(phrase.determiner is NO for phrase in phrases.values())
    needs_nicht = clause.negated and not has_kein
    prepositional = [role for role in ("place", "complement") if role in clause.arguments]
    return {
        "subject": clause.subject.german("nominative") + german_relative(clause.subject),
        **{role: objects.pop(role) for role in pronouns},
        "time": clause.time.german,
        **objects,
        "negation": words("nicht", (clause, "negation")) if needs_nicht else [],
        **{role: clause.arguments[role].german() for role in prepositional},
        "predicate": clause.predicate.german,
    }


def german_postponed(clause):
    """What follows even the final verb: the relative clause of an object, and a dass-clause."""
    relatives = [german_relative(argument.phrase) for argument in clause.objects().values()]
    return sum(relatives, []) + clause.reported.german


def german_main(clause, front="subject", opening=()):
    """Verb second, after the role `front` or a ready-made `opening`; with neither, verb first."""
    fields = german_fields(clause)
    first = list(opening) if opening or not front else fields.pop(front)
    finite, final = german_verbs(clause, verb_final=False)
    return first + finite + sum(fields.values(), []) + final + german_postponed(clause)


def german_subordinate(clause, introducer=()):
    """Verb last, after a subjunction or a relative pronoun, unless that is the subject itself."""
    fields = sum(german_fields(clause).values(), [])
    finite, final = german_verbs(clause, verb_final=True)
    return [*introducer, *fields, *final, *finite, *german_postponed(clause)]


# ----------------------------------------------------------------------------------------- English
def third_person(verb):
    """Inflect the first word: look for -> looks for."""
    first, *rest = verb.split()
    if first == "have":
        first = "has"
    elif first.endswith("y") and first[-2] not in "aeiou":
        first = first[:-1] + "ies"
    else:
        first += "es" if first.endswith(("s", "sh", "ch", "x", "o")) else "s"
    return " ".join([first, *rest])


def english_verbs(clause, inverted):
    """An auxiliary, if there is one, and the rest; do-support in negations and questions."""
    finite, lexical = (clause, "finite"), (clause, "lexical")
    tense, verb, slot = clause.tense, clause.verb, clause.subject.slot
    agree = third_person if slot == 2 else str
    modal = MODALS.get(tense, "")
    if modal and not modal.endswith(" to"):
        return words(modal, finite), words(verb.english, lexical)
    if verb is COPULA and not modal:
        return words(BE[tense][slot], finite, lexical), []
    if inverted or clause.negated:
        support = "did" if tense == "past" else agree("do")
        return words(support, finite), words(modal, finite) + words(verb.english, lexical)
    if modal:
        return [], words(agree(modal), finite) + words(verb.english, lexical)
    return [], words(verb.past if tense == "past" else agree(verb.english), finite, lexical)


def english_clause(clause, inverted=False, introducer=()):
    """Subject, verb, objects, place, time; `inverted` puts the auxiliary before the subject."""
    auxiliary, main = english_verbs(clause, inverted)
    subject = clause.subject.english(subject=True)
    # "not" expresses the negation of the clause, which German may have put into an object's "kein".
    units = [(clause, "negation"), *((a.phrase, "negation") for a in clause.arguments.values())]
    negation = words("not", *units) if clause.negated else []
    if negation and not inverted and auxiliary[0].text == "can":
        auxiliary, negation = [Token("cannot", auxiliary[0].units | negation[0].units)], []
    arguments = [clause.arguments[role].english() for role in ROLES if role in clause.arguments]
    return [
        *introducer,
        *(auxiliary + subject if inverted else subject + auxiliary),
        *negation,
        *main,
        *clause.predicate.english,
        *sum(arguments, []),
        *clause.time.english,
        *clause.reported.english,
    ]


def render(pair):
    """Lines of text from tokens: German, English, alignment.

    A comma before another comma or the end is dropped, and "a" becomes "an" before a vowel.
    """
    followed = zip(pair.german, [*pair.german[1:], Token("")], strict=True)
    german = [token for token, after in followed if token.text != "," or after.text not in ",.?"]
    english = [token.text for token in pair.english]
    for index, after in enumerate(english[1:]):
        if english[index] == "a" and after[0] in "aeiou":
            english[index] = "an"
    links = (
        f"{i}-{j}"
        for i, german_token in enumerate(german)
        for j, english_token in enumerate(pair.english)
        if german_token.units & english_token.units
    )
    return " ".join(token.text for token in german), " ".join(english), " ".join(links)


# ---------------------------------------------------------------------------------------- sampling
# How often the grammar does what.
SENTENCES = {"statement": 6, "polar_question": 2, "content_question": 2, "subordination": 4,
             "report": 2, "pronoun_for_a_thing": 1}
THING_FRAMES = {"possession": 2, "copula": 3}
PERSON_FRAMES = {"accusative": 10, "dative": 4, "ditransitive": 4, "intransitive": 6,
                 "direction": 4, "prepositional": 4, "copula": 4}
DETERMINERS = {
    "singular": {(THE,): 9, (A,): 5, POSSESSIVES: 3, (THIS,): 2, (EVERY,): 1},
    "plural": {(THE,): 6, NUMBERS: 4, (BARE,): 3, POSSESSIVES: 2, (THIS,): 2},
    "definite": {(THE,): 6, POSSESSIVES: 2, (THIS,): 1},
    "negated": {(THE,): 4, (NO,): 5, POSSESSIVES: 2, (THIS,): 1},
}
FRONTS = {"subject": 6, "time": 8, "place": 3, "accusative": 4, "dative": 4}
ARGUMENTS = {
    "accusative": ["accusative"],
    "dative": ["dative"],
    "ditransitive": ["dative", "accusative"],
    "possession": ["dative"],
    "direction": ["complement"],
    "prepositional": ["complement"],
}
HAS_PLACE = ("accusative", "dative", "ditransitive", "intransitive")
# Things do not want, may or must: as subjects they stay in these tenses.
THING_TENSES = ("present", "past", "werden")


class Grammar:
    """Draws trees at random; one method for each kind of phrase, clause and sentence."""

    def __init__(self, rng):
        self.rng = rng

    def chance(self, probability):
        """True with this probability."""
        return self.rng.random() < probability

    def weighted(self, weights):
        """A key of `weights`, each as often as its value says."""
        return self.rng.choices(list(weights), list(weights.values()))[0]

    # Noun phrases

    def adjective(self, kind):
        """An adjective that can describe such a noun."""
        letter = {"person": "p", "location": "l"}.get(kind, "t")
        return self.rng.choice([adj for adj in ADJECTIVES if letter in adj.describes])

    def adjectives(self, kind):
        """One adjective or none."""
        return (self.adjective(kind),) if self.chance(0.4) else ()

    def noun_phrase(self, kind, determiners=""):
        """Any noun phrase of this kind; `determiners` narrows the choice of determiner."""
        plural = self.chance(0.3)
        choices = DETERMINERS[determiners or ("plural" if plural else "singular")]
        determiner = self.rng.choice(self.weighted(choices))
        return NounPhrase(self.rng.choice(NOUNS[kind]), determiner, plural, self.adjectives(kind))

    def nominal(self, kinds, case, determiners="", pronouns=0.25):
        """A noun phrase or, for persons with probability `pronouns`, a pronoun."""
        kind = self.rng.choice(kinds)
        if kind == "person" and self.chance(pronouns):
            return self.rng.choice([pro for pro in personal_pronouns() if pro.forms[case]])
        return self.noun_phrase(kind, determiners)

    def place(self, goal=False):
        """Where something happens, or where a movement ends."""
        noun, (*place_prepositions, goal_preposition, goal_english) = self.rng.choice(PLACES)
        phrase = NounPhrase(noun, adjectives=self.adjectives("location"))
        if not goal:
            return Argument(phrase, "dative", *place_prepositions)
        case = "accusative" if goal_preposition == "in" else "dative"
        return Argument(phrase, case, goal_preposition, goal_english)

    def relative_clause(self, head):
        """A clause whose subject or object is the relative pronoun."""
        person = head.kind == "person"
        forms = {case: ending("relative", case, head.gender) for case in ENDINGS["relative"]}
        english = ("who", "whom") if person else ("that", "that")
        pronoun = Pronoun(forms, *english, slot=head.slot, kind=head.kind)
        case = self.weighted({"nominative": 5, "accusative": 4, "dative": 2 if person else 0})
        # "die Frau , die das Kind sieht": who sees whom? Such a "die" or "das" is the subject.
        if case == "nominative" or person and not Argument(pronoun, case).shows_case():
            tense = "" if person else self.rng.choice(THING_TENSES)
            clause = self.clause(tense, subject=pronoun)
            return Pair(german_subordinate(clause), english_clause(clause))
        verb = self.rng.choice([verb for verb in VERBS[case] if head.kind in verb.objects])
        introducer = Pair(pronoun.german(case), pronoun.english(subject=False))
        return subordinate(introducer, self.clause(verb=verb, gap=case))

    # Clauses

    def clause(self, tense="", subject=None, verb=None, gap="", relatives=False):
        """A clause; `gap` is the role that a relative or interrogative pronoun takes out of it."""
        negated = self.chance(0.2)
        tense = tense or self.weighted(TENSE_WEIGHTS)
        about_thing = not verb and tense in THING_TENSES and self.chance(0.2)
        subject = subject or self.subject("thing" if about_thing else "person", negated)
        verb = verb or self.verb(subject)
        clause = Clause(subject, verb, tense, negated)
        if verb is COPULA:
            self.add_predicate(clause)
        for role in ARGUMENTS.get(verb.frame, []):
            if role != gap:
                clause.arguments[role] = self.argument(clause, role)
        # After a relative clause at its end, an adverbial would seem to belong to that one.
        if not (relatives and self.add_relative_clause(clause)):
            self.add_adverbials(clause)
        return clause

    def subject(self, kind, negated):
        """Any subject; next to nicht no number and no "jeder", whose scope would be unclear."""
        determiners = "definite" if negated else ""
        return self.nominal(KINDS[kind], "nominative", determiners, pronouns=0.35)

    def verb(self, subject):
        """A verb, or sein, that goes with the subject."""
        frame = self.weighted(PERSON_FRAMES if subject.kind == "person" else THING_FRAMES)
        return COPULA if frame == "copula" else self.rng.choice(VERBS[frame])

    def add_predicate(self, clause):
        """After sein: where the subject is, or what it is like."""
        if self.chance(0.25):
            clause.arguments["complement"] = self.place()
        else:
            adjective = self.adjective(clause.subject.kind)
            clause.predicate = fixed_pair(adjective.predicate, adjective.english)

    def argument(self, clause, role):
        """What the verb asks for in this role; in a negated clause, one object may take kein."""
        verb = clause.verb
        if verb.frame == "direction":
            return self.place(goal=True)
        determiners = "definite" if clause.negated else ""
        if verb.frame == "prepositional":
            preposition, case, english = verb.preposition
            phrase = self.nominal(verb.objects, case, determiners, pronouns=0)
            return Argument(phrase, case, preposition, english)
        if clause.negated and role == ARGUMENTS[verb.frame][-1]:
            determiners = "negated"
        kinds = KINDS["person"] if role == "dative" else verb.objects
        phrase = self.nominal(kinds, role, determiners)
        while phrase.slot % 3 == clause.subject.slot % 3 != 2:  # "ich sehe mich": a reflexive
            phrase = self.nominal(kinds, role, determiners)
        return Argument(phrase, role)

    def add_relative_clause(self, clause):
        """Perhaps give subject or object a relative clause; tell whether an object has got one."""
        last_object = [argument.phrase for argument in clause.objects().values()][-1:]
        for phrase in (clause.subject, *last_object):
            if phrase.determiner in (THE, A, NO, EVERY) and self.chance(0.13):
                phrase.relative = self.relative_clause(phrase)
                return phrase is not clause.subject
        return False

    def add_adverbials(self, clause):
        """Perhaps a time, perhaps a place."""
        if self.chance(0.4):
            rows = table(TIME_TABLES.get(clause.tense, TIME_TABLES["modal"]), 3)
            clause.time = fixed_pair(*self.rng.choice(rows))
        if clause.verb.frame in HAS_PLACE and self.chance(0.25):
            clause.arguments["place"] = self.place()

    # Sentences

    def sentence(self):
        """German, English and alignment of any kind of sentence."""
        return render(getattr(self, self.weighted(SENTENCES))())

    def statement(self):
        """One main clause, with anything in front."""
        clause = self.clause(relatives=True)
        return finish(german_main(clause, self.front(clause)), english_clause(clause))

    def front(self, clause):
        """The role that stands before the verb; an object only if its case shows it is one."""
        roles = {"subject"} | ({"time"} if clause.time.german else set())
        for role, argument in clause.arguments.items():
            if argument.shows_case() and not argument.phrase.relative.german:
                roles.add(role)
        return self.weighted({role: FRONTS[role] for role in FRONTS if role in roles})

    def polar_question(self):
        """A question for yes or no."""
        clause = self.clause(relatives=True)
        return finish(german_main(clause, front=""), english_clause(clause, inverted=True), "?")

    def content_question(self):
        """Who, whom, what, which, how many, when, where, why."""
        asked = self.weighted({"subject": 1, "object": 2, "adverb": 1})
        if asked == "subject":
            clause = self.clause(subject=Pronoun({"nominative": "wer"}, "who", ""))
            return finish(german_main(clause), english_clause(clause), "?")
        opening, clause = self.ask_object() if asked == "object" else self.ask_adverb()
        german = german_main(clause, opening=opening.german)
        english = english_clause(clause, inverted=True, introducer=opening.english)
        return finish(german, english, "?")

    def ask_adverb(self):
        """The words that ask why, when or where, and the rest of the question."""
        opening = fixed_pair(*self.rng.choice(table("warum why  wann when  wo where", 2)))
        clause = self.clause(verb=self.rng.choice(VERBS["accusative"] + VERBS["intransitive"]))
        clause.drop_adverbials()
        return opening, clause

    def ask_object(self):
        """The words that ask for an object, and the rest of the question, without that object."""
        verb = self.rng.choice(VERBS["accusative"] + VERBS["dative"] + VERBS["ditransitive"])
        case = "dative" if verb.frame == "dative" else "accusative"
        kind = self.rng.choice(verb.objects)
        return self.interrogative(kind, case), self.clause(verb=verb, gap=case)

    def interrogative(self, kind, case):
        """A pronoun, "which ..." or "how many ...", as an object."""
        style = self.weighted({"pronoun": 5, "which": 3, "how many": 2})
        if style == "pronoun" and kind == "person":
            return fixed_pair("wen" if case == "accusative" else "wem", "whom")
        if style == "pronoun":
            return fixed_pair("was", "what")
        noun = self.rng.choice(NOUNS[kind])
        plural = style == "how many"
        phrase = NounPhrase(noun, BARE if plural else WHICH, plural)
        opening = fixed_pair("wie viele", "how many") if plural else NOTHING
        return Pair(opening.german + phrase.german(case), opening.english + phrase.english(False))

    def subordination(self):
        """Main and subordinate clause, in either order."""
        subjunction, english, tenses = self.rng.choice(SUBJUNCTIONS)
        weights = {pair: TENSE_WEIGHTS[pair[0]] * TENSE_WEIGHTS[pair[1]] for pair in tenses}
        main, other = (self.clause(tense) for tense in self.weighted(weights))
        if tenses is not FREE:
            other.drop_adverbials()  # no "yesterday ... when ... three years ago"
        other = subordinate(fixed_pair(subjunction, english), other)
        if self.chance(0.6):
            german = german_main(main, self.front(main)) + words(",") + other.german
            return finish(german, english_clause(main) + other.english)
        comma = words(",", "comma")
        german = german_main(main, opening=other.german + comma)
        return finish(german, other.english + comma + english_clause(main))

    def report(self):
        """Somebody says that, asks whether, does not know whether."""
        verb = self.rng.choice(VERBS["reporting"])
        clause = self.clause(verb=verb)
        clause.drop_adverbials()
        whether = verb.base == "fragen" or verb.base == "wissen" and clause.negated
        introducer = fixed_pair("ob", "whether") if whether else fixed_pair("dass", "that")
        # English "knew that" asks for a past: "knew that he called".
        tense = "past" if clause.tense == "past" else ""
        reported = subordinate(introducer, self.clause(tense, relatives=True))
        clause.reported = Pair(words(",") + reported.german, reported.english)
        if self.chance(0.15):
            return finish(german_main(clause, front=""), english_clause(clause, inverted=True), "?")
        return finish(german_main(clause), english_clause(clause))

    def pronoun_for_a_thing(self):
        """A reason about the object of the main clause: er, sie or es by gender, it in English."""
        verbs = [verb for verb in VERBS["accusative"] if "person" not in verb.objects]
        main = self.clause(verb=self.rng.choice(verbs))
        thing = main.arguments["accusative"].phrase
        forms = {"nominative": dict(m="er", f="sie", n="es", plural="sie")[thing.gender]}
        pronoun = Pronoun(forms, "they" if thing.plural else "it", "", thing.slot)
        reason = Clause(pronoun, COPULA, self.rng.choice(["present", "past"]))
        # An adjective that fits no person leaves no doubt whether "er" is "he".
        adjective = self.rng.choice([adj for adj in ADJECTIVES if adj.describes == "t"])
        reason.predicate = fixed_pair(adjective.predicate, adjective.english)
        subjunction, english, _ = self.rng.choice(SUBJUNCTIONS[:2])
        reason = subordinate(fixed_pair(subjunction, english), reason)
        german = german_main(main, self.front(main)) + words(",") + reason.german
        return finish(german, english_clause(main) + reason.english)


def personal_pronouns():
    """Fresh ones every time, because a node has one place in one sentence."""
    for *german, english_subject, english_object, slot in table(PRONOUN_TABLE, 6):
        forms = dict(zip(ENDINGS["article"], german, strict=True))
        yield Pronoun(forms, english_subject, english_object, int(slot))


def subordinate(introducer, clause):
    """Both sides of a subordinate clause."""
    german = german_subordinate(clause, introducer.german)
    return Pair(german, english_clause(clause, introducer=introducer.english))


def finish(german, english, mark="."):
    """Both sides of a sentence, with its full stop or question mark."""
    return Pair(german + words(mark, "end"), english + words(mark, "end"))


# ------------------------------------------------------------------------------------------ corpus
SHORTEST, LONGEST = 4, 25  # tokens in a sentence, on either side
MOST_SENTENCES = 1_000_000  # per file; beyond, memory is the limit, not the grammar


def distinct_sentences(draw, patience=10_000):
    """Yield what `draw` makes if of fit length and new on both sides.

    Raises:
        ValueError: after `patience` draws in a row without such a sentence.
    """
    seen, made, failures = set(), 0, 0
    while failures < patience:
        german, english, alignment = draw()
        lengths = len(german.split()), len(english.split())
        keys = {("de", german), ("en", english)}
        if SHORTEST <= min(lengths) and max(lengths) <= LONGEST and not seen & keys:
            seen |= keys
            made, failures = made + 1, 0
            yield german, english, alignment
        else:
            failures += 1
    raise ValueError(f"the grammar makes no more than {made} distinct sentences; ask for fewer")


def write_corpus(out, splits):
    """Write all files beside `out`, then move them in, so that none is ever half-written."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as staging:
        for split, sentences in splits.items():
            for column, suffix in enumerate(("de", "en", "align")):
                text = "".join(sentence[column] + "\n" for sentence in sentences)
                Path(staging, f"{split}.{suffix}").write_text(text, encoding="utf-8")
        out.mkdir(exist_ok=True)
        for path in sorted(Path(staging).iterdir()):
            os.replace(path, out / path.name)


def summary(splits):
    """Size, length and vocabulary of each side."""
    sentences = [sentence for split in splits.values() for sentence in split]
    for column, language in enumerate(("German", "English")):
        tokens = [word for sentence in sentences for word in sentence[column].split()]
        length = len(tokens) / max(len(sentences), 1)
        yield f"{language}: {len(set(tokens))} types, {length:.1f} tokens per sentence"


def sentence_count(text):
    """The argparse type of a number of sentences."""
    if text.isdecimal() and int(text) <= MOST_SENTENCES:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to {MOST_SENTENCES:,}")


def main():
    """Read the command line, draw the sentences, write the files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the nine files")
    parser.add_argument("--seed", type=int, default=1, help="same seed, same files (default: 1)")
    for split, default in (("train", 20000), ("valid", 500), ("test", 500)):
        text = f"sentence pairs in {split} (default: {default})"
        parser.add_argument(f"--{split}", type=sentence_count, default=default, help=text)
    options = parser.parse_args()

    sentences = distinct_sentences(Grammar(random.Random(options.seed)).sentence)
    try:
        # Training data last: asking for more of it leaves test and valid as they were.
        splits = {
            split: [next(sentences) for _ in range(getattr(options, split))]
            for split in ("test", "valid", "train")
        }
        write_corpus(options.out, splits)
    except (OSError, ValueError) as error:
        sys.exit(f"make_demo_corpus: error: {error}")
    for line in summary(splits):
        print(line)


if __name__ == "__main__":
    main()
