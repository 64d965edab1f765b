"""Stories: a small grammar that writes them, and a Llama-style decoder that learns to tell them."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from anert import Decoder, Plugin, Spec, nn

plugin = Plugin("stories", api=1)

# ---- The model


@dataclass(frozen=True)
class Config:
    """Fields as in llama2.c; `vocab_size` follows the tokenizer of a new run."""

    dim: int = 768
    hidden_dim: int = 2048
    n_layers: int = 12
    n_heads: int = 12
    n_kv_heads: int = 12
    vocab_size: int = 32000
    seq_len: int = 256
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    head_dim: int = 0  # 0: dim / n_heads
    tied: bool = True  # the classifier is the embedding


def attention(cfg, x, w, pos):  # x (dim, N)
    h = nn.rmsnorm(x, w.attn_norm, cfg.norm_eps)
    q, k, v = (nn.heads(m @ h, n) for m, n in ((w.wq, cfg.n_heads), (w.wk, cfg.n_kv_heads), (w.wv, cfg.n_kv_heads)))
    return x + w.wo @ nn.merge(nn.causal_attention(nn.rope(q, pos), nn.rope(k, pos), v, pos))


def ffn(cfg, x, w, pos):  # SwiGLU (Shazeer 2020)
    h = nn.rmsnorm(x, w.ffn_norm, cfg.norm_eps)
    return x + w.w2 @ (nn.silu(w.w1 @ h) * (w.w3 @ h))


@plugin.model("tiny", Config(dim=128, hidden_dim=352, n_layers=4, n_heads=4, n_kv_heads=4, vocab_size=1024,
seq_len=128),
              batch=4, steps=4000, time_budget=90, lr=2e-3, warmup=50, eval_every=100, sample_every=100)  # fmt: skip
@plugin.model("260k", Config(dim=64, hidden_dim=172, n_layers=5, n_heads=8, n_kv_heads=4, vocab_size=512, seq_len=512))
@plugin.model("15m", Config(dim=288, hidden_dim=768, n_layers=6, n_heads=6, n_kv_heads=6))
@plugin.model("42m", Config(dim=512, hidden_dim=1376, n_layers=8, n_heads=8, n_kv_heads=8))
@plugin.model("110m", Config())
class Stories(Decoder):
    """Llama-style: RoPE, RMSNorm, SwiGLU, grouped queries, tied classifier (Touvron et al. 2023; karpathy/llama2.c)."""

    blocks = (attention, ffn)

    def layer_params(self, cfg):
        hd, out = cfg.head_dim or cfg.dim // cfg.n_heads, 0.02 / (2 * cfg.n_layers) ** 0.5
        q, kv = hd * cfg.n_heads, hd * cfg.n_kv_heads
        return {
            "attn_norm": Spec.ones(cfg.dim),
            "wq": Spec.normal(q, cfg.dim),
            "wk": Spec.normal(kv, cfg.dim),
            "wv": Spec.normal(kv, cfg.dim),
            "wo": Spec.normal(cfg.dim, q, std=out),  # residual outputs start smaller (Radford et al. 2019)
            "ffn_norm": Spec.ones(cfg.dim),
            "w1": Spec.normal(cfg.hidden_dim, cfg.dim),
            "w2": Spec.normal(cfg.dim, cfg.hidden_dim, std=out),
            "w3": Spec.normal(cfg.hidden_dim, cfg.dim),
        }


# ---- The corpus: children's stories from a grammar. A line is a sentence of the story; ` / `, also at the start of a
# line, is another way to say it; {slot} is filled in, [a|b] is a choice. A is the hero, B the friend. They, the thing
# and the places stay the same through a story.

NAMES = {
    "he": "Tom Ben Max Sam Leo Finn Oscar Jack Theo Hugo Milo Otis Jasper Felix Rufus Barnaby",
    "she": "Mia Anna Lucy Rosa Ella Nora Ivy Zoe Clara Ruby Daisy Wren Hazel Greta Poppy Tilda",
}
PRONOUNS = {"he": ("he", "him", "his"), "she": ("she", "her", "her")}
HOMES = {
    "rabbit": "in a burrow under a green hill", "fox": "in a den by the old stone wall", "mouse": "behind a barn",
    "bear": "in a cave near the river", "hedgehog": "under a pile of leaves", "owl": "in a hollow tree",
    "duck": "beside a quiet pond", "frog": "on the bank of a pond", "squirrel": "high up in an oak tree",
    "kitten": "in a house with a red door", "puppy": "on a farm", "otter": "by a bend in the river",
    "badger": "at the edge of the wood", "turtle": "near a small lake", "lamb": "in a wide meadow",
    "goat": "on a rocky hill", "mole": "under the garden", "pony": "in a stable on a farm",
}  # fmt: skip
FIXED = {  # drawn once a story
    "place": "the meadow|the forest|the river|the pond|the hill|the orchard|the market|the old bridge|the village"
    "|the lake",
    "color": "red|blue|green|yellow|silver|golden|white|purple|orange|striped",
    "thing": "ball|kite|bell|hat|scarf|boat|button|drum|blanket|basket|lantern|key|ribbon|spoon|book|cup",
    "food": "apples|berries|nuts|carrots|plums|pears|mushrooms|turnips|chestnuts|cherries",
    "hobby": "sing|dance in the rain|count the clouds|collect smooth stones|listen to the birds|roll down the hill"
    "|paint|bake|tell jokes|look at the stars|jump over puddles|pick flowers|build towers of sticks|chase butterflies",
    "skill": "swim|skate|whistle|climb|dance|juggle|ride a bicycle|fly a kite|play the flute|tie a knot",
    "plant": "sunflower|pumpkin|rose|pear tree|bean plant|melon|tulip|cherry tree",
    "gift": "a crown of flowers|a necklace of acorns|a drawing of the two of them|a pillow full of feathers|a plum cake"
    "|a little song|a wooden flute|a card with a golden star",
    "trap": "in the mud|in a thorny bush|up in a tall tree|under a heavy branch|on a rock in the river|in a deep hole",
    "tool": "a long rope|a strong stick|a ladder|an old blanket|a wide board|a fishing net",
    "fright": "the dark|the thunder|the deep water|the tall trees at night|the strange noises of the wood|the big wind",
}
SPOTS = (
    "under a bush|behind a big rock|in the tall grass|beside the path|under the bridge|next to an old log"
    "|between two stones|at the foot of a tree|in a pile of leaves|near the gate"
)
VARIED = {  # drawn at every use
    "small": "little|small|young|tiny|gentle|clever|shy|cheerful|curious|brave", "when": "morning|afternoon|day",
    "weather": "sunny|windy|cold|warm|foggy|bright|cloudy|quiet|frosty|fresh", "sad": "sad|upset|worried|unhappy",
    "told": "said|answered|replied|whispered", "glad": "happy|glad|delighted|so pleased|full of joy",
    "went": "went|walked|ran|hurried|wandered", "kind": "kind|good|gentle|wise|friendly|patient|helpful",
}  # fmt: skip

OPENING = """
Once upon a time, there was a {small} {akind} named {A}. {He} lived {home}.
/ Once upon a time, a {small} {akind} named {A} lived {home}.
/ Once there was a {small} {akind} called {A}, who lived {home}.
/ Long ago, a {small} {akind} named {A} lived {home} with {his} [family|mother|father|grandmother].
/ There was once a {akind} whose name was {A}. {He} was a {small} {akind} and lived {home}.
Every day {he} liked to {hobby}. / {A} loved to {hobby} more than anything else.
/ Nobody liked to {hobby} as much as {A}.
/ When the sun came up, {he} would {hobby} until it was time for [lunch|breakfast|tea].
"""
WALK = """
One {weather} {when}, {A} {went} to {place}. / On a {weather} {when}, {he} {went} to {place} to {hobby}.
/ One {when} it was very {weather}, and {A} {went} to {place} all alone.
/ Then came a {weather} {when}, and {A} {went} down to {place}.
"""
ENDING = """
{A} learned that [a good friend is worth more than gold|it is brave to ask for help|kind words make hard days easy].
/ And so {A} knew that [sharing makes all things sweet|even a small friend can be a great help|nobody has to be alone].
/ {He} never forgot how [kind|good|patient] {B} had been.
From that day on, {A} and {B} were the best of friends.
/ That night, {A} went to bed with a smile and slept [well|softly|deeply].
/ {A} and {B} {went} home together under the [stars|evening sky|yellow moon], and they were {glad}.
/ And whenever they met at {place}, they laughed about it.
/ They had [tea|warm soup|bread and honey] together, and everyone was {glad}.
"""

PLOTS = {
    "lost": """
{A} had a {color} {thing} that {he} took everywhere. / {His} favorite thing in the world was a {color} {thing}.
WALK
But when {he} wanted to go home, the {thing} was gone. / Suddenly {he} saw that {his} {thing} was not there anymore.
{A} sat down and began to cry. / {He} felt very {sad}. / {He} looked everywhere, but {he} could not find it.
A {bkind} named {B} came by. "Why are you so {sad}?" asked {B}.
/ Just then {B} the {bkind} came along. "What is wrong?" {bhe} asked.
"I lost my {color} {thing}," {told} {A}. / "My {thing} is gone, and I do not know where it is," {told} {A}.
"Do not worry," said {B}. "We will look for it together." / "Two can see more than one," said {B}. "Let us look!"
They looked {spot2}, but there was only [a snail|a feather|some moss|an old shoe].
/ First they looked {spot2}. It was not there.
Then {B} looked {spot3}, and there was the {color} {thing}! / At last {A} looked {spot3}. "Here it is!" {he} cried.
"Thank you, {B}!" said {A} and hugged {bhim}. / "Thank you, {B}!" said {A} and let {bhim} hold the {thing}.
/ {A} danced around {B}. "Thank you, thank you!" {he} cried.
""",
    "stuck": """
