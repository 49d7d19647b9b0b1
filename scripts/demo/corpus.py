# SPDX-License-Identifier: Apache-2.0
"""A seeded generator of short English texts: the corpus that the demo checkpoint is trained on."""

import itertools
import random
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from jpaged.scripts.demo import facts, genres, tales, words
from jpaged.scripts.demo.tales import Beat

# A fixed text, a table to draw from, or a function that gives the next text.
Slot = str | tuple[str, ...] | Callable[[], str]

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=(\w+))")
# Words whose first letter does not tell whether they begin with a vowel sound.
_CONSONANT_SOUND = re.compile(r"(?i)one\b|once|use|usual|uni|euro")
_VOWEL_SOUND = re.compile(r"(?i)[aeiou]|hour|honest|honour")
_SAID_I = re.compile(r'(?<=" )(said|asked|cried|called|shouted) I\b')
# Events, which "soon" or "then" may precede; what was or had been is no event.
_EVENT = re.compile(r"\{(?:He|Hero)\} (?!was|had|and|still|could|did|kept|never|only)")
# How-to sentences that no "First" or "Then" may precede.
_NO_STEP_WORD = re.compile(r"There|The |Do not|Let it")

# Topics that one writes and does not tell.
_WRITTEN = ("a letter", "a page", "a poem", "some questions")


class Writer:
    """Turns templates into text.

    In a template `[a|b]` is a choice between a and b, and `{name}` a slot, which stands for what
    `slots` or else `words.TABLES` has under that name; `{Name}` is the same with a capital.
    Choices nest, and what a slot stands for is a template too. The article "a" becomes "an" where
    it should.
    """

    def __init__(self, rng: random.Random, slots: Mapping[str, Slot]):
        """Starts with a random generator and the slots of a text."""
        self.rng = rng
        self.slots: dict[str, Slot] = {**words.TABLES, **slots}

    def __call__(self, template: str) -> str:
        """Expands a template."""
        text = " ".join(self._expand(template).split())
        return _ARTICLE.sub(_article, _SAID_I.sub(r"I \1", text))

    def fix(self, *names: str) -> None:
        """Draws an entry from each of these tables, for slots that are to stay the same."""
        for name in names:
            self.slots[name] = self._expand(self.rng.choice(words.TABLES[name]))

    def lines(self, beats: tuple[Beat, ...], most: tuple[int, ...]) -> list[str]:
        """Writes a line for every beat, made of one to `most` of the beat's alternatives."""
        return [
            self(" ".join(self.rng.sample(beat, self.rng.randint(1, count))))
            for beat, count in zip(beats, most, strict=True)
        ]

    def _expand(self, text: str) -> str:
        # Choices first: a slot in a branch that is not taken must not advance its function.
        while _CHOICE.search(text):
            text = _CHOICE.sub(lambda match: self.rng.choice(match[1].split("|")), text)
        return _SLOT.sub(self._fill, text)

    def _fill(self, match: re.Match) -> str:
        slot = self.slots[match[1].lower()]
        if isinstance(slot, tuple):
            slot = self.rng.choice(slot)
        text = self._expand(slot if isinstance(slot, str) else slot())
        return text if match[1].islower() else text[:1].upper() + text[1:]


def stories(seed: int) -> Iterator[str]:
    """Yields texts without end; equal seeds give equal texts.

    Most are tales; the others are fables, letters, descriptions, facts, how-tos and the like. Some
    begin with a request such as "Tell me a story about a storm.", which the text then answers.

    Args:
      seed: any integer.
    """
    rng = random.Random(seed)
    names, weights = tuple(_GENRES), tuple(_GENRES.values())
    while True:
        genre = rng.choices(names, weights)[0]
        topic, text = genre(rng)
        if rng.random() < 0.12:
            verb = "write" if topic.startswith(_WRITTEN) else rng.choice(("tell me", "write"))
            request = f"please {verb} {topic}." if rng.random() < 0.3 else f"{verb} {topic}."
            text = f"{request[0].upper()}{request[1:]}\n\n{text}"
        yield text


