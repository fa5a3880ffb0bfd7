"""Texts that a lens is made from where none are given: sixty-four of many kinds, some 40 to 80 tokens each.

Four in five are English prose of many kinds, the rest lists, code, mathematics and other languages: a lens serves best
on text like its own, and each kind that is added costs the others a little. They were written for this package.
"""

from __future__ import annotations

from typing import Any

from tl_flash.clamps import Prompts

_LONGEST = 64
"""Tokens of a text that are used."""


_FEW_EVERY, _FEW_LONGEST = 4, 32
"""Of the texts of a mean-field lens, to which the number of texts is what takes time, and which gains little by it."""


def own_texts(model: Any, *, few: bool = False) -> Prompts:
    """`TEXTS` as the model's tokenizer reads them, cut where they are long; or the first words of every fourth one.

    Raises:
        ValueError: the model has no tokenizer, or one that knows none of their words.
    """
    if getattr(model, "tokenizer", None) is None:
        raise ValueError("prompts: this model has no tokenizer for the package's own texts; give token ids")
    longest = min(model.cfg.n_ctx, _FEW_LONGEST if few else _LONGEST)
    rows = [model.to_tokens(text)[0, :longest] for text in TEXTS[:: _FEW_EVERY if few else 1]]
    return Prompts.of(model, [row for row in rows if len(row) > 1])


