"""What is written on the documents: our own word lists, random letter strings, numbers, codes, dates."""

from __future__ import annotations

from random import Random

ITEMS = (
    "Milk Bread Eggs Rice Salt Sugar Tea Coffee Juice Water Apple Pear Plum Grape Melon Lemon Peach Cheese "
    "Butter Cream Yogurt Ham Beef Pork Fish Tuna Soup Pasta Pizza Cake Pie Cookie Honey Jam Oil Flour Corn "
    "Bean Pea Onion Garlic Leek Carrot Potato Tomato Pepper Salad Nuts Soap Towel Brush Pen Paper Book Glue "
    "Tape Lamp Bulb Cable Plug Screw Nail Hammer Rope Paint Bag Box Cup Plate Fork Knife Spoon Bowl Candle "
    "Match"
).split()
NAMES = (
    "Anna Ben Carla David Emma Felix Greta Hugo Ida Jonas Klara Leo Maria Nils Olga Paul Rosa Simon Tina Uwe "
    "Vera Willi Zoe Adam Beth Carl Dora Eric Fiona Gina Hans Iris Jack Kate Liam Mona Nora Otto Pia Ralf Sara "
    "Tom"
).split()
CITIES = (
    "Berlin Paris Rome Madrid Oslo Vienna Prague London Dublin Lisbon Athens Cairo Delhi Tokyo Lima Quito "
    "Bern Zurich Milan Turin Ghent Lyon Nice Porto Riga Kiev Minsk Sofia Tunis Dakar Accra Perth Boston Miami"
).split()
JOBS = "Cook Baker Nurse Pilot Judge Clerk Smith Guard Tailor Doctor Farmer Driver Writer Singer Dancer Miner".split()
MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
DAYS = "Mon Tue Wed Thu Fri Sat Sun".split()
OTHERS = (
    "open closed north south left right house garden river stone cloud green winter summer music train plane "
    "ship road bridge tower school market office window door table chair paper letter number signal engine "
    "wheel danger exit enter push pull stop go wait slow fast hot cold high low empty full new old free sale"
).split()
COLUMNS = "Qty Price Size Year Age Stock Code Cost Unit Rank Mass Date Score Goals Wins Loss".split()
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CODE_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
# Letters whose two cases differ in size only; a string of nothing else could be read either way.
SAME_IN_BOTH_CASES = frozenset("cosuvwxz")


def random_letters(rng: Random, shortest: int = 3, longest: int = 8) -> str:
    """Letters without meaning: lower case, upper case or capitalised."""
    while True:
        text = "".join(rng.choice(LETTERS) for _ in range(rng.randint(shortest, longest)))
        if not SAME_IN_BOTH_CASES.issuperset(text):
            return rng.choice((text, text.upper(), text.capitalize()))


def number(rng: Random) -> str:
    """An integer of one to five digits, a price or a decimal."""
    kind = rng.random()
    if kind < 0.5:
        return str(rng.randrange(10 ** rng.randint(1, 5)))
    return price(rng) if kind < 0.8 else f"{rng.uniform(0, 1000):.{rng.randint(1, 2)}f}"


def price(rng: Random, highest: int = 100) -> str:
    return f"{rng.randrange(20, highest * 100) / 100:.2f}"


def code(rng: Random) -> str:
    """Capital letters and digits without I, O, 0 and 1, e.g. `K7-Q42`."""
    text = "".join(rng.choice(CODE_LETTERS + "2345678923456789") for _ in range(rng.randint(3, 7)))
    cut = rng.randint(1, len(text) - 1)
    return text if rng.random() < 0.6 else text[:cut] + "-" + text[cut:]


def date(rng: Random) -> str:
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1990, 2029)
    return rng.choice((f"{day:02d}.{month:02d}.{year}", f"{year}-{month:02d}-{day:02d}", f"{day} {MONTHS[month - 1]}"))


def time(rng: Random) -> str:
    return f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"


def phone(rng: Random) -> str:
    return f"{rng.randint(100, 999)}-{rng.randint(1000, 9999)}"


def listed_word(rng: Random) -> str:
    word = rng.choice(rng.choice((ITEMS, NAMES, CITIES, OTHERS, MONTHS, DAYS)))
    return rng.choice((word, word, word.lower(), word.upper()))


def any_word(rng: Random) -> str:
    """One string without blanks: listed 35 %, random letters 35 %, number 15 %, code or time 15 %."""
    kind = rng.random()
    if kind < 0.35:
        return listed_word(rng)
    if kind < 0.7:
        return random_letters(rng)
    return number(rng) if kind < 0.85 else rng.choice((code, code, time))(rng)


def label(rng: Random, listed: tuple[str, ...] | list[str], share_random: float = 0.25) -> str:
    """A capitalised label: from the list, or random letters in `share_random` of the cases."""
    return random_letters(rng, 3, 6).capitalize() if rng.random() < share_random else rng.choice(listed)