class _Person(NamedTuple):
    """Someone in a text, by name and pronouns."""

    name: str
    he: str
    him: str
    his: str

    def pronouns(self, suffix: str = "") -> dict[str, Slot]:
        """Slots "he", "him" and "his", each with a suffix."""
        return {f"he{suffix}": self.he, f"him{suffix}": self.him, f"his{suffix}": self.his}


def _person(rng: random.Random, sex: str) -> _Person:
    if sex == "he" or rng.random() < 0.5:
        return _Person(rng.choice(words.BOYS), "he", "him", "his")
    return _Person(rng.choice(words.GIRLS), "she", "her", "her")


def _mention(first: str, later: str) -> Slot:
    """A slot that introduces somebody once."""
    return itertools.chain([first], itertools.repeat(later)).__next__


def _scene(rng: random.Random, *, grown: bool) -> Writer:
    """Draws everything that all sentences of a text agree on."""
    region, season = rng.choice(words.REGIONS), rng.choice(words.SEASONS)
    trade = words.TRADES[rng.choice(region.trades)]
    trade2 = rng.choice([noun for noun in region.trades if noun != trade.noun])
    hero = _person(rng, trade.sex if grown else "any")
    friend = next(p for p in iter(lambda: _person(rng, "any"), None) if p.name != hero.name)
    elder = _person(rng, "any")
    kinds = rng.sample(words.TABLES["kind"], 2)
    hobbies = rng.sample(words.TABLES["hobby"], 2)
    goods = rng.sample(words.TABLES["goods"], 3)
    spots = rng.sample(region.spots, 2)
    friend_is = "neighbour" if grown else rng.choice(("best friend", "cousin", "neighbour"))
    if grown:
        noun, elder_name = ("man" if hero.he == "he" else "woman"), f"old {elder.name}"
    else:
        noun = "boy" if hero.he == "he" else "girl"
        elder_name = "{his} " + rng.choice(
            ("grandfather", "uncle") if elder.he == "he" else ("grandmother", "aunt")
        )
    writer = Writer(
        rng,
        {
            "season": season.name,
            "mild": season.adjectives,
            "weather": season.weather,
            "nature": season.nature,
            "people": season.people,
            "month": season.months,
            "home": region.homes,
            "spot": spots[0],
            "spot2": spots[1],
            "wild": region.wilds,
            "sight": region.sights,
            "sound": region.sounds,
            "trade": trade.noun,
            "worked": trade.worked,
            "working": trade.working,
            "tool": trade.tool,
            "workplace": trade.workplace,
            "product": trade.product,
            "does": trade.does,
            "trade2": trade2,
            "age": ("old", "young", kinds[0]),
            "hero": hero.name,
            "heros": f"{hero.name}'s",
            "noun": noun,
            **hero.pronouns(),
            "kind": kinds[0],
            "kind2": kinds[1],
            "hobby": hobbies[0],
            "hobby2": hobbies[1],
            "friend": _mention(f"{{his}} [friend|{friend_is}] {friend.name}", friend.name),
            "friend_name": friend.name,
            **friend.pronouns("2"),
            "elder": elder_name,
            **elder.pronouns("3"),
            "good1": goods[0],
            "good2": goods[1],
            "good3": goods[2],
            "village": rng.choice(words.VILLAGE_STARTS) + rng.choice(words.VILLAGE_ENDS),
            "petname": rng.choice(words.PETS),
            "animal": tuple(facts.ANIMALS),
        },
    )
    for name in ("home", "wild"):
        writer.slots[name] = writer("{" + name + "}")
    writer.fix("pet", "relative", "fear")
    return writer


