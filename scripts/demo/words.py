# SPDX-License-Identifier: Apache-2.0
"""Word tables of the demo corpus: what `scripts.demo.corpus` draws names and nouns from.

Entries may hold the template notation that `scripts.demo.corpus.Writer` describes.
"""

from typing import NamedTuple


def options(text: str) -> tuple[str, ...]:
    """Parses a list whose items start with "- " on a new line; other line breaks are spaces."""
    return tuple(" ".join(item.split()) for item in f"\n{text.strip()} ".split("\n-")[1:])


def rows(text: str) -> tuple[list[str], ...]:
    """Parses such a list whose items have fields parted by semicolons."""
    return tuple([field.strip() for field in item.split(";")] for item in options(text))


def _entries(text: str) -> tuple[str, ...]:
    return tuple(" ".join(entry.split()) for entry in text.split(","))


GIRLS = _entries("""Anna, Mira, Lena, Clara, Rosa, Ida, Nora, Ella, Maya, Tessa, Lucy, Alice,
    Hannah, Greta, Ruth, Emma, Flora, Ada, Edith, Sara, Martha, Iris, Olive, Julia, Nina, Vera,
    Agnes, Grace, Leah, Elsie, Daisy, Marta, Amina, Yuki, Priya, Zara, Freya, Wren""")

BOYS = _entries("""Tom, Peter, Hugo, Finn, Oscar, Leo, Jonas, Emil, Max, Henry, Arthur, Simon,
    Ben, Walter, Otto, Theo, Martin, Felix, Jack, Samuel, Oliver, Anton, Noah, Karl, Edwin,
    Ivan, Luke, David, George, Milo, Robin, Jakob, Omar, Kenji, Ravi, Tariq, Bram, Colin""")

PETS = _entries("""Pip, Bella, Rusty, Shadow, Patch, Button, Pepper, Misty, Biscuit, Ginger,
    Snowy, Bramble, Whiskers, Clover, Hazel, Nutmeg, Pebble, Thistle""")

# Animals that a hero finds, and what they have hurt.
PATIENTS = {
    "fox": "paw", "gull": "wing", "swallow": "wing", "hedgehog": "foot", 
      "owl": "wing", "deer": "leg", "goose": "wing", "hare": "leg",
    "crow": "wing", "duck": "foot", "squirrel": "paw", "robin": "wing", "badger": "paw",
    "heron": "wing", "otter": "paw", "wolf": "paw", "bear": "paw", "magpie": "wing",
}  # fmt: skip

VILLAGE_STARTS = _entries("""Elm, Ash, Oak, Willow, Stone, Mill, Salt, Fern, Rose, Gull, Thorn,
    Winter, Amber, Fox, Heather, Maple, Raven, Silver, Summer, Apple""")
VILLAGE_ENDS = _entries(
    "brook, ford, bridge, field, haven, ton, dale, wood, well, bury, mere, gate"
)

