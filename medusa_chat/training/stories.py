"""Short fairy tales from a small grammar, from which the bundled model learns to tell one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random

    from medusa_chat.config import Message

_HEROES = [
    ("a little girl named {girl}", "she", "her", "the girl"),
    ("a poor boy named {boy}", "he", "his", "the boy"),
    ("an old miller", "he", "his", "the miller"),
    ("a young princess named {girl}", "she", "her", "the princess"),
    ("a brave prince named {boy}", "he", "his", "the prince"),
    ("a clever fox", "he", "his", "the fox"),
    ("a small grey mouse", "she", "her", "the mouse"),
    ("a kind woodcutter", "he", "his", "the woodcutter"),
    ("a shepherd named {boy}", "he", "his", "the shepherd"),
    ("a lonely giant", "he", "his", "the giant"),
]
_GIRLS = ["Anna", "Rose", "Elsa", "Mary", "Lily", "Clara"]
_BOYS = ["Hans", "Peter", "Jack", "Tom", "Karl", "Martin"]
_PLACES = [
    "in a small house at the edge of the forest",
    "in a castle on a high hill",
    "near a deep blue lake",
    "in a village by the sea",
    "under an old oak tree",
    "beside a river in a green valley",
]
_WISHES = [
    ("was very poor and often went hungry", "never went hungry again"),
    ("was very lonely and wished for a friend", "was never lonely again"),
    ("wished to see the wide world", "had seen the wide world and was glad to be home"),
    ("had lost a golden ring and looked for it everywhere", "wore the golden ring with joy"),
    ("had a mother who was very ill", "saw {their} mother well again"),
]
_HELPERS = [
    "an old woman",
    "a white bird",
    "a talking fish",
    "a tiny dwarf",
    "a grey wolf",
    "a good fairy",
]
_TROUBLES = [
    ("was caught in a net", "cut the net and set {it} free"),
    ("was cold and hungry", "shared the last piece of bread with {it}"),
    ("could not cross the river", "carried {it} over the water"),
    ("had lost the way home", "showed {it} the way home"),
]
_GIFTS = [
    ("a magic seed", "planted the seed, and by morning a tree of silver had grown"),
    ("a little bell", "rang the bell, and a door opened in the hill"),
    ("a golden key", "turned the key in an old chest, and it was full of treasure"),
    ("a red feather", "threw the feather into the wind, and it flew ahead to show the way"),
    ("three shining stones", "threw the stones into the well, and clear water sang of a secret"),
]
_MORALS = [
    "And they all lived happily ever after.",
    "So a kind heart found its reward.",
    "From that day on, everyone in the land told this story.",
    "And if they have not died, they are living there still.",
]
_REQUESTS = [
    "Tell me a fairy tale.",
    "Tell me a short fairy tale.",
    "Can you tell me a story?",
    "Please tell me a short story.",
    "tell me a story",
    "Tell me a fairy tale, please.",
    "Do you know a fairy tale?",
    "I would like to hear a story.",
    "Could you tell me a short fairy tale?",
    "Tell me a bedtime story.",
    "a fairy tale please",
    "Once upon a time...",
    "Tell me a story about {about}.",
    "Can you tell me a fairy tale about {about}?",
]
_AGAIN = [
    "Another one, please.",
    "Tell me another story.",
    "One more!",
    "Please tell me another fairy tale.",
]
_THANKS = [
    ("That was lovely, thank you.", "You're welcome! I am glad you liked the story."),
    ("Nice story!", "Thank you! Would you like to hear another one?"),
    ("Thanks!", "You're welcome! Is there anything else?"),
]


def _story(rng: random.Random) -> tuple[str, str]:
    """Make a tale; returns it and a name of its hero, for requests."""
    hero, they, their, short = rng.choice(_HEROES)
    hero = hero.format(girl=rng.choice(_GIRLS), boy=rng.choice(_BOYS))
    wish, end = rng.choice(_WISHES)
    helper = rng.choice(_HELPERS)
    trouble, help_given = rng.choice(_TROUBLES)
    gift, magic = rng.choice(_GIFTS)
    the_helper = "the " + helper.split(" ", 1)[1]
    the_hero = short[0].upper() + short[1:]

    def it() -> str:
        return "the poor creature" if rng.random() < 0.3 else the_helper

    sentences = [
        f"Once upon a time there was {hero} who lived {rng.choice(_PLACES)}.",
        f"{the_hero} {wish}.",
        f"One day {they} met {helper} who {trouble}.",
        f"{the_hero} felt sorry and {help_given.format(it=it())}.",
        rng.choice(
            [
                f'"Thank you," said {the_helper}. "Take {gift}, for you were kind to me."',
                f'Then {the_helper} said, "You have a good heart," and gave {short} {gift}.',
            ]
        ),
        rng.choice([f"That night {they} {magic}.", f"At home {they} {magic}."]),
        f"And so {short} {end.format(their=their)}.",
        rng.choice(_MORALS),
    ]
    return " ".join(sentences), short.replace("the ", "a ", 1)


def story_conversation(rng: random.Random) -> list[Message]:
    """Make a conversation in which the assistant tells one or two tales."""
    story, about = _story(rng)
    messages: list[Message] = [
        {"role": "user", "content": rng.choice(_REQUESTS).format(about=about)},
        {"role": "assistant", "content": story},
    ]
    if rng.random() < 0.3:
        messages.append({"role": "user", "content": rng.choice(_AGAIN)})
        messages.append({"role": "assistant", "content": _story(rng)[0]})
    if rng.random() < 0.4:
        thanks, answer = rng.choice(_THANKS)
        messages.append({"role": "user", "content": thanks})
        messages.append({"role": "assistant", "content": answer})
    return messages