def _tale(rng: random.Random) -> tuple[str, str]:
    kind = rng.choices(("child", "first person", "grown", "unnamed"), (35, 13, 30, 22))[0]
    w = _scene(rng, grown=kind in ("grown", "unnamed"))
    if kind == "child":
        opening, topic = tales.CHILD_OPENING, "a {noun} named {hero}"
    elif kind == "first person":
        opening, topic = tales.FIRST_PERSON_OPENING, "your childhood"
        w.slots.update(name=w.slots["hero"], hero="I", heros="my", he="I", him="me", his="my")
    elif kind == "grown":
        opening, topic = tales.GROWN_OPENING, "a {trade} named {hero}"
    else:
        opening, topic = tales.UNNAMED_OPENING, "a {bare_hero}"
        w.slots["bare_hero"] = w("[old|old|young|{kind}] {trade}")
        w.slots["heros"] = "the {trade}'s"
        w.slots["hero"] = "the {trade}"
    topic = w(f"a story about {topic}")
    if kind == "unnamed":
        w.slots["hero"] = _mention("the {bare_hero}", "the {trade}")

    paragraphs = [w.lines(opening, (1, 2))]
    if rng.random() < 0.3:
        paragraphs[0].append(w("{weather}"))
    num_episodes = rng.choices((1, 2, 3), (70, 22, 8))[0]
    for i, name in enumerate(rng.sample(tuple(tales.EPISODES), num_episodes)):
        w.fix("keepsake", "made", "music", "contest", "room", "tree", "colour")
        w.slots["patient"], w.slots["part"] = rng.choice(tuple(words.PATIENTS.items()))
        w.slots["rival"] = rng.choice(words.BOYS)
        w.slots["one_day"] = tales.LATER if i else tales.ONE_DAY
        if i == 0 and rng.random() < 0.5:
            topic = w(f"a story about {name}")
        paragraphs.append([])
        beginning, *middle, end = (rng.choice(beat) for beat in tales.EPISODES[name])
        for template in (beginning, *(_linked(rng, option) for option in middle), end):
            if len(paragraphs[-1]) > 1 and rng.random() < 0.3:
                paragraphs.append([])
            paragraphs[-1].append(w(template))
    paragraphs[-1].append(w(rng.choice(tales.ENDING[0])))
    return topic, "\n\n".join(" ".join(filter(None, lines)) for lines in paragraphs)


def _linked(rng: random.Random, template: str) -> str:
    """Puts a word like "soon" before some of the events that begin with the hero."""
    if not _EVENT.match(template) or rng.random() > 0.25:
        return template
    return "{Then} " + template.replace("{He", "{he", 1)


def _fable(rng: random.Random) -> tuple[str, str]:
    w = _scene(rng, grown=False)
    a, c = (facts.ANIMALS[name] for name in rng.sample(facts.BIG_ANIMALS, 2))
    b = facts.ANIMALS[rng.choice(facts.SMALL_ANIMALS)]
    for suffix, sex in zip(("", "2", "3"), rng.choices(("he", "any"), k=3), strict=True):
        w.slots.update(_person(rng, sex).pronouns(suffix))
    w.slots.update(
        a=a.name,
        b=b.name,
        c=c.name,
        nature=a.nature,
        skill=a.skill,
        skill2=b.skill,
        himself="{him}self" if w.slots["he"] == "he" else "herself",
    )
    name = rng.choice(tuple(genres.FABLES))
    lines = [w(rng.choice(beat)) for beat in genres.FABLES[name]]
    return w(f"a fable about {name}"), " ".join(lines[:-1]) + "\n\n" + lines[-1]


def _place(rng: random.Random) -> tuple[str, str]:
    w = _scene(rng, grown=True)
    return w("about {village}"), " ".join(w.lines(genres.PLACE, (1, 2, 2, 1)))