TABLES = {
    name: _entries(text)
    for name, text in {
        "colour": """red, blue, green, yellow, white, black, brown, grey, golden, silver,
            orange, purple, pink, crimson, pale blue, dark green, ivory""",
        "kind": """kind, brave, clever, patient, shy, cheerful, quiet, curious, gentle, proud,
            stubborn, honest, careful, thoughtful, merry, generous, friendly, polite, bold,
            lonely, humble, restless, hopeful, serious, lively, hard-working, quick,
            imaginative, modest""",
        "joy": """happy, glad, proud, pleased, delighted, cheerful, grateful, thankful,
            relieved, content, overjoyed, full of joy, very happy, at peace, in high spirits""",
        "sorrow": """sad, worried, unhappy, upset, afraid, troubled, disappointed, gloomy,
            miserable, anxious, close to tears, very sad, nervous, full of doubt, heavy at heart""",
        "gently": """slowly, quietly, carefully, gently, softly, calmly,
            silently, patiently, without a word, with great care, without any hurry""",
        "quickly": """quickly, at once, without delay, in a hurry, as fast as possible, right
            away, immediately, without a second thought""",
        "suddenly": """suddenly, all at once, just then, at that very moment, out of nowhere,
            without warning""",
        "food": """bread and cheese, a bowl of soup, a slice of apple pie, fried fish, roasted
            chestnuts, a plate of pancakes, potato stew, blackberry jam on toast, a boiled egg,
            fresh rolls with butter, ginger biscuits, mushroom soup, plum cake, porridge with
            cream, a handful of cherries, onion soup""",
        "tree": """oak, willow, birch, pine, elm, apple tree, chestnut tree, cherry tree, beech,
            pear tree, linden, maple, walnut tree, fir""",
        "flower": """roses, daisies, tulips, violets, poppies, lilies, sunflowers, bluebells,
            daffodils, primroses, snowdrops, buttercups, marigolds, cornflowers""",
        "bird": """robin, blackbird, sparrow, swallow, crow, magpie, wren, lark, thrush, pigeon,
            jackdaw, woodpecker""",
        "keepsake": """[silver|brass|rusty|golden|tiny] key, [wooden|silver|bamboo] flute,
            [red|woollen|striped|green] scarf, [brass|old] compass, [copper|little|silver] bell,
            [red|blue|paper] kite, [gold|plain silver] ring, [pocket|silver] watch,
            [picture|leather|blue] book, [straw|felt|warm] hat, [toy|paper] boat, [painted|clay]
            cup, [walking|carved] stick, [glass|green] marble, [leather|velvet] purse,
            [tin|brass] whistle, [ivory|wooden] comb, [feather|fountain] pen, [wooden|painted]
            horse, [small|oil] lantern, [sewing|music] box, [woollen|leather] glove, [pearl|amber]
            necklace, [little|red] drum, [silver|wooden] spoon, [patched|black] umbrella,
            [chess|sketch] book, [red|rubber] ball, [fishing|bamboo] rod, [silk|yellow] ribbon""",
        "hiding": """under the [old|wooden|kitchen] bench, behind a sack of flour, beneath a
            pile of [dry|red] leaves, inside an old boot, on the window sill, between two
            [flat|mossy] stones, in the hay loft, at the bottom of the basket, under the bed,
            behind the clock, among the roots of the {tree}, in the nest of a [magpie|jackdaw],
            in the [long|wet] grass beside the path, at the edge of the well, inside the teapot,
            in the pocket of {his} other coat, on the lowest branch of the {tree}, under the
            bridge, on the back of a chair, behind the garden gate, in the bottom of the
            wheelbarrow, beside the [cold|old] stove""",
        "goods": """red apples, ripe pears, fresh eggs, brown bread, yellow cheese, honey,
            smoked fish, clay pots, woollen socks, leather belts, beeswax candles, garlic,
            onions, cabbages, plums, straw hats, wooden toys, copper pans, ribbons, spices,
            salt, walnuts, dried mushrooms, lavender soap, baskets, carrots, lemons, blankets,
            seeds, tin cups, butter, strawberries, second-hand books, sharp knives, umbrellas,
            buttons""",
        "gift": """a jar of honey, a bag of apples, a warm blanket, a loaf of bread, a bunch of
            {flower}, a small drawing, a pot of jam, a pair of gloves, a wooden bowl, a basket
            of eggs, a new pair of boots, a song, a silver coin, a cake with almonds, a carved
            {bird}, a book of stories""",
        "made": """kite, [toy|rowing] boat, bird house, stool, [little] bridge, lantern,
            scarecrow, sledge, wooden chair, raft, stone wall, cradle, flute, garden gate,
            swing, windmill""",
        "music": "fiddle, flute, accordion, guitar, drum, harp, trumpet, piano",
        "fear": """the dark, deep water, thunder, high places, the old forest, big dogs,
            speaking aloud, the cellar, the narrow bridge, strangers""",
        "contest": """the baking contest, the boat race, the great race, the singing contest,
            the kite festival, the harvest games, the chess match, the garden show, the
            story-telling evening, the running race""",
        "month": """January, February, March, April, May, June, July, August, September,
            October, November, December""",
        "weekday": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday",
        "number": "two, three, four, five, six, seven, eight, nine, ten, twelve, twenty",
        "hour": "two, three, four, five, six, seven, eight, nine, ten, eleven, twelve",
        "once": "one evening, one morning, one night, one day",
        "hobby": """climbing trees, drawing animals, reading stories, collecting stones, singing
            songs, flying kites, watching clouds, learning new words, building little boats,
            telling jokes, counting stars, making things from wood, riding, swimming, picking
            berries""",
        "relative": """mother, father, grandmother, grandfather, aunt, uncle, big sister,
            big brother""",
        "pet": "dog, cat, puppy, kitten, goat",
        "ordinal": """first, second, third, fourth, fifth, sixth, seventh, eighth, ninth, tenth,
            twelfth, fifteenth, twentieth""",
        "room": "kitchen, attic, workshop, garden, barn, cellar, hall, bedroom, parlour, pantry",
        "moral": """[The moral of the story is|This story teaches us|So we learn|And so
            we see] that""",
        "saying": """small steps still reach the top of the hill, a friend is worth more than
            gold, kind words cost nothing, patience opens many doors, the early hours are the
            best hours, every storm ends, a good question is half of the answer, shared bread
            tastes better, nobody is too small to help, what we give away comes back to us, an
            honest answer is the shortest road, a mistake is a teacher in disguise, courage is
            only fear that keeps walking, slow work is often good work, it is never too late to
            say sorry, the best treasure is a quiet heart, many hands make the load light, even
            the longest night has a morning""",
        "past_chore": """swept the floor, fed the hens, carried water from the well, chopped
            some wood, hung up the washing, lit the fire, peeled the potatoes, mended the fence,
            milked the cow, weeded the garden, polished the boots, set the table, washed the
            dishes, baked a cake, read a few pages, wrote a short letter, drank a cup of tea,
            watered the beans""",
        "interlude": """Somewhere a dog barked., A {bird} sang in the {tree}., The wind smelled
            of {smell}., A cat watched from a wall., The church clock struck {hour}., Far away a
            bell was ringing., The shadows grew [longer|shorter]., Smoke rose from the
            chimneys., A cart rolled by with a load of {goods}., Children were laughing in the
            street., A {colour} butterfly danced over the {flower}., It was very quiet., Nobody
            spoke for a while., Time passed slowly., The sky was {sky}., There were {sight} in
            the distance., Only {sound} could be heard., A single leaf fell to the ground., An
            old man lifted his hat and smiled., The air was [cool|sweet|still|fresh].""",
        "hair": """[long|short|curly|red|dark|fair|brown] hair, two [long|brown|fair] braids,
            [grey|green|dark|bright blue] eyes, [freckles|a scar] on {his} nose,
            hair as [black as coal|red as a fox|yellow as straw]""",
        "garment": """[red|blue|green|grey] [coat|jacket|scarf], hat with a [feather|wide brim],
            leather apron, [woollen|striped] [cap|shawl|waistcoat], shirt without buttons,
            pair of [large|old|yellow] boots, coat with [many pockets|silver buttons]""",
        "then": "then, soon, after a while, a little later, before long, after some time",
        "smell": """bread, rain, wet earth, smoke, salt, hay, apples, pine needles, flowers,
            wood and wax, cinnamon, the sea""",
        "sky": """clear, grey, pink in the east, full of small clouds, dark blue, pale and wide,
            bright, covered with clouds, red like a ripe apple""",
    }.items()
}