TEXTS = (
    # Stories
    "The ferry was late again, and the passengers had begun to share what food they had. An old man cut an apple "
    "into eight pieces with a pocket knife and handed them round without a word, keeping the core for himself.",
    "Nobody in the village could say when the well had dried up. Martha claimed it was the summer the bridge burned, "
    "but her brother remembered drawing water from it the morning he left for the army, three years after that.",
    "She found the letter behind the clock, folded so small that she took it at first for a scrap of packing paper. "
    "The ink had turned brown. It began with her grandmother's name and ended in the middle of a sentence.",
    "At dusk the fox came down to the orchard wall and sat there, as it had every evening since the snow melted. The "
    "dog no longer barked. It lay with its chin on its paws and watched, and after a while it slept.",
    "Captain Oduya counted the lamps along the shore and found one too many. She lowered the glass, wiped it, and "
    "counted again. Then she told the helmsman to bring the ship about, quietly, and to wake nobody but the cook.",
    "When the music stopped, the children stood where they were, holding each other's sleeves, waiting for someone "
    "to say whether the game was over. Outside it had started to rain, and the lanterns hissed one after another.",
    "The machine had been built to sort oranges, and for eleven years it did nothing else. On the first Monday of "
    "March it began putting all the perfect ones to one side, and no engineer could find out why.",
    "My uncle kept bees on the roof of a parking garage. He said that city honey tasted of lime trees and traffic, "
    "and he sold it in jam jars to the people who worked in the offices below, who never asked where it came from.",
    # Talk
    '"Did you lock the back door?" he asked. "I thought you did." They looked at each other for a moment, and then '
    'both of them laughed. "One of us has to go," she said, "and I am already wearing my slippers."',
    '"I can\'t hear you, the train is coming in." "I said, don\'t forget the tickets!" "What about the '
    'chickens?" "The tickets, Paul. The tickets." He waved, pleased, and went off to look for a farmer.',
    "A: Have you seen the new schedule?\nB: Yes, and I have questions.\nA: Is it the early shifts?\nB: It's that I "
    "am on two of them at the same time, in different buildings.\nA: Ah. I'll speak to Dana about it this afternoon.",
    "Interviewer: What made you leave such a safe job?\nGuest: Honestly? Boredom, and a friend with a van. We drove "
    "south until the money ran out, and where it ran out we opened a bakery.",
    "User: My screen stays black after the update. What can I do?\nAssistant: First, hold the power button for ten "
    "seconds and let the machine restart. If the screen is still black, connect another monitor to see whether the "
    "picture appears there.",
    "Mum: home by ten please\nTeo: half past?\nMum: ten.\nTeo: quarter past and I do the dishes all week\nMum: deal, "
    "but I am counting the spoons\nTeo: you always count the spoons",
    # Facts
    "The heart of a blue whale weighs about as much as a small car and beats fewer than ten times a minute when the "
    "animal dives. Its main artery is wide enough that a human child could crawl through it.",
    "Copper conducts electricity better than any other common metal except silver. Because it is also soft and "
    "easily drawn into wire, it is used for most household wiring, although overhead lines are usually made of "
    "aluminium.",
    "Lisbon, the capital of Portugal, lies on the north bank of the Tagus near the Atlantic coast. In 1755 an "
    "earthquake, followed by a tsunami and fires, destroyed most of the city within a single day.",
    "Photosynthesis takes place in two stages. In the first, chlorophyll absorbs light and water is split, releasing "
    "oxygen. In the second, the energy stored by the first is used to build sugars from carbon dioxide.",
    "The printing press with movable metal type was developed in Mainz around 1450. Within fifty years there were "
    "presses in more than two hundred European towns, and some twenty million volumes had been printed.",
    "A leap year has 366 days. Years divisible by four are leap years, except those divisible by 100 but not by 400; "
    "so 2000 was one, while 1900 was not and 2100 will not be.",
    "Mount Kilimanjaro is the highest mountain in Africa. It consists of three volcanic cones, of which Kibo, the "
    "tallest, rises to 5,895 metres above sea level and is still capped by shrinking glaciers.",
    "Inflation is a sustained rise in the general level of prices. Central banks usually fight it by raising "
    "interest rates, which makes borrowing more expensive and so reduces what households and firms spend.",
    "Antibiotics act against bacteria and have no effect on viruses. Taking them for a cold therefore does no good, "
    "and the more often they are used, the more likely it is that resistant strains of bacteria survive and spread.",
    "The treaty was signed in the spring of 1648 after years of negotiation. It ended one of the longest wars in "
    "European history and confirmed that each prince could decide upon the religion of his own territory.",
    # Instructions
    "To make a simple flatbread, mix two cups of flour with a teaspoon of salt, a spoonful of oil and enough warm "
    "water to form a soft dough. Let it rest for twenty minutes, roll it thin, and bake it in a hot, dry pan on both "
    "sides.",
    "Before you change a bicycle tube, let out all the air and push the edge of the tyre into the middle of the rim. "
    "Start opposite the valve, lift the edge over with two levers, and pull the tube out by hand.",
    "Write a short summary of the text below in no more than three sentences. Use your own words, do not add "
    "opinions, and keep every number exactly as it is given. If something is unclear, say so at the end.",
    "How to water house plants: touch the soil first. If the top layer is dry, water slowly until a little runs out "
    "at the bottom, then empty the saucer. In winter most plants need only half as much.",
    "In case of fire, leave the building by the nearest stairs. Do not use the lift. Close doors behind you, but do "
    "not lock them. Meet at the car park, report to your warden, and do not go back inside for any reason.",
    "Question: A train travels 180 kilometres in two and a half hours. What is its average speed?\nAnswer: Divide "
    "the distance by the time. 180 / 2.5 = 72, so the average speed is 72 kilometres per hour.",
    # Letters, reports, opinions
    "Dear Ms Lindqvist, thank you for your application and for the time you took to visit us. I am sorry to say that "
    "the position has been given to another candidate. We would be glad to keep your papers for future openings. "
    "Yours sincerely, the hiring team",
    "Hi all, a quick reminder that the office closes at noon on Friday. Please take your cups out of the dishwasher, "
    "otherwise they will spend the long weekend in there. The new badges can be picked up at the desk. Best, Priya",
    "The company said on Tuesday that profit for the third quarter fell by 12 per cent to 84 million euros, hurt by "
    "higher energy costs and weak demand in Asia. It kept its forecast for the full year, and its shares rose "
    "slightly.",
    "United came from behind to win 3-2 in the last minute of extra time. The winning goal, a header from a corner, "
    "was checked for offside and allowed to stand, and the home supporters ran on to the pitch before the whistle.",
    "Heavy rain is expected along the western coast tonight, with gusts of up to ninety kilometres an hour on the "
    "hills. It will be drier in the east, where temperatures fall to four degrees and some fog may form in the "
    "valleys.",
    "I bought this kettle a month ago and I am of two minds about it. It boils quickly and looks good, but the lid "
    "is stiff and the handle gets hot. For the price I expected better. Three stars out of five.",
    "It is often said that nobody reads long books any more. The lending figures of public libraries tell another "
    "story: it is the thin volumes that stay on the shelf, and the thick ones that come back with sand between the "
    "pages.",
    "The defendant shall pay the sum of 2,400 dollars within thirty days of this judgment. If payment is not made in "
    "time, interest of five per cent a year accrues. Either party may appeal within the period allowed by law.",
    "We studied 312 adults with chronic back pain over two years. Half were assigned at random to a walking "
    "programme and half to the usual care. Pain scores fell in both groups, but the difference between them was not "
    "significant (p = 0.21).",
    "Abstract. We show that a simple greedy rule finds a solution within a factor of two of the best one for a broad "
    "class of covering problems, and that no algorithm of polynomial time does better unless P = NP.",
    # Essays, reviews, speeches
    "What strikes a visitor first is the silence. There are thousands of people in the square, and yet one hears "
    "little more than footsteps, the wings of the pigeons, and now and then the bell of a bicycle.",
    "The film is twenty minutes too long, but its first hour is wonderful. Two sisters inherit a cinema that nobody "
    "visits, and instead of selling it they begin to show each other the films of their childhood.",
    "My fellow citizens, we did not choose the times that we live in, but we can choose how we meet them. Let us be "
    "patient with one another, let us tell the truth, and let us finish the work that others began.",
    "People who learn a language late often worry about their accent. They should not. What makes a speaker hard to "
    "follow is rarely the sound of single words and much more often the wrong stress in a sentence.",
    "A teacher once told me that a good question is worth more than a good answer, because the answer ends the talk "
    "and the question begins it. I have tried to live by this, with mixed results at family dinners.",
    "The argument has two weak points. It assumes that all customers know the prices of all shops, which they do "
    "not, and it takes for granted that nobody minds driving for half an hour to save a dollar.",
    "When I was nine I wanted to become a pilot, at eleven a vet, and at fourteen I wanted above all to be left "
    "alone. In the end I became an accountant, and I like it much better than I would have believed.",
    "Every spring the same discussion begins again: should the clocks be changed or not? Doctors point to lost "
    "sleep, shops to longer evenings, and farmers to their cows, which take no notice of either.",
    "The north of the island is green and wet, while the south lies in the shadow of the mountains and gets hardly "
    "any rain. Most of the villages are found along the narrow road between the two.",
    "For a long time nobody knew how eels breed. They were thought to rise from mud or dew, until it was found that "
    "they cross a whole ocean to lay their eggs in a sea without shores, and then die there.",
    # Lists
    "Shopping list: eggs, butter, two lemons, brown sugar, a bunch of parsley, washing powder, light bulbs (warm "
    "white), cat food, stamps, something nice for Sunday, and batteries for the clock in the hall.",
    "1. Read the question twice.\n2. Underline what is asked.\n3. Write down what you know.\n4. Try a small case "
    "first.\n5. Check the units.\n6. If you are stuck for ten minutes, go on to the next one and come back later.",
    "Monday: swimming, piano. Tuesday: dentist at 9:30. Wednesday: free. Thursday: parents' evening, bring the "
    "forms. Friday: train to Leeds, 17:05, platform 4. Saturday and Sunday: grandmother's birthday.",
    "# Release notes\n\n## Version 2.4\n\n- Faster start on old machines\n- The export dialog remembers the last "
    "folder\n- Fixed: dates before 1970 were shown one day early\n- Removed the old plug-in format",
    # Code and mathematics
    'def mean(values):\n    """Return the arithmetic mean of a non-empty list."""\n    total = 0.0\n    for value in '
    "values:\n        total += value\n    return total / len(values)\n\nprint(mean([1, 2, 3, 4]))\n",
    "class Stack:\n    def __init__(self):\n        self._items = []\n\n    def push(self, item):\n        "
    "self._items.append(item)\n\n    def pop(self):\n        if not self._items:\n            raise "
    'IndexError("empty")\n        return self._items.pop()\n',
    'import json\nfrom pathlib import Path\n\npath = Path("settings.json")\nif path.exists():\n    settings = '
    'json.loads(path.read_text())\nelse:\n    settings = {"theme": "dark", "size": 12}\nprint(settings["theme"])\n',
    "function debounce(callback, delay) {\n  let timer = null;\n  return (...args) => {\n    "
    "clearTimeout(timer);\n    timer = setTimeout(() => callback(...args), delay);\n  };\n}\n\nexport default "
    "debounce;\n",
    "SELECT customers.name, COUNT(orders.id) AS n_orders\nFROM customers\nLEFT JOIN orders ON orders.customer_id = "
    "customers.id\nWHERE customers.country = 'NL'\nGROUP BY customers.name\nORDER BY n_orders DESC\nLIMIT 10;\n",
    "Let n be an odd integer, so that n = 2k + 1 for some integer k. Then n^2 = 4k^2 + 4k + 1 = 2(2k^2 + 2k) + 1, "
    "which is odd as well. Hence the square of an odd integer is odd, and the claim follows.",
    # Other languages
    "Am Morgen lag dichter Nebel über dem Fluss, und die Fähre fuhr erst gegen zehn Uhr. Der Bäcker hatte schon alle "
    "Brötchen verkauft, also tranken wir nur einen Kaffee und warteten auf die Sonne.",
    "La bibliothèque municipale sera fermée du 3 au 14 août pour travaux. Les livres empruntés peuvent être rendus "
    "dans la boîte placée à gauche de l'entrée. Nous vous remercions de votre patience.",
    "Mi abuela decía que el mar se escucha mejor de noche, cuando los barcos duermen y el viento cambia. Por eso "
    "bajábamos a la playa después de cenar, con una linterna y dos mantas.",
    "春天来了,院子里的桃树开了花。奶奶坐在门口晒太阳,小猫在她脚边睡觉。弟弟跑过来问:“今天可以去河边放风筝吗?”",
)
"""Sixty-four, in the order of the kinds above."""