def _letter(rng: random.Random) -> tuple[str, str]:
    w = _scene(rng, grown=False)
    w.slots.update(he="I", him="me", his="my", friend="{friend_name}")
    w.slots.update(writer=_person(rng, "any").name, uncle=rng.choice(words.BOYS))
    return "a letter to a friend", "\n\n".join(w.lines(genres.LETTER, (1, 1, 2, 3, 2, 1)))


def _market(rng: random.Random) -> tuple[str, str]:
    w = _scene(rng, grown=False)
    lines = w.lines(genres.MARKET, (1, 2, 2, 3, 2))
    return "about a day at the market", "\n\n".join([" ".join(lines[:3]), " ".join(lines[3:])])


def _diary(rng: random.Random) -> tuple[str, str]:
    w = _scene(rng, grown=False)
    w.slots.update(he="I", him="me", his="my")
    lines = w.lines(genres.DIARY, (1, 2, 2, 2, 1))
    return "a page of a diary", lines[0] + "\n\n" + " ".join(lines[1:])


def _meeting(rng: random.Random) -> tuple[str, str]:
    w = _scene(rng, grown=False)
    return "about two friends who meet", "\n\n".join(w.lines(genres.MEETING, (1, 2, 1, 2)))


def _introduction(rng: random.Random) -> tuple[str, str]:
    w = _scene(rng, grown=False)
    w.slots.update(he="I", him="me", his="my")
    return "something about yourself", " ".join(w.lines(genres.INTRODUCTION, (1, 2, 2, 2)))


def _animal_facts(rng: random.Random) -> tuple[str, str]:
    animal = rng.choice(tuple(facts.ANIMALS.values()))
    w = Writer(
        rng,
        {
            "a": animal.name,
            "plural": animal.plural,
            "young": animal.young,
            "place": animal.home,
            "eats": animal.food,
            "body": animal.body,
            "skill": animal.skill,
            "nature": animal.nature,
        },
    )
    topic = f"something about {animal.plural}"
    return topic, " ".join(w.lines(genres.ANIMAL_FACTS, (1, 1, 1, 1, 1)))


def _season_facts(rng: random.Random) -> tuple[str, str]:
    i = rng.randrange(len(words.SEASONS))
    season, after = words.SEASONS[i], words.SEASONS[(i + 1) % len(words.SEASONS)]
    nature, people = rng.sample(season.nature, 3), rng.sample(season.people, 2)
    mild = rng.sample(season.adjectives, 2)
    w = Writer(
        rng,
        {
            "season": season.name,
            "month1": season.months[0],
            "month2": season.months[1],
            "month3": season.months[2],
            "nature1": nature[0],
            "nature2": nature[1],
            "nature3": nature[2],
            "people1": people[0],
            "people2": people[1],
            "mild": mild[0],
            "mild2": mild[1],
            "next_season": after.name,
            "next_nature": after.nature,
        },
    )
    lines = w.lines(genres.SEASON_FACTS, (1, 1, 1, 1))
    return f"something about {season.name}", " ".join(filter(None, lines))


def _trade_facts(rng: random.Random) -> tuple[str, str]:
    w = _scene(rng, grown=True)
    return w("about the work of a {trade}"), " ".join(w.lines(genres.TRADE_FACTS, (1, 2, 2)))


def _country_facts(rng: random.Random) -> tuple[str, str]:
    country = rng.choice(facts.COUNTRIES)
    w = Writer(
        rng,
        {
            "country": country.name,
            "capital": country.capital,
            "continent": country.continent,
            "river": country.river,
        },
    )
    lines = w.lines(genres.COUNTRY_FACTS, (1, 1, 1))
    return f"something about {country.name}", " ".join(filter(None, lines))