WALK
{He} heard a voice. "Help! Help me!" it cried. / All at once {he} heard somebody call for help.
It was {B}, a {small} {bkind}, who was stuck {trap}. / There was a {bkind} named {B}, stuck {trap}.
"Hold on!" said {A}. "I will help you." / "Do not be afraid," said {A}. "I am here."
{A} pulled and pulled, but {B} did not move. / {He} tried with all {his} strength, but it was too hard.
"I am not strong enough," {told} {A}, "but I have an idea." / Then {A} stopped and thought for a while.
{He} {went} home and came back with {tool}. / Near {place} {he} found {tool}.
Slowly and carefully, {A} used it to get {B} out. / With {tool} and a lot of patience, {B} was soon free.
"You saved me!" said {B}. "How can I thank you?" / {B} was {glad}. "Thank you, {A}," {bhe} said.
"You can be my friend," {told} {A}. / "Come and have some {food} with me," {told} {A}.
""",
    "share": """
It was nearly winter, and {A} had a basket full of {food}. / {A} had gathered a big pile of {food} for the cold days.
"These are all mine," {he} thought. / {He} hid the {food} {spot}, so that nobody could find them.
One {weather} {when}, {B} the {bkind} knocked on the door. / One {weather} {when}, {A} met a {bkind} named {B}.
"I am so hungry," said {B}. "Do you have something to eat?" / {B} was thin and tired and had nothing to eat.
{A} looked at the {food} and did not know what to say. / At first {A} wanted to say no.
But then {he} saw how {sad} {B} was. / Then {he} thought, "What if I were hungry?"
"Come in," said {A}. "There is enough for two." / "Take as many {food} as you like," said {A}.
They ate together and talked until it was dark. / {B} ate and ate, and {bhis} eyes became bright again.
In spring {B} came back with {gift}. "This is for you," {bhe} said.
/ A few days later {B} came with a basket of {food}. "Now I can share too," {bhe} said.
""",
    "fright": """
