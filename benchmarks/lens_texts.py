"""Texts on which effects are measured, of which no lens was made: twenty-four of prose, twelve of code.

And the lens that labels are measured through: the mean-field one of all texts that the package brings.
"""

from __future__ import annotations

from typing import Any

from tl_flash import JacobianLens, jacobian_lens
from tl_flash.lens import own_texts

PROSE = (
    "The bus driver knew every stop by its smell. There was bread at the corner of Mill Street, wet rope by the "
    "harbour, and at the last one, where nobody ever got off, there was only the wind.",
    "When they opened the old piano they found eleven letters, a thimble and a nest of mice. The letters were all "
    "from the same man, and all of them asked for the money back.",
    "For three days the river rose. On the fourth it stood level with the kitchen window, brown and slow, and my "
    "brother rowed out to see whether the goats had reached the hill.",
    "She had promised to be quiet, and she was, until the magician asked for somebody who was not afraid of birds. "
    "Then she was standing on her chair with both hands in the air.",
    "In the morning the guard found the gate open and the dogs asleep. Nothing was missing from the museum except a "
    "painting that everyone had always believed to be a copy.",
    "He wrote the last line of the report, read it aloud to the empty office, and crossed it out again. There had to "
    "be a kinder way to say that the bridge would not hold.",
    "Most spiders have eight eyes, yet few of them see well. Hunters that jump on their prey are the exception: they "
    "can judge distances and even tell some colours apart.",
    "Glass is made by melting sand with soda and lime at about 1,500 degrees. The soda lowers the temperature at "
    "which the sand melts, and the lime keeps the finished glass from dissolving in water.",
    "The first underground railway opened in London in 1863. Its carriages were lit by gas and pulled by steam "
    "engines, so that the tunnels had to be vented at short distances.",
    "A good knife needs little care. Wash it by hand, dry it at once, keep it away from other metal, and draw it "
    "over a stone a few times before you put it back in the block.",
    "The moon has no light of its own. What we see is sunlight reflected by its surface, and the phases come from "
    "the changing angle between the sun, the moon and ourselves.",
    "If the engine does not start, check whether the battery is charged and the tank is full. Then look at the cable "
    "that leads to the spark plug: it often comes loose on rough ground.",
    "Tea was brought to Europe by Dutch merchants in the early seventeenth century. It was sold at first as a "
    "medicine, at prices that only rich families could afford.",
    "The committee met on Thursday to discuss the new timetable. Several members feared that the evening courses "
    "would lose students if they began before six, and the decision was put off until May.",
    "Prices of wheat rose again last week after a dry spring in the main growing regions. Traders expect the harvest "
    "to be a tenth smaller than last year, while stocks are already low.",
    "The home side scored early and then defended for an hour. With two minutes left their keeper dropped a harmless "
    "cross, and the match that nobody had enjoyed ended in a draw.",
    "Dear neighbours, on Saturday we are going to celebrate the wedding of our daughter in the garden. It may become "
    "loud after ten. Please come and have a glass with us instead of calling the police.",
    "I stayed at this hotel for two nights in October. The room was small but very clean, the bed was comfortable, "
    "and the breakfast had fresh fruit and far too many kinds of cheese.",
    "Memory is not a record but a reconstruction. Each time we recall an event we build it again from fragments, and "
    "what we add while doing so is stored together with the rest.",
    "The contract ends on the last day of December unless it is renewed in writing. Either side may end it earlier "
    "if the other fails to meet its duties and does not mend this within fourteen days.",
    "The patient was a woman of 54 who had felt tired for several months. Blood tests showed a lack of iron, and "
    "further examination found a small ulcer, which was treated with success.",
    "To grow tomatoes on a balcony you need a large pot, a sunny wall and patience. Plant them deep, water them "
    "every evening at the root, and pinch out the side shoots once a week.",
    "Volcanic soil is rich in minerals, which is why people have always settled on the slopes of volcanoes in spite "
    "of the danger. Vines, coffee and olives grow there better than almost anywhere.",
    "The old theatre will be pulled down after all. For years the city had looked for a buyer who would repair the "
    "roof, but the only offer came from a company that builds car parks.",
)

CODE = (
    "def read_rows(path):\n    with open(path) as file:\n        for line in file:\n            line = "
    "line.strip()\n            if line and not line.startswith('#'):\n                yield line.split(',')\n",
    "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n\n    def distance(self, "
    "other):\n        return ((self.x - other.x) ** 2 + (self.y - other.y) ** 2) ** 0.5\n",
    "import argparse\n\nparser = argparse.ArgumentParser()\nparser.add_argument('--count', type=int, default=3)\n"
    "args = parser.parse_args()\nfor i in range(args.count):\n    print(i)\n",
    "const total = items\n  .filter((item) => item.price > 0)\n  .map((item) => item.price * item.amount)\n  "
    ".reduce((a, b) => a + b, 0);\nconsole.log(`Total: ${total}`);\n",
    "def binary_search(values, wanted):\n    low, high = 0, len(values)\n    while low < high:\n        middle = "
    "(low + high) // 2\n        if values[middle] < wanted:\n            low = middle + 1\n        "
    "else:\n            high = middle\n    return low\n",
    "public class Counter {\n    private int count = 0;\n\n    public void increment() {\n        count++;\n    "
    "}\n\n    public int get() {\n        return count;\n    }\n}\n",
    "try:\n    result = connection.execute(query)\nexcept TimeoutError as error:\n    logger.warning('timed out: "
    "%s', error)\n    result = None\nfinally:\n    connection.close()\n",
    "fn main() {\n    let mut words: Vec<String> = Vec::new();\n    for word in text.split_whitespace() {\n        "
    "if word.len() > 3 {\n            words.push(word.to_string());\n        }\n    }\n}\n",
    "UPDATE accounts\nSET balance = balance - 50\nWHERE id = 17 AND balance >= 50;\n\nINSERT INTO transfers (source, "
    "target, amount) VALUES (17, 23, 50);\n",
    "import numpy as np\n\nx = np.linspace(0, 2 * np.pi, 100)\ny = np.sin(x)\nprint(y.mean(), y.std())\nassert "
    "abs(y.max() - 1) < 1e-3\n",
    '#!/bin/sh\nset -e\nfor file in *.txt; do\n    if [ -s "$file" ]; then\n        sort "$file" > '
    '"sorted/$file"\n    fi\ndone\necho done\n',
    "void swap(int *a, int *b) {\n    int t = *a;\n    *a = *b;\n    *b = t;\n}\n\nint main() {\n    int x = 1, y = "
    "2;\n    swap(&x, &y);\n    return x - y;\n}\n",
)


def lens_of_all_texts(model: Any) -> JacobianLens:
    """Where `jacobian_lens` by itself takes the first 32 tokens of every fourth one."""
    return jacobian_lens(model, own_texts(model).rows)