class Season(NamedTuple):
    """A season.

    Attributes:
      name: as in "one winter morning".
      months: in order.
      adjectives: fit a day as well as the weather.
      weather: whole sentences in the past tense.
      nature: clauses in the present tense.
      people: clauses in the present tense.
    """

    name: str
    months: tuple[str, str, str]
    adjectives: tuple[str, ...]
    weather: tuple[str, ...]
    nature: tuple[str, ...]
    people: tuple[str, ...]


SEASONS = (
    Season(
        "spring",
        ("March", "April", "May"),
        _entries("bright, fresh, rainy, mild, windy, clear"),
        _entries("""The snow had melted., A soft rain was falling., Young leaves covered the
            {tree}., The air smelled of wet earth and {flower}., Small clouds hurried across
            the sky., The stream was full and loud., The sun had come back at last., The first
            {flower} were in bloom., A warm wind blew from the south., Lambs were jumping in
            the meadow."""),
        _entries("""the days grow longer, the snow melts, the first flowers open, birds build
            their nests, the trees turn green, lambs are born, bees come out of their hives,
            the streams run fast"""),
        _entries("""farmers plough the fields, people open their windows, children look for
            snowdrops, gardeners sow beans and peas, families clean the house from top to
            bottom"""),
    ),
    Season(
        "summer",
        ("June", "July", "August"),
        _entries("hot, warm, sunny, dry, bright, quiet"),
        _entries("""The sun stood high in the sky., It had not rained for weeks., The fields
            were yellow with wheat., Bees hummed over the {flower}., The evenings were long and
            light., Heat shimmered above the road., Thunder rolled behind the hills., The water
            sparkled in the sun., Swallows flew high above the roofs., Even the dogs slept in
            the shade."""),
        _entries("""the sun is strong, the nights are short, the wheat turns yellow, cherries
            and strawberries ripen, swallows hunt high in the air, crickets sing in the grass,
            thunderstorms clear the air, the rivers are low"""),
        _entries("""children swim in the lake, farmers cut the hay, people sit outside until
            late, families eat supper in the garden, shepherds take their sheep to the high
            meadows"""),
    ),
    Season(
        "autumn",
        ("September", "October", "November"),
        _entries("cool, misty, windy, golden, grey, rainy"),
        _entries("""The leaves had turned red and gold., Mist lay over the fields., The wind
            pulled at the shutters., Apples lay in the wet grass., The geese were flying
            south., Rain tapped on the roofs all day., The nights were getting cold., Smoke
            from the fires hung in the air., The harvest was in the barns., Dry leaves danced
            along the road."""),
        _entries("""the leaves turn red and yellow, the days become shorter, apples and nuts
            are ripe, many birds fly south, squirrels hide their nuts, mushrooms grow in the
            woods, fog covers the valleys in the morning, the wind blows the leaves from the
            trees"""),
        _entries("""farmers bring in the harvest, people pick apples and make jam, children fly
            kites, families gather wood for the fire, neighbours meet for the harvest feast"""),
    ),
    Season(
        "winter",
        ("December", "January", "February"),
        _entries("cold, snowy, frosty, dark, icy, clear, grey"),
        _entries("""Snow covered the roofs., The pond was frozen., Ice hung from the gutters
            like glass., The wind was bitter., Frost flowers grew on the windows., The snow was
            deep and soft., The days were short and the nights were long., Large flakes fell
            without a sound., Fires burned in every house., The road was white and empty."""),
        _entries("""the nights are long, snow covers the fields, ponds and lakes freeze, many
            animals sleep, the trees are bare, birds look for seeds near the houses, frost
            paints the windows, the sun stays low"""),
        _entries("""people sit by the fire, children build snowmen, families tell old stories,
            farmers mend their tools, neighbours drink hot tea together"""),
    ),
)