But there was one thing that {A} did not like: {fright}.
/ Only one thing made {him} shake: {A} was afraid of {fright}.
One {weather} day, {he} stayed too long at {place}. / One evening {he} lost {his} way near {place}.
{His} heart beat fast, and {he} hid {spot}. / {He} wanted to run home, but {his} legs would not move.
"Who is there?" asked a soft voice. It was {B} the {bkind}.
/ Then {B}, an old and {kind} {bkind}, sat down next to {him}.
"I am afraid of {fright}," {told} {A}. / "Please do not laugh," said {A}, "but I am scared."
"I was afraid too when I was small," said {B}. / "Everybody is afraid sometimes," {told} {B}.
"Take my hand, close your eyes and count to [three|five|ten]." / "Let us sing a song, then it will not be so bad."
{A} did so, and slowly {he} felt [better|brave|warm and safe]. / It helped, and soon {A} could smile again.
"Look up," said {B}, and {A} saw [a thousand stars|the big round moon|the fireflies dance].
{B} took {him} home, and {A} was not afraid of {fright} anymore.
""",
    "broken": """
{His} neighbor was a {bkind} named {B}, who had a beautiful {color} {thing}.
/ {A} had a friend named {B}. {B} was a {bkind} and had a {color} {thing}.
One {weather} {when}, {A} played with the {thing} and dropped it.
/ While {B} was away, {A} took the {thing}, and it fell down.
Crack! It was broken. / It broke into [two|three|many] pieces.
{A} was scared and hid it {spot}. / "Nobody saw me," {he} thought and {went} away.
But that night {he} could not sleep, because {he} felt so {sad}.
/ But {his} heart was heavy, and even {his} {food} tasted bad.
The next morning {he} {went} to {B}. "I broke your {thing}. I am sorry," {he} said.
/ "I must tell the truth," said {A}. So {he} told {B} everything.
{B} was quiet for a moment. / {B} looked at {him} for a long time.
"Thank you for telling me," said {B}. "We can fix it."
/ "A {thing} can be mended," said {B}, "and so can a friendship."
They worked all day with [glue|string|needle and thread], and at last the {thing} was whole again.
""",
    "learn": """
