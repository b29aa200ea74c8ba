"""Generate `utility.jsonl`: order sentences and the record that a small model learns to write for them.

The skill is generative and checked by exact match: counts become digits, items singular, and corrections inside the
sentence ("not Monday but Friday") must be followed. Splits share words but never the same order.

    python -m sstmerge.demo.generate_utility --out sstmerge/data/utility.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

SEED = 20
ROWS_PER_SPLIT = {"test": 50, "tune": 10, "calibration": 32, "train": 408}

_ITEMS = {
    "lamp": "lamps", "chair": "chairs", "kettle": "kettles", "blanket": "blankets", "vase": "vases",
    "basket": "baskets", "mug": "mugs", "cushion": "cushions", "clock": "clocks", "bucket": "buckets",
    "tray": "trays", "scarf": "scarves", "shelf": "shelves", "ladder": "ladders", "mirror": "mirrors",
    "notebook": "notebooks", "pencil": "pencils", "jacket": "jackets", "candle": "candles", "bowl": "bowls",
    "suitcase": "suitcases", "tent": "tents", "rug": "rugs", "brush": "brushes", "bench": "benches", "box": "boxes",
    "knife": "knives", "glove": "gloves", "towel": "towels", "teapot": "teapots", "bicycle": "bicycles",
    "curtain": "curtains", "stool": "stools", "helmet": "helmets",
}  # fmt: skip
_COLOURS = ("red", "blue", "green", "yellow", "black", "white", "grey", "brown", "orange", "purple", "pink", "silver")
_COUNTS = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11,
    "a dozen": 12, "half a dozen": 6, "a pair of": 2, "fifteen": 15, "twenty": 20, "14": 14, "18": 18, "25": 25,
}  # fmt: skip
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_CUSTOMERS = (
    "Rivera", "Okafor", "Lindqvist", "Tanaka", "Moreau", "Haddad", "Novak", "Silva", "Kowalski", "Becker", "Ferreira",
    "Ivanova", "Nguyen", "Patel", "Rossi", "Dubois", "Larsen", "Mbeki", "Castillo", "Yilmaz", "Horvat", "Murphy",
    "Cohen", "Andersson", "Garcia", "Schmidt", "Park", "Santos", "Weber", "Fischer", "Costa", "Hughes", "Baker",
    "Turner",
)  # fmt: skip
_LEADS = ("Write the order record: ", "Turn this order into a record: ", "Order record for: ")
_PLAIN = (
    "{customer} wants {count} {colour} {items} on {day}.",
    "Please send {count} {colour} {items} to {customer} by {day}.",
    "We need {count} {items} in {colour} for {customer}, delivery {day}.",
    "On {day}, {customer} will pick up {count} {colour} {items}.",
    "{customer} called and asked for {count} {colour} {items}, to arrive on {day}.",
    "For {customer}: {count} {items}, {colour}, needed on {day}.",
    "Could you deliver {count} {colour} {items} to the {customer} family this {day}?",
    "By {day} the shop of {customer} must have {count} {colour} {items}.",
    "Add {count} {items} for {day}; the colour is {colour} and the name is {customer}.",
    "{day} delivery, name of {customer}, {count} {colour} {items} please.",
    "It is {customer} again, this time with an order of {count} {colour} {items} for {day}.",
    "Reserve {count} {colour} {items} under {customer} until {day}.",
)
_CORRECTED = (
    "{customer} wants {count} {items} on {day}, not {other_colour} but {colour}.",
    "Send {count} {colour} {items} to {customer}, not on {other_day} but on {day}.",
    "{customer} first asked for {other_colour} {items} but now wants {count} {colour} ones on {day}.",
    "The {other_day} delivery for {customer} moves to {day}: {count} {colour} {items}.",
)

Order = tuple[str, str, str, str, str]


def answer(item: str, colour: str, count: str, day: str, customer: str) -> str:
    """Return the record that is the exact answer for one order; `count` is a key of the count words."""
    return f"item={item}; colour={colour}; count={_COUNTS[count]}; day={day}; customer={customer}"


def generate(seed: int = SEED) -> list[dict[str, str]]:
    """Return every row of the utility data, the same rows in the same order for the same seed.

    Args:
        seed: Seed of the only random generator used.

    Returns:
        Rows with the keys id, category, split, prompt and response.
    """
    rng = random.Random(seed)
    rows: list[dict[str, str]] = []
    seen: set[Order] = set()
    for split, size in ROWS_PER_SPLIT.items():
        for _ in range(size):
            order = _draw_order(rng)
            while order in seen:
                order = _draw_order(rng)
            seen.add(order)
            corrected = rng.random() < 0.25
            row = {
                "id": f"utility-{len(rows):03d}",
                "category": "order_corrected" if corrected else "order_plain",
                "split": split,
                "prompt": rng.choice(_LEADS) + _sentence(rng, order, _CORRECTED if corrected else _PLAIN),
                "response": answer(*order),
            }
            rows.append(row)
    return rows


def _draw_order(rng: random.Random) -> Order:
    """Draw (item, colour, count word, day, customer)."""
    return (
        rng.choice(tuple(_ITEMS)),
        rng.choice(_COLOURS),
        rng.choice(tuple(_COUNTS)),
        rng.choice(_DAYS),
        rng.choice(_CUSTOMERS),
    )


def _sentence(rng: random.Random, order: Order, templates: tuple[str, ...]) -> str:
    """Fill one of the templates with an order and with a different colour and day as distractors."""
    item, colour, count, day, customer = order
    sentence = rng.choice(templates).format(
        items=_ITEMS[item],
        colour=colour,
        count=count,
        day=day,
        customer=customer,
        other_colour=rng.choice([other for other in _COLOURS if other != colour]),
        other_day=rng.choice([other for other in _DAYS if other != day]),
    )
    return sentence[0].upper() + sentence[1:]


def main() -> None:
    """Write the rows as JSONL to the path given by --out."""
    parser = argparse.ArgumentParser(description="Generate the utility rows of the demo.")
    parser.add_argument("--out", type=Path, required=True, help="the JSONL file to write")
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in generate(arguments.seed)]
    temporary = arguments.out.with_name(arguments.out.name + ".tmp")
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(arguments.out)


if __name__ == "__main__":
    main()
