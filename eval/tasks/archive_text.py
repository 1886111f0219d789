"""Archive texts: filler sentences with access-code records hidden among them, and questions about the records.

The wording that the bundled model of examples/archive was trained on; its scripts take it from here. Everything is drawn
from a `random.Random`, so a seed fixes a text. No imports beyond the standard library.
"""

# ruff: noqa: E501, SIM905 (word lists)

import random
from collections.abc import Sequence
from itertools import accumulate

ADJECTIVES = (
    "amber azure basalt bitter bold brass brisk bronze calm cedar clever cobalt copper coral crimson crisp dapper dusty "
    "eager ebony elder ember fable faint fern flint frosty gentle gilded golden grand hazel hollow humble icy indigo iron "
    "ivory jade jolly keen lilac lively lunar marble mellow misty noble oaken olive opal pale quiet rapid rustic sable "
    "scarlet silver solar stout swift tidal velvet"
).split()
NOUNS = (
    "anchor badger beacon bison canyon castle comet crane delta dolphin dragon eagle falcon ferry forest fox galleon garden "
    "glacier harbor hawk heron island jaguar kettle lantern lion lynx maple meadow mill moose mountain oasis orchard otter "
    "owl panther parrot pelican pine puffin quarry rabbit raven reef ridge river robin salmon sparrow spruce stag summit "
    "temple tiger tower tundra turtle valley violin walrus willow wolf"
).split()
SUBJECTS = (
    "The clerk|A visitor|The old captain|The gardener|A young student|The baker|The night guard|A quiet neighbor|"
    "The librarian|The mayor|A painter|The pilot|The farmer|A tired traveler|The teacher|The doctor|A merchant|"
    "The carpenter|The fisherman|A curious child"
).split("|")
VERBS = (
    "carried|found|described|repaired|sold|painted|forgot|borrowed|counted|cleaned|admired|moved|sketched|returned|"
    "ordered|measured|opened|watched|mended|wrapped"
).split("|")
OBJECTS = (
    "a wooden chair|the broken clock|two letters|a basket of apples|the garden gate|an empty notebook|a small boat|"
    "the kitchen window|three candles|a woolen coat|the long report|a heavy trunk|the blue bicycle|a map of the coast|"
    "an old camera|the brass key|a bag of flour|some fresh bread|the yellow umbrella|a stack of plates"
).split("|")
PLACES = (
    "near the station|in the courtyard|before sunrise|after the storm|behind the theater|at the market|on a rainy evening|"
    "during the holiday|by the stone bridge|along the quiet road|inside the workshop|under the tall tree|"
    "across the square|late in the autumn|beside the river bank|at the edge of town"
).split("|")

Key = tuple[str, str]
Digits = tuple[int, int]  # the fewest and the most digits of a code
FOUR: Digits = (4, 4)


def filler(rng: random.Random) -> str:
    return f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(OBJECTS)} {rng.choice(PLACES)}."


def record(key: Key, code: str) -> str:
    return f"The access code of the {key[0]} {key[1]} is {code}."


def question(key: Key) -> str:
    """Ends where the answer ` 5831.\\n` begins: the model repeats what followed the same words earlier."""
    return f"Question: The access code of the {key[0]} {key[1]} is"


def records(rng: random.Random, count: int, digits: Digits = FOUR) -> dict[Key, str]:
    found: dict[Key, str] = {}
    while len(found) < count:
        found.setdefault((rng.choice(ADJECTIVES), rng.choice(NOUNS)), code(rng, digits))
    return found


def code(rng: random.Random, digits: Digits) -> str:
    fewest, most = digits
    n = fewest if fewest == most else rng.randint(fewest, most)
    return f"{rng.randrange(10**n):0{n}d}"


def nearest(sizes: Sequence[int], depth: float) -> int:
    """Before which of these pieces a share `depth` of their sizes, or what comes nearest to it, has come."""
    before = list(accumulate(sizes, initial=0))
    return min(range(len(before)), key=lambda place: abs(before[place] - depth * before[-1]))