class Trade(NamedTuple):
    """A trade.

    Attributes:
      noun: what the person is called.
      sex: "he" or "any".
      worked: past tense, follows the person.
      working: "-ing" form.
      tool: singular noun.
      workplace: singular noun.
      product: noun that needs no article.
      does: present tense, follows "a baker".
    """

    noun: str
    sex: str
    worked: str
    working: str
    tool: str
    workplace: str
    product: str
    does: str


TRADES = {
    row[0]: Trade(*row)
    for row in rows("""
- fisherman; he; caught fish in the bay; mending nets; net; boat; fresh fish; goes out in a boat
  and catches fish
- baker; any; baked bread before dawn; kneading dough; rolling pin; bakery; warm loaves; bakes
  bread and cakes in a hot oven
- miller; any; ground wheat into flour; grinding wheat; millstone; mill; white flour; grinds wheat
  and rye into flour
- shepherd; any; kept sheep on the green slopes; watching the flock; crook; pasture; soft wool;
  looks after sheep and protects them from wolves
- carpenter; any; built tables and chairs; sawing planks; hammer; workshop; strong chairs; makes
  things out of wood
- blacksmith; any; hammered red-hot iron; hammering iron; anvil; forge; horseshoes; heats iron in a
  fire and hammers it into shape
- weaver; any; wove cloth in many colours; working at the loom; loom; weaving room; fine cloth;
  weaves thread into cloth
- tailor; any; sewed coats and trousers; sewing buttons; needle; shop; warm coats; sews clothes
  that fit
- clockmaker; any; repaired clocks and watches; winding clocks; magnifying glass; shop; ticking
  clocks; makes clocks and repairs them
- potter; any; made bowls and jugs; shaping clay; potter's wheel; pottery; brown bowls; shapes wet
  clay into bowls and jugs
- gardener; any; grew roses and beans; planting seeds; spade; garden; bright flowers; plants seeds
  and takes care of flowers and trees
- farmer; any; ploughed the fields; feeding the cows; plough; farm; ripe wheat; grows food and
  keeps animals
- beekeeper; any; looked after many hives; tending the hives; veil; bee garden; golden honey; keeps
  bees and collects their honey
- cobbler; any; mended boots and shoes; stitching leather; needle; shop; sturdy boots; makes and
  mends shoes
- teacher; any; taught the children of the village; reading aloud; piece of chalk; school; good
  questions; helps children to read and write and count
- lighthouse keeper; any; lit the great lamp every night; polishing the lamp; spyglass; lighthouse;
  a steady light; keeps the lamp burning so that ships find their way
- ferryman; he; carried people across the river; rowing the ferry; oar; ferry; safe crossings;
  carries people and goods across the river
- sailor; any; sailed to distant harbours; tying knots; rope; ship; tales of far countries; works
  on a ship and crosses the sea
- painter; any; painted pictures of the hills; mixing colours; brush; studio; bright pictures;
  paints pictures with brushes and colours
- fiddler; any; played at weddings and feasts; tuning the strings; fiddle; little room; merry
  tunes; plays the fiddle so that people can dance
- doctor; any; looked after the sick; visiting the sick; black bag; house; good advice; helps
  people who are ill
- innkeeper; any; kept a warm inn on the old road; pouring tea; ladle; inn; hot soup; gives
  travellers a bed and a warm meal
- woodcutter; any; cut wood in the forest; chopping wood; axe; hut; dry firewood; cuts trees and
  sells the wood
- candle maker; any; made candles from beeswax; dipping candles; ladle; shop; white candles; makes
  candles from wax and string
- basket maker; any; wove baskets from willow; weaving baskets; knife; barn; round baskets; weaves
  baskets out of willow branches
- librarian; any; looked after a thousand books; sorting books; ladder; library; good books; takes
  care of books and lends them to readers
- letter carrier; any; carried letters over the hills; sorting letters; leather bag; post office;
  good news; brings letters and parcels to every house
- glassblower; any; made bottles and windows; blowing glass; long pipe; workshop; blue bottles;
  blows hot glass into bottles and bowls
- stonemason; any; cut stones for walls and bridges; cutting stone; chisel; yard; strong walls;
  cuts stone and builds walls
- toymaker; any; carved toys for the children; carving wood; small knife; toy shop; wooden toys;
  makes dolls and other toys
- boat builder; any; built small boats; planing boards; plane; boat shed; sound boats; builds boats
  that do not leak
- cook; any; cooked for a large house; stirring soup; wooden spoon; kitchen; good soup; prepares
  meals for hungry people
- cheese maker; any; made round cheeses; turning the cheeses; wooden spoon; dairy; yellow cheese;
  turns milk into cheese
- map maker; any; drew maps of the coast; drawing maps; pen; study; careful maps; draws maps that
  show the way
- bell ringer; any; rang the bells of the old church; oiling the bells; rope; tower; clear chimes;
  rings the bells at the right hour
- stargazer; any; watched the stars every night; counting stars; telescope; tower; charts of the
  sky; studies the stars through a telescope
- goatherd; any; led goats over the rocky slopes; milking the goats; staff; hut; goat cheese; looks
  after goats and milks them
- charcoal burner; any; made charcoal deep in the woods; stacking logs; shovel; clearing; black
  charcoal; turns wood into charcoal
- forester; any; took care of the trees; planting young trees; axe; cabin; straight logs; looks
  after the trees and animals of the forest
- bookbinder; any; bound books in leather; sewing pages; needle; workshop; fine books; sews pages
  together and makes them into books
""")
}