def _how_to(rng: random.Random) -> tuple[str, str]:
    topic = rng.choice(tuple(facts.HOW_TO))
    needs, *steps = Writer(rng, {})(facts.HOW_TO[topic]).split(". ")
    if rng.random() < 0.4:
        steps = [f"{i}. {step.rstrip('.')}." for i, step in enumerate(steps, 1)]
        text = "\n".join([f"{needs}.", *steps])
    else:
        text = " ".join([f"{needs}.", *(_step(rng, step, i) for i, step in enumerate(steps))])
    if rng.random() < 0.5:
        text = f"{topic.capitalize()}\n\n{text}"
    return topic, text


def _step(rng: random.Random, step: str, index: int) -> str:
    """Begins a sentence of a how-to with a word like "Then", or leaves it as it is."""
    step = f"{step.rstrip('.')}."
    if _NO_STEP_WORD.match(step) or rng.random() < 0.45:
        return step
    word = "First" if index == 0 else rng.choice(facts.LATER_STEPS)
    return f"{word} {step[0].lower()}{step[1:]}"


def _rhyme(rng: random.Random) -> tuple[str, str]:
    w = Writer(rng, {})
    couplets = rng.sample(facts.RHYMES, rng.randint(2, 5))
    return "a poem", "\n".join(w(line) for couplet in couplets for line in couplet.split(" / "))


def _questions(rng: random.Random) -> tuple[str, str]:
    pairs = [rng.choice(_ASK)(rng) for _ in range(rng.randint(2, 5))]
    between = rng.choice(("\n", " "))
    return "some questions and answers", "\n\n".join(between.join(pair) for pair in pairs)


def _general_question(rng: random.Random) -> tuple[str, str]:
    question, answer = rng.choice(facts.QUESTIONS).split("? ")
    return f"{question}?", answer


def _animal_question(rng: random.Random) -> tuple[str, str]:
    animal = rng.choice(tuple(facts.ANIMALS.values()))
    w = Writer(rng, {"a": animal.name, "plural": animal.plural})
    question, answer = rng.choice(
        (
            ("What does a {a} eat?", f"A {{a}} eats {animal.food}."),
            ("What do {plural} eat?", f"{{Plural}} eat {animal.food}."),
            ("Where does a {a} live?", f"A {{a}} lives {animal.home}."),
            ("What is a young {a} called?", f"A young {{a}} is called a {animal.young}."),
            ("What can a {a} do?", f"A {{a}} can {animal.skill}."),
            ("What does a {a} look like?", f"A {{a}} has {animal.body}."),
        )
    )
    return w(question), w(answer)


def _country_question(rng: random.Random) -> tuple[str, str]:
    country = rng.choice(facts.COUNTRIES)
    return rng.choice(
        (
            (
                f"What is the capital of {country.name}?",
                f"The capital of {country.name} is {country.capital}.",
            ),
            (f"Where is {country.name}?", f"{country.name} is in {country.continent}."),
            (
                f"Where is {country.capital}?",
                f"{country.capital} is the capital of {country.name}.",
            ),
        )
    )


def _trade_question(rng: random.Random) -> tuple[str, str]:
    trade = rng.choice(tuple(words.TRADES.values()))
    w = Writer(rng, {})
    return w(f"What does a {trade.noun} do?"), w(f"A {trade.noun} {trade.does}.")


_ASK = (_general_question, _animal_question, _country_question, _trade_question)

# Genres and how many texts in a hundred belong to each.
_GENRES: Mapping[Callable[[random.Random], tuple[str, str]], int] = {
    _tale: 48,
    _fable: 10,
    _letter: 6,
    _diary: 5,
    _market: 5,
    _place: 4,
    _introduction: 4,
    _meeting: 4,
    _how_to: 3,
    _animal_facts: 3,
    _rhyme: 2,
    _questions: 2,
    _country_facts: 2,
    _season_facts: 1,
    _trade_facts: 1,
}


def _article(match: re.Match) -> str:
    article, word = match[1], match[2]
    vowel = _VOWEL_SOUND.match(word) and not _CONSONANT_SOUND.match(word)
    return f"{article}n " if vowel else f"{article} "