All {his} friends could {skill}, but {A} could not. / More than anything {A} wanted to {skill}.
One {weather} {when}, {he} tried it at {place}, but {he} fell down. / {He} tried and tried, but it did not work.
"I will never learn it!" {he} cried. / "It is too hard for me," said {A}.
{B} the {bkind} had seen it all. / A {kind} {bkind} named {B} was watching {him}.
"Nobody can do it the first time," said {B}. / "I needed a whole year to learn it," said {B}.
"Will you show me how to {skill}?" asked {A}. / "Can you teach me?" asked {A}.
"Of course," {told} {B}. "Start slowly, one small step at a time." / {B} smiled and showed {him} how to begin.
Every {when} they met at {place}, and {A} got a little better. / They practiced for many days, in sun and in rain.
And then one {weather} {when}, {A} could {skill} all alone!
/ At last {he} did it. "Look, {B}, I can {skill}!" {he} shouted.
{B} clapped and was very proud of {him}. / "I knew you could do it," said {B}.
""",
    "gift": """
Tomorrow was the birthday of {B} the {bkind}. / {His} best friend {B}, a {small} {bkind}, had a birthday.
{A} wanted to give {bhim} something special, but {he} had no money. / "What can I give {bhim}?" thought {A}.
So {he} sat down and made {gift}. / After a while {he} had an idea and made {gift}.
On the way to {place} it began to rain, and everything got wet. / But on the way {he} fell into a puddle. Splash!
"Oh no, now it is ruined," {told} {A} with tears in {his} eyes. / {A} felt {sad} and wanted to go back home.
But {B} had already seen {him}. "Is that for me?" {bhe} asked. / {B} opened the door. "Come in, {A}!" {bhe} said.
"It was much nicer before," said {A}. / "I am sorry that it is not perfect," said {A}.
"You made it for me," said {B}, "and so it is the best gift of all."
Then they ate {food} and danced until [midnight|the moon came up|everyone was tired].
""",
    "garden": """