class Region(NamedTuple):
    """A kind of landscape and what belongs in it; `spots` follow "to", "near" and "past"."""

    homes: tuple[str, ...]
    spots: tuple[str, ...]
    wilds: tuple[str, ...]
    sights: tuple[str, ...]
    sounds: tuple[str, ...]
    trades: tuple[str, ...]


_TOWN_TRADES = """baker, carpenter, tailor, teacher, cobbler, blacksmith, doctor, innkeeper,
    painter, clockmaker, cook, fiddler, weaver, potter, librarian, letter carrier, gardener"""

REGIONS = (
    Region(
        _entries("""[small|quiet|windy|little] [fishing village|village|town] by the sea, old
            harbour town, [white|stone|little] house above the beach, fishing village on the
            coast, village on a small island"""),
        _entries("""the harbour, the lighthouse, the beach, the old pier, the fish market, the
            sea wall, the boat shed, the bay"""),
        _entries("the cliffs, the open sea, the caves, the rocky point, the dunes, the far island"),
        _entries("fishing boats, gulls, white sails, dark clouds, ships, white waves"),
        _entries("the waves, the gulls, the wind, the creaking boats, the tide on the stones"),
        _entries(f"""fisherman, sailor, lighthouse keeper, boat builder, map maker, fisherman,
            {_TOWN_TRADES}"""),
    ),
    Region(
        _entries("""[small|quiet|little|old] village at the foot of the mountains, stone house
            high in the mountains, village in a deep valley, hut near the pass,
            [lonely|small] farmhouse in the mountains"""),
        _entries("""the village square, the old mill, the chapel, the spring, the stone bridge,
            the upper meadow, the inn, the sheep pen"""),
        _entries("""the pass, the high peak, the glacier, the gorge, the pine woods, the mountain
            lake"""),
        _entries("goats, eagles, white peaks, grey rocks, sheep, low clouds"),
        _entries("the wind, the cow bells, the waterfall, the stream, a distant horn"),
        _entries(f"shepherd, goatherd, cheese maker, stonemason, stargazer, {_TOWN_TRADES}"),
    ),
    Region(
        _entries("""[small|quiet|little|wooden] house at the edge of the forest, village deep
            in the woods, cottage in a clearing, little village among old oaks, cabin under
            tall pines"""),
        _entries("""the clearing, the brook, the wooden bridge, the hollow oak, the mushroom
            path, the pond, the forest road, the old hut"""),
        _entries("""the dark forest, the deep woods, the thicket, the hidden valley, the fir
            wood, the far side of the forest"""),
        _entries("deer, squirrels, tall trees, ferns, mushrooms, fallen leaves"),
        _entries("the leaves, the owls, a woodpecker, the brook, the wind in the branches"),
        _entries(f"""woodcutter, forester, charcoal burner, beekeeper, basket maker, toymaker,
            {_TOWN_TRADES}"""),
    ),
    Region(
        _entries("""[small|quiet|busy|little] [village|town] beside a wide river, old mill by
            the river, farmhouse in the green valley, village among wheat fields,
            [small|old] farmhouse near the river"""),
        _entries("""the river, the mill, the ferry, the market square, the orchard, the barn,
            the water meadow, the stone bridge"""),
        _entries("""the marsh, the reed beds, the far bank, the moor, the source of the river,
            the empty plain"""),
        _entries("ducks, wheat fields, herons, cows, slow boats, willow trees"),
        _entries("the river, the frogs, the mill wheel, the ducks, the bees"),
        _entries(f"ferryman, miller, farmer, beekeeper, basket maker, {_TOWN_TRADES}"),
    ),
    Region(
        _entries("""[large|busy|noisy|old] [town|city] with narrow streets, city with seven
            bridges, small flat above a bakery, tall house in the middle of the town,
            [crooked|narrow] house in the old town"""),
        _entries("""the market, the library, the station, the town hall, the park, the
            fountain, the bakery, the museum"""),
        _entries("""the old quarter, the city wall, the empty theatre, the clock tower, the
            tunnels, the hill behind the town"""),
        _entries("carts, pigeons, bright windows, lanterns, people with umbrellas, trams"),
        _entries("the bells, the traffic, the pigeons, footsteps, the rain on the roofs"),
        _entries(f"""glassblower, candle maker, bookbinder, bell ringer, map maker, stargazer,
            {_TOWN_TRADES}"""),
    ),
)
