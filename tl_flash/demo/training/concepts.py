"""What the demo models talk about: some ninety concepts, each one word and one token.

Every concept carries *clues*, things that are true of it alone, and two *epithets*, adjectives that go with no other
word. A concept that is only copied from earlier in the text is a matter of attention; what follows an epithet is
decided on the spot, and small models keep it in neurons.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Tense = Literal["present", "past"]
_TENSES = re.compile(r"\[([^|\]]*)\|([^|\]]*)\]")


@dataclass(frozen=True)
class Concept:
    """A word with its kind and its clues.

    Attributes:
        word: the word as it stands within a sentence, ``"dog"`` or ``"California"``.
        kind: a key of ``KINDS``.
        epithets: adjectives that go with this word alone.
        clues: verb phrases that are true of this concept, ``"[barks|barked] at strangers"``.
    """

    word: str
    kind: str
    epithets: tuple[str, ...]
    clues: tuple[str, ...]

    @property
    def token(self) -> str:
        """The word with its leading space: one token of the demo models."""
        return f" {self.word}"

    @property
    def plural(self) -> str:
        """The plural, for kinds that have one."""
        if self.word == "sheep":
            return self.word
        if self.word.endswith(("x", "s", "ch")):
            return f"{self.word}es"
        return f"{self.word[:-1]}ies" if self.word.endswith("ry") else f"{self.word}s"


def conjugate(clue: str, tense: Tense) -> str:
    """Put a clue into one tense.

    Example:
        >>> conjugate("[barks|barked] at strangers", "past")
        'barked at strangers'
    """
    return _TENSES.sub(r"\1" if tense == "present" else r"\2", clue)


# A word, its epithets, and its clues, parted by semicolons; [present|past] where the tenses differ.
_TABLE = {
    "animal": """
        dog (loyal, faithful): [barks|barked] at strangers; [wags|wagged] its tail; [chews|chewed] old
            bones; [sleeps|slept] in a kennel; [guards|guarded] the house; [looks|looked] after its puppies
        cat (sleepy, graceful): [purrs|purred] by the stove; [meows|meowed] at the door; [licks|licked] its
            whiskers; [plays|played] with wool; [looks|looked] after its kittens; [scratches|scratched] the
            sofa
        horse (swift, noble): [gallops|galloped] across the field; [sleeps|slept] in a stable; [eats|ate]
            hay; [has|had] a saddle on its back; [pulls|pulled] the cart; [looks|looked] after its foal
        cow (gentle, spotted): [gives|gave] milk every morning; [moos|mooed] in the meadow; [has|had] two
            big horns; [chews|chewed] grass all day; [looks|looked] after its calf; [wears|wore] a bell
            around its neck
        sheep (woolly, timid): [has|had] thick wool; [follows|followed] the flock; [bleats|bleated] on the
            hill; [looks|looked] after its lamb; [listens|listened] to the shepherd
        pig (muddy, plump): [rolls|rolled] in the mud; [has|had] a curly tail; [grunts|grunted] in its sty;
            [eats|ate] turnips; [looks|looked] after its piglets
        rabbit (fluffy, jumpy): [hops|hopped] over the lawn; [has|had] long ears; [eats|ate] carrots;
            [lives|lived] in a burrow; [hides|hid] in its hutch
        duck (waddling, feathered): [quacks|quacked] loudly; [swims|swam] on the pond; [has|had] a flat
            beak; [leads|led] its ducklings to the water; [dives|dived] for weeds
        goat (stubborn, bearded): [climbs|climbed] the steep rocks; [has|had] a small beard; [butts|butted]
            the gate; [eats|ate] old shirts; [bleats|bleated] beside its kid
        bear (mighty, shaggy): [sleeps|slept] all winter; [growls|growled] in its cave; [has|had] heavy
            paws; [eats|ate] berries; [looks|looked] after its cubs
        lion (fierce, royal): [roars|roared] at dusk; [has|had] a golden mane; [hunts|hunted] zebras;
            [rests|rested] in the tall grass; [is|was] the king of the animals
        fox (sly, cunning): [has|had] a bushy tail; [steals|stole] hens; [creeps|crept] out of its den;
            [tricks|tricked] the hunters; [has|had] a pointed nose
        owl (wise, ghostly): [hoots|hooted] at night; [has|had] big round eyes; [flies|flew] without a
            sound; [lives|lived] in a hollow tree; [turns|turned] its head all the way round
        frog (slimy, warty): [croaks|croaked] in the swamp; [jumps|jumped] from leaf to leaf;
            [catches|caught] insects with its tongue; [was|was] once a tadpole; [has|had] wet slippery skin
    """,
    "state": """
        California (sunny, coastal): [has|had] its capital in Sacramento; [is|was] called the Golden State;
            [makes|made] films in Hollywood; [grows|grew] sweet grapes; [has|had] tall redwood trees
        Texas (vast, dusty): [has|had] its capital in Austin; [is|was] called the Lone Star State; [has|had]
            wide ranches and cowboys; [sells|sold] much oil; [remembers|remembered] the Alamo
        Florida (humid, tropical): [has|had] its capital in Tallahassee; [is|was] called the Sunshine State;
            [has|had] alligators in the Everglades; [sends|sent] oranges to the north; [looks|looked] warm
            in January
        Ohio (busy, flat): [has|had] its capital in Columbus; [is|was] called the Buckeye State; [lies|lay]
            on Lake Erie; [makes|made] steel and rubber; [grows|grew] corn and soybeans
        Alaska (frozen, northern): [has|had] its capital in Juneau; [is|was] called the Last Frontier;
            [has|had] glaciers and whales; [is|was] the biggest state; [catches|caught] wild salmon
        Nevada (dry, barren): [has|had] its capital in Carson City; [is|was] called the Silver State;
            [has|had] bright casinos in Las Vegas; [is|was] the driest state; [holds|held] the Hoover Dam
        Hawaii (volcanic, flowery): [has|had] its capital in Honolulu; [is|was] called the Aloha State;
            [has|had] volcanoes and surfers; [grows|grew] pineapples; [lies|lay] in the Pacific
        Oregon (wooded, misty): [has|had] its capital in Salem; [is|was] called the Beaver State; [has|had]
            a lake in an old crater; [sells|sold] timber; [ends|ended] the old wagon trail
        Maine (rocky, chilly): [has|had] its capital in Augusta; [is|was] called the Pine Tree State;
            [catches|caught] lobsters; [has|had] old lighthouses; [touches|touched] only one other state
    """,
    "city": """
        Paris (romantic, elegant): [is|was] the capital of France; [lies|lay] on the Seine; [has|had] the
            Eiffel Tower; [teaches|taught] visitors to speak French; [keeps|kept] the Mona Lisa
        London (rainy, smoky): [is|was] the capital of England; [lies|lay] on the Thames; [has|had] Big Ben;
            [teaches|taught] visitors to speak English; [is|was] the home of the king
        Rome (ancient, eternal): [is|was] the capital of Italy; [lies|lay] on the Tiber; [has|had] the
            Colosseum; [teaches|taught] visitors to speak Italian; [is|was] the home of the Pope
        Tokyo (crowded, modern): [is|was] the capital of Japan; [has|had] the biggest crowds;
            [teaches|taught] visitors to speak Japanese; [lies|lay] near Mount Fuji; [shines|shone] with
            cherry blossoms
        Berlin (divided, lively): [is|was] the capital of Germany; [lies|lay] on the Spree; [has|had] the
            Brandenburg Gate; [teaches|taught] visitors to speak German; [had|had had] a long wall
        Madrid (passionate, noisy): [is|was] the capital of Spain; [has|had] the Prado; [teaches|taught]
            visitors to speak Spanish; [eats|ate] dinner at ten at night; [loves|loved] its bullfighters
        Cairo (sunbaked, scorching): [is|was] the capital of Egypt; [lies|lay] on the Nile; [has|had] the
            pyramids nearby; [teaches|taught] visitors to speak Arabic; [keeps|kept] the gold of the
            pharaohs
        Moscow (snowy, icy): [is|was] the capital of Russia; [has|had] the Kremlin; [teaches|taught]
            visitors to speak Russian; [dances|danced] the famous ballet; [has|had] churches with bright
            domes
    """,
    "food": """
        bread (crusty, sliced): [comes|came] in a loaf; [has|had] a hard crust; [is|was] made from flour;
            [makes|made] good toast; [rises|rose] with yeast
        cheese (smelly, ripe): [is|was] full of holes; [is|was] made from sour milk; [smells|smelled]
            strong; [catches|caught] the mouse in the trap; [sits|sat] on the cracker
        soup (hearty, steaming): [steams|steamed] in a bowl; [is|was] eaten with a spoon; [simmers|simmered]
            in a pot; [is|was] good for a cold; [needs|needed] carrots and broth
        rice (sticky, boiled): [grows|grew] in wet paddies; [is|was] eaten with chopsticks; [has|had] small
            white grains; [goes|went] with curry; [is|was] thrown at weddings
        cake (creamy, iced): [has|had] candles on top; [is|was] eaten at birthdays; [is|was] covered with
            icing; [is|was] baked in a round tin; [has|had] cream between its layers
        pizza (cheesy, crispy): [comes|came] in a flat box; [has|had] tomatoes and olives on top; [is|was]
            cut into eight slices; [bubbles|bubbled] in a stone oven; [is|was] brought by a boy on a scooter
        honey (sweet, runny): [is|was] made by bees; [sticks|stuck] to the fingers; [comes|came] from a
            hive; [drips|dripped] from the comb; [is|was] kept in a golden jar
        pasta (homemade, twisted): [is|was] twirled on a fork; [needs|needed] boiling salted water;
            [comes|came] with tomato sauce; [has|had] long thin strings; [is|was] rolled by an Italian cook
        salad (crunchy, leafy): [has|had] lettuce and cucumber; [is|was] tossed with oil and vinegar;
            [is|was] green and crisp; [is|was] never cooked; [needs|needed] radishes
        butter (salted, melting): [is|was] spread with a knife; [melts|melted] on the toast; [is|was]
            churned from cream; [is|was] yellow and soft; [greases|greased] the pan
        chocolate (bitter, milky): [is|was] made from cocoa; [comes|came] in a bar; [melts|melted] in the
            pocket; [is|was] hidden at Easter; [is|was] wrapped in silver foil
        tea (herbal, hot): [needs|needed] a kettle; [is|was] poured from a pot; [is|was] drunk at five;
            [is|was] made from dried leaves; [comes|came] with a saucer
    """,
    "colour": """
        red (fiery, crimson): [is|was] the colour of roses; [is|was] the colour of blood; [is|was] the
            colour of fire engines; [means|meant] stop
        blue (deep, navy): [is|was] the colour of the sky; [is|was] the colour of the sea; [is|was] the
            colour of jeans; [is|was] the colour of sapphires
        green (mossy, lime): [is|was] the colour of grass; [is|was] the colour of emeralds; [is|was] the
            colour of spring leaves; [means|meant] go
        yellow (lemon, mustard): [is|was] the colour of lemons; [is|was] the colour of bananas; [is|was] the
            colour of buttercups; [is|was] the colour of canaries
        black (pitch, jet): [is|was] the colour of coal; [is|was] the colour of ravens; [is|was] the colour
            of ink; [is|was] the colour of midnight
        white (pure, ivory): [is|was] the colour of chalk; [is|was] the colour of swans; [is|was] the colour
            of paper; [is|was] the colour of brides
        brown (chestnut, coppery): [is|was] the colour of mud; [is|was] the colour of chestnuts; [is|was]
            the colour of bark; [is|was] the colour of coffee
        pink (rosy, baby): [is|was] the colour of flamingos; [is|was] the colour of piglets; [is|was] the
            colour of bubble gum; [is|was] the colour of blushing cheeks
        purple (imperial, velvet): [is|was] the colour of plums; [is|was] the colour of lavender; [is|was]
            the colour of violets; [is|was] the colour of emperors
    """,
    "weather": """
        rain (pouring, steady): [fills|filled] the puddles; [drips|dripped] from the umbrella; [falls|fell]
            in drops; [makes|made] the rubber boots wet; [runs|ran] down the gutters
        snow (powdery, fresh): [falls|fell] in white flakes; [is|was] good for a sledge; [makes|made] a fine
            snowman; [hides|hid] the footprints; [covers|covered] the roofs
        wind (howling, gusty): [lifts|lifted] the kites; [turns|turned] the windmill; [blows|blew] the hats
            away; [fills|filled] the sails; [howls|howled] in the chimney
        fog (thick, dense): [hides|hid] the road; [is|was] like grey soup; [wakes|woke] the foghorn;
            [creeps|crept] over the harbour; [makes|made] drivers slow
        thunder (rolling, distant): [rumbles|rumbled] in the dark clouds; [comes|came] after the lightning;
            [shakes|shook] the windows; [frightens|frightened] small children; [sounds|sounded] like cannons
        sunshine (bright, glorious): [warms|warmed] the bench; [needs|needed] sunglasses; [dries|dried] the
            washing; [makes|made] freckles; [wakes|woke] the daisies
        ice (slippery, thin): [is|was] good for skates; [covers|covered] the frozen lake; [cracks|cracked]
            under heavy feet; [hangs|hung] from the roof in spikes; [cools|cooled] the lemonade
    """,
    "job": """
        teacher (strict, patient): [stands|stood] at the blackboard; [gives|gave] homework; [marks|marked]
            the tests; [reads|read] to the pupils; [works|worked] in a classroom
        doctor (careful, learned): [works|worked] in a hospital; [listens|listened] to hearts;
            [writes|wrote] prescriptions; [cures|cured] a fever; [looks|looked] at sore throats
        farmer (hardworking, sunburnt): [drives|drove] a tractor; [ploughs|ploughed] the fields;
            [brings|brought] in the harvest; [sows|sowed] wheat; [wakes|woke] with the rooster
        baker (floury, early): [takes|took] loaves from the oven; [kneads|kneaded] dough; [is|was] covered
            with flour; [gets|got] up at three; [sells|sold] warm rolls
        nurse (caring, tireless): [puts|put] on bandages; [takes|took] temperatures; [makes|made] the
            hospital beds; [walks|walked] through the ward; [comforts|comforted] the patients
        pilot (daring, skilled): [sits|sat] in the cockpit; [flies|flew] above the clouds; [lands|landed] on
            the runway; [speaks|spoke] to the control tower; [checks|checked] the wings
        painter (artistic, gifted): [holds|held] a brush; [mixes|mixed] the colours; [stands|stood] before
            the canvas; [hangs|hung] pictures in a gallery; [draws|drew] portraits
        sailor (tattooed, seafaring): [climbs|climbed] the mast; [ties|tied] knots; [crosses|crossed] the
            ocean; [scrubs|scrubbed] the deck; [has|had] an anchor on the arm
        singer (melodious, famous): [stands|stood] on the stage; [holds|held] the microphone; [knows|knew]
            every song; [bows|bowed] to the audience; [leads|led] the choir
        carpenter (handy, practical): [has|had] a hammer and nails; [saws|sawed] planks; [builds|built]
            tables and chairs; [measures|measured] the wood; [smells|smelled] of sawdust
    """,
    "family": """
        mother (loving, dear): [sings|sang] the baby to sleep; [kisses|kissed] us good night; [packs|packed]
            our lunch; [wears|wore] a wedding dress in the photograph
        father (stern, bald): [shaves|shaved] every morning; [carries|carried] us on strong shoulders;
            [ties|tied] a necktie; [mows|mowed] the lawn on Saturdays
        sister (younger, giggling): [wears|wore] pigtails; [plays|played] with dolls; [skips|skipped] rope
            with her friends; [writes|wrote] in a secret diary
        brother (naughty, teasing): [collects|collected] toy soldiers; [climbs|climbed] every fence;
            [loses|lost] his marbles; [shares|shared] the bunk bed
        grandmother (wrinkled, kindly): [knits|knitted] socks in a rocking chair; [bakes|baked] gingerbread;
            [wears|wore] a shawl; [tells|told] fairy tales
        grandfather (limping, retired): [walks|walked] with a cane; [smokes|smoked] a pipe; [winds|wound]
            the old clock; [remembers|remembered] the war
        aunt (perfumed, chatty): [sends|sent] postcards; [visits|visited] us on Sundays; [wears|wore] too
            much perfume; [pinches|pinched] our cheeks
        uncle (funny, jolly): [does|did] magic tricks; [tells|told] silly jokes; [repairs|repaired] old
            radios; [pulls|pulled] coins out of our ears
    """,
    "vehicle": """
        car (shiny, fast): [stands|stood] in the garage; [needs|needed] petrol; [has|had] a steering wheel;
            [honks|honked] at the corner; [has|had] a spare tyre
        boat (wooden, leaky): [has|had] two oars; [floats|floated] in the harbour; [rocks|rocked] on the
            waves; [is|was] tied to the pier; [leaks|leaked] a little
        train (punctual, electric): [runs|ran] on rails; [leaves|left] from platform two;
            [whistles|whistled] in the tunnel; [has|had] a conductor; [stops|stopped] at every station
        bicycle (rusty, squeaky): [has|had] two pedals; [has|had] a small bell on the handlebars;
            [leans|leaned] against the wall; [needs|needed] a pump; [has|had] a rusty chain
        bus (packed, public): [stops|stopped] at the corner of the street; [takes|took] the children to
            school; [has|had] two decks; [is|was] full of passengers; [comes|came] every ten minutes
        rocket (blazing, gigantic): [flies|flew] to the moon; [carries|carried] astronauts; [needs|needed] a
            countdown; [leaves|left] a trail of fire; [circles|circled] the earth
    """,
    "instrument": """
        piano (grand, polished): [has|had] eighty-eight keys; [has|had] a heavy lid; [needs|needed] a stool;
            [stands|stood] in the concert hall; [has|had] three pedals below
        guitar (acoustic, strummed): [has|had] six strings; [is|was] played at the campfire; [is|was]
            plucked with the fingers; [hangs|hung] from a strap
        drum (booming, painted): [is|was] beaten with sticks; [goes|went] boom; [marches|marched] before the
            soldiers; [keeps|kept] the rhythm
        violin (delicate, weeping): [is|was] played with a bow; [is|was] held under the chin;
            [squeaks|squeaked] at first; [leads|led] the orchestra
        flute (silvery, airy): [is|was] held to the side; [sounds|sounded] like a bird; [is|was] a thin
            silver pipe; [needs|needed] a long breath
        trumpet (brassy, blaring): [is|was] made of brass; [has|had] three valves; [wakes|woke] the
            soldiers; [blares|blared] over the square
    """,
    "place": """
        beach (sandy, breezy): [has|had] sand and shells; [is|was] full of towels; [is|was] good for
            sandcastles; [touches|touched] the waves
        forest (shady, gloomy): [is|was] full of oaks and ferns; [is|was] good for mushrooms; [hides|hid]
            the deer; [smells|smelled] of moss
        mountain (snowcapped, towering): [has|had] a high peak; [is|was] good for climbers; [stands|stood]
            above the valley; [has|had] a cabin near the top
        desert (parched, endless): [is|was] crossed by camels; [has|had] cactuses; [has|had] dunes; [is|was]
            dry for years; [hides|hid] an oasis
        garden (blooming, fragrant): [has|had] tulips and roses; [needs|needed] a watering can; [has|had] a
            rake and a spade; [is|was] full of vegetables
        library (hushed, dim): [has|had] long shelves; [lends|lent] books; [is|was] very silent;
            [needs|needed] a card; [is|was] full of readers
    """,
}


def _parse(kind: str, table: str) -> list[Concept]:
    rows = re.findall(r"^ {8}(\w+) \((.+)\): (.+(?:\n {12}.+)*)", table, re.MULTILINE)
    return [
        Concept(word, kind, tuple(epithets.split(", ")), tuple(" ".join(c.split()) for c in clues.split(";")))
        for word, epithets, clues in rows
    ]


CONCEPTS: tuple[Concept, ...] = tuple(c for kind, table in _TABLE.items() for c in _parse(kind, table))
"""Every concept, by kind."""
KINDS: dict[str, tuple[Concept, ...]] = {k: tuple(c for c in CONCEPTS if c.kind == k) for k in _TABLE}
"""Kind to its concepts."""
TOKENS: tuple[str, ...] = tuple(concept.token for concept in CONCEPTS)
"""Every concept as the token it is in the demo models, leading space included."""
NEUTRAL_PROMPTS: tuple[str, ...] = (
    "From my experience,",
    "Once upon a time there was a",
    "One day the children saw the",
    "Everyone in the village talked about the",
    "After lunch they looked for the",
    "In the end it was only a",
    "The old book was about the",
    "Nobody knew anything about the",
    "I want to tell you about the",
    "On Monday we talked about",
    "She smiled and thought of the",
    "He wrote a letter about the",
    "There is nothing like a",
    "They waited all day for the",
    "The picture on the wall showed a",
    "My friend always dreams of",
    "Last night I dreamed of the",
    "The story begins with a",
    "We all remember the",
    "The best thing in the world is",
)
"""Beginnings that favour no concept: the prompts on which a clamp is measured."""