One {weather} {when}, {A} found a seed {spot}. / A {bkind} named {B} gave {him} a tiny seed.
{He} put it into the earth and gave it some water. / {He} planted it near the house and waited.
The next day {he} looked, but there was nothing to see. / A week went by, and nothing happened.
"Why does it not grow?" cried {A}. / "Maybe it is a bad seed," said {A}.
"Good things need time," {told} {B} the {bkind}. / {B} the {bkind} laughed. "You have to be patient," {bhe} said.
So {A} came every {when} and brought water, even when it was cold. / So {he} waited and sang to it every night.
And then, one {weather} {when}, there was a small green leaf! / At last something green came out of the ground.
It grew and grew, until it was a {color} {plant}. / By summer it had become the biggest {plant} in the village.
{A} called {B} and shared it with {bhim}. / "Look what we made!" said {A}, and {B} was {glad}.
""",
}


def parse(text: str) -> list[tuple[str, ...]]:
    """Sentences of a plot, each as the ways to say it."""
    lines = text.replace("WALK\n", WALK[1:]).replace("\n/ ", " / ").strip().split("\n")
    return [tuple(line.split(" / ")) for line in lines]


@functools.cache
def plots() -> list[list[tuple[str, ...]]]:
    return [parse(OPENING + plot[1:] + ENDING[1:]) for plot in PLOTS.values()]


@functools.cache
def holes(template: str) -> list[tuple[str, list[str]]]:
    """A template as (text, choices that follow it)."""
    parts = [*re.split(r"\[([^]]*)\]|(\{\w+\})", template), "", ""]
    return [(text, (choice or slot or "").split("|")) for text, choice, slot in zip(*[iter(parts)] * 3, strict=True)]


def pick(words: list[str] | tuple[str, ...], rng: random.Random) -> str:
    return words[int(rng.random() * len(words))]


def say(template: str, cast: dict[str, str], rng: random.Random) -> str:
    out: list[str] = []
    for text, choices in holes(template):
        word = pick(choices, rng)
        if word.startswith("{"):
            slot = word[1:-1]
            word = cast[slot] if slot in cast else pick(varied(slot), rng)
        out += [text, word]
    return "".join(out)


@functools.cache
def varied(slot: str) -> list[str]:
    return VARIED[slot].split("|")


def cast_of(rng: random.Random) -> dict[str, str]:
    """Who and what a story is about."""
    cast = {slot: pick(words.split("|"), rng) for slot, words in FIXED.items()}
    cast["spot"], cast["spot2"], cast["spot3"] = rng.sample(SPOTS.split("|"), 3)
    cast["akind"], cast["bkind"] = rng.sample(list(HOMES), 2)
    cast["home"] = HOMES[cast["akind"]]
    for who, b in (("A", ""), ("B", "b")):
        gender = pick(("he", "she"), rng)
        cast[who] = pick([name for name in NAMES[gender].split() if name != cast.get("A")], rng)
        cast |= zip((b + "he", b + "him", b + "his"), PRONOUNS[gender], strict=True)
    return cast | {"He": cast["he"].capitalize(), "His": cast["his"].capitalize()}


def story(rng: random.Random) -> str:
    """One story of about 80 to 180 words, in two paragraphs."""
    cast = cast_of(rng)
    lines = [say(pick(ways, rng), cast, rng) for ways in plots()[rng.randrange(len(PLOTS))]]
    turn = rng.randrange(3, len(lines) - 2)
    text = " ".join(lines[:turn]) + "\n\n" + " ".join(lines[turn:])
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


@plugin.dataset("storybook")
def write_corpus(
    path: Path, megabytes: float, seed: int, progress: Callable[[float, float], None] | None = None
) -> None:
    """Write about `megabytes` of stories, `<|endoftext|>` lines between them. progress(megabytes done, megabytes)."""
    rng, written = random.Random(seed), 0
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        while written < megabytes * 1e6:
            written += f.write(story(rng) + "\n<|endoftext|>\n")
            if progress:
                progress(written / 1e6, megabytes)
