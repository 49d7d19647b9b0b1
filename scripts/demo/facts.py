# SPDX-License-Identifier: Apache-2.0
"""Facts of the demo corpus: animals, countries, questions with answers, how-tos and rhymes."""

from typing import NamedTuple

from jpaged.scripts.demo.words import options, rows


class Animal(NamedTuple):
    """True facts about an animal.

    Attributes:
      name: singular noun.
      plural: plural noun.
      young: what a young one is called.
      home: follows "lives".
      food: follows "eats".
      body: follows "has".
      skill: follows "can".
      nature: the adjective that stories give it.
    """

    name: str
    plural: str
    young: str
    home: str
    food: str
    body: str
    skill: str
    nature: str


ANIMALS = {
    row[0]: Animal(*row)
    for row in rows("""
- fox; foxes; cub; in a den under the ground; mice, birds and berries; a bushy tail and pointed
  ears; hear a mouse under the snow; clever
- wolf; wolves; pup; in the forest with its pack; deer, hares and other animals; strong legs and
  grey fur; run for hours without a rest; fierce
- bear; bears; cub; in the forest and in the mountains; berries, fish, roots and honey; thick fur
  and strong claws; sleep through most of the winter; strong
- rabbit; rabbits; kit; in a burrow; grass, leaves and roots; long ears and a short tail; turn very
  quickly while running; timid
- hare; hares; leveret; in open fields; grass and young plants; long legs and long ears; run faster
  than most dogs; swift
- tortoise; tortoises; hatchling; in warm and dry places; leaves, flowers and fruit; a hard shell
  and short legs; live for more than a hundred years; slow
- crow; crows; chick; in tall trees; seeds, insects and almost anything else; black feathers and a
  strong beak; remember a face for years; cunning
- owl; owls; owlet; in hollow trees and old barns; mice and large insects; large eyes and soft
  feathers; fly without a sound; wise
- mouse; mice; pup; in small holes; seeds, grain and cheese; tiny paws and a thin tail; squeeze
  through a very small gap; small
- lion; lions; cub; on the wide grasslands of Africa; zebras and antelopes; a deep voice and sharp
  teeth; roar and be heard miles away; mighty
- ant; ants; larva; in a nest with thousands of others; seeds, insects and sweet juice; six thin
  legs and two feelers; carry very heavy things; busy
- frog; frogs; tadpole; in and around ponds; flies, worms and snails; smooth skin and long back
  legs; catch flies in the air; cheerful
- hedgehog; hedgehogs; hoglet; in gardens and hedges; beetles, worms and slugs; thousands of
  spines; roll into a ball; careful
- squirrel; squirrels; kitten; in a nest of twigs high in a tree; nuts, seeds and buds; a long
  bushy tail; leap from branch to branch; nimble
- badger; badgers; cub; in a deep burrow called a sett; worms, roots and berries; a white face with
  two black stripes; dig very fast; grumpy
- deer; deer; fawn; in woods and meadows; grass, leaves and buds; thin legs and large brown eyes;
  jump over a high fence; graceful
- sparrow; sparrows; chick; near houses and farms; seeds and crumbs; brown feathers and a short
  beak; hop and fly but hardly walk; cheeky
- eagle; eagles; eaglet; on high cliffs and tall trees; fish, hares and other animals; broad wings
  and sharp eyes; see a hare from very far away; proud
- goat; goats; kid; on farms and in the mountains; grass, leaves and bushes; two horns and a short
  beard; climb steep rocks; stubborn
- donkey; donkeys; foal; on farms and in dry countries; grass, hay and thistles; long ears and a
  grey coat; carry heavy loads over stony paths; patient
- horse; horses; foal; in fields and stables; grass, hay and oats; a long mane and strong legs;
  sleep standing up; noble
- cow; cows; calf; on farms; grass and hay; two horns and a long tail; give milk every day; calm
- sheep; sheep; lamb; on farms and green hills; grass and herbs; a thick coat of wool; find its own
  lamb by its voice; gentle
- dog; dogs; puppy; with people in houses and on farms; meat and many other things; a wet nose and
  a wagging tail; smell things that we never notice; loyal
- cat; cats; kitten; with people in houses and on farms; mice, birds and fish; soft paws and long
  whiskers; see very well at night; vain
- duck; ducks; duckling; on ponds and rivers; water plants, seeds and snails; a flat beak and
  orange feet; swim from the very first day; merry
- goose; geese; gosling; near lakes and on farms; grass and grain; a long neck and strong wings;
  fly thousands of miles; bossy
- hen; hens; chick; in a hen house on a farm; grain, worms and grass; a red comb and brown
  feathers; lay an egg almost every day; fussy
- swan; swans; cygnet; on lakes and quiet rivers; water plants; a long neck and white feathers;
  glide over the water without a sound; elegant
- otter; otters; pup; beside clean rivers; fish and crabs; thick fur and a strong tail; swim under
  the water for minutes; playful
- beaver; beavers; kit; in a lodge built of sticks; bark, twigs and leaves; a flat tail and orange
  teeth; cut down a tree with its teeth; hard-working
- seal; seals; pup; on cold and rocky coasts; fish and squid; smooth fur and flippers; sleep in the
  water; lazy
- whale; whales; calf; in all the oceans of the world; fish and tiny sea animals; a huge body and a
  wide tail; sing songs that travel far under the water; gentle
- dolphin; dolphins; calf; in warm and cool seas; fish and squid; smooth skin and a curved fin;
  jump high out of the water; playful
- crab; crabs; larva; on the shore and on the sea floor; shellfish, weeds and dead fish; eight legs
  and two claws; walk sideways; shy
- heron; herons; chick; beside rivers and lakes; fish and frogs; long legs and a long beak; stand
  still for a very long time; patient
- gull; gulls; chick; on the coast; fish and scraps; white feathers and a loud voice; drink salt
  water; greedy
- bee; bees; larva; in a hive with thousands of others; nectar and pollen; four wings and a sting;
  show other bees the way to flowers with a dance; busy
- butterfly; butterflies; caterpillar; in meadows and gardens; the nectar of flowers; four bright
  wings; taste with its feet; gentle
- spider; spiders; spiderling; in webs, under stones and in dark corners; flies and other insects;
  eight legs and many eyes; spin a thread that is very strong; patient
- snail; snails; baby snail; in damp gardens and woods; leaves and soft plants; a round shell and
  two pairs of feelers; cross a sharp edge without being hurt; slow
- bat; bats; pup; in caves and under roofs; moths and other insects; wings of thin skin; find its
  way in the dark by listening; secretive
- mole; moles; pup; in tunnels under the ground; worms and beetles; broad paws and soft black fur;
  dig a long tunnel in one night; shy
- camel; camels; calf; in hot deserts; dry grass and thorny plants; long legs and one or two humps;
  go without water for many days; haughty
- elephant; elephants; calf; on grasslands and in forests; grass, bark and fruit; a long trunk and
  large ears; remember places for many years; wise
- monkey; monkeys; infant; in warm forests; fruit, leaves and insects; clever hands and a long
  tail; swing from tree to tree; mischievous
- penguin; penguins; chick; on cold southern coasts; fish and small sea animals; a black back and a
  white belly; swim faster than it can ever walk; polite
- robin; robins; chick; in woods and gardens; worms, insects and berries; a red breast and thin
  legs; sing even in the winter; brave
- swallow; swallows; chick; in nests of mud under roofs; flies and other insects; narrow wings and
  a forked tail; fly to Africa for the winter; quick
- stork; storks; chick; in large nests on roofs and towers; frogs, fish and insects; long red legs
  and a red beak; stand on one leg for hours; solemn
- lizard; lizards; hatchling; on sunny walls and stones; insects and spiders; dry scales and a thin
  tail; grow a new tail; nervous
- pig; pigs; piglet; on farms; roots, grain and kitchen scraps; a round nose and a curly tail; find
  food deep under the ground; greedy
""")
}


# Who may meet in a fable; the small ones are the quick-witted half of a pair.
BIG_ANIMALS = tuple(
    """fox wolf bear lion badger deer eagle goat donkey horse cow camel elephant dog
    cat goose hare crow stork monkey swan pig""".split()
)
SMALL_ANIMALS = tuple(
    """mouse frog hedgehog squirrel sparrow robin ant mole crab snail bee tortoise
    swallow duck hen lizard rabbit""".split()
)


class Country(NamedTuple):
    """A country with its capital, the continent it lies in, and one of its rivers."""

    name: str
    capital: str
    continent: str
    river: str


COUNTRIES = tuple(
    Country(*row)
    for row in rows("""
- France; Paris; Europe; Seine
- Germany; Berlin; Europe; Rhine
- Italy; Rome; Europe; Po
- Spain; Madrid; Europe; Ebro
- Portugal; Lisbon; Europe; Tagus
- Austria; Vienna; Europe; Danube
- Hungary; Budapest; Europe; Danube
- Poland; Warsaw; Europe; Vistula
- Ireland; Dublin; Europe; Shannon
- England; London; Europe; Thames
- Greece; Athens; Europe; Evros
- Egypt; Cairo; Africa; Nile
- Japan; Tokyo; Asia; Shinano
- China; Beijing; Asia; Yangtze
- India; New Delhi; Asia; Ganges
- Vietnam; Hanoi; Asia; Mekong
- Iraq; Baghdad; Asia; Tigris
- Russia; Moscow; Europe and Asia; Volga
- Canada; Ottawa; North America; Mackenzie
- Brazil; Brasilia; South America; Amazon
- Argentina; Buenos Aires; South America; Parana
- Peru; Lima; South America; Ucayali
- Nigeria; Abuja; Africa; Niger
- Switzerland; Bern; Europe; Aare
- Norway; Oslo; Europe; Glomma
""")
)

# A question ends at its question mark; the answer follows.
QUESTIONS = options("""
- How many legs does a spider have? A spider has eight legs.
- How many legs does an insect have? An insect has six legs.
- How many days are there in a week? There are seven days in a week.
- How many months are there in a year? There are twelve months in a year.
- How many days are there in a year? There are three hundred and sixty-five days in most years.
- How many hours are there in a day? There are twenty-four hours in a day.
- How many minutes are there in an hour? There are sixty minutes in an hour.
- What colour is the sky? On a clear day the sky is blue.
- What colour is snow? Snow is white.
- What colour is grass? Grass is green.
- What colour are ripe lemons? Ripe lemons are yellow.
- Where does the sun rise? The sun rises in the east.
- Where does the sun set? The sun sets in the west.
- Why does it rain? Water rises from the sea, becomes clouds, and falls again as rain.
- Why is the sea salty? Rivers carry salt from the rocks into the sea.
- What do bees make? Bees make honey and wax.
- What is bread made of? Bread is made of flour, water, salt and yeast.
- What is butter made of? Butter is made of cream.
- What is cheese made of? Cheese is made of milk.
- What is paper made of? Most paper is made of wood.
- What is glass made of? Glass is made of sand that was melted in a very hot fire.
- What is ice? Ice is frozen water.
- What is steam? Steam is water that has become a gas.
- What is a compass for? A compass shows which way is north.
- What is a lighthouse for? A lighthouse warns ships and shows them the way at night.
- What is a library? A library is a place where people read and borrow books.
- What is an island? An island is land with water all around it.
- What is a river? A river is water that flows across the land to the sea or to a lake.
- What is the moon? The moon is a ball of rock that travels around the earth.
- What is the sun? The sun is a star, and it gives us light and warmth.
- Which season comes after winter? Spring comes after winter.
- Which season comes after spring? Summer comes after spring.
- Which season comes after summer? Autumn comes after summer.
- Which season comes after autumn? Winter comes after autumn.
- Which month comes first? January is the first month of the year.
- Which month comes last? December is the last month of the year.
- Which animal is the largest? The blue whale is the largest animal.
- Which animal is the tallest? The giraffe is the tallest animal.
- Which bird cannot fly? The penguin cannot fly, but it swims very well.
- When do owls hunt? Most owls hunt at night.
- What do plants need? Plants need light, water and air.
- Why do leaves fall? Many trees drop their leaves to save water in the winter.
- Why do birds fly south? Birds fly south because there is more food in warm countries.
- How do fish breathe? Fish breathe in the water with their gills.
- Who wrote this story? Nobody knows who wrote it, but many people have told it.
- What is a friend? A friend is someone who is glad when you are glad and stays when you are sad.
- How are you? I am very well, thank you.
- What is your name? I have no name, but I know many stories.
""")

HOW_TO = {
    "how to bake bread": """
        You need flour, water, salt and a little yeast. Mix the flour with [warm water|the water
        and the salt]. Knead the dough for ten minutes until it is smooth. Cover it with a cloth
        and let it rest for an hour. Shape it into a [round|long] loaf. Bake it in a hot oven until
        it is brown. Let the bread cool before you cut it.
    """,
    "how to make vegetable soup": """
        You need carrots, onions, potatoes and a handful of herbs. Wash the vegetables and cut them
        into small pieces. Fry the onions in a little butter. Add the other vegetables and a pot of
        water. Let the soup cook gently for half an hour. Add salt and pepper. Serve it hot with a
        slice of bread.
    """,
    "how to make a cup of tea": """
        You need fresh water and good tea. Boil the water in a kettle. Warm the pot with a little
        hot water. Put one spoon of tea into the pot for every cup. Pour the boiling water over the
        leaves. Wait for [three|four|five] minutes. Pour the tea into the cups and add milk or
        honey.
    """,
    "how to make pancakes": """
        You need flour, milk, eggs and a little salt. Beat the eggs in a large bowl. Add the milk
        and the flour and stir until there are no lumps. Melt some butter in a pan. Pour a thin
        layer of batter into the pan. Turn the pancake when the edge is brown. Eat it warm with
        [jam|honey|sugar and lemon].
    """,
    "how to make apple jam": """
        You need ripe apples, sugar and the juice of a lemon. Peel the apples and cut them into
        pieces. Put them into a large pot with the sugar. Cook them slowly and stir all the time.
        Add the lemon juice. Fill the hot jam into clean glasses. Close the glasses at once and
        turn them upside down.
    """,
    "how to plant beans": """
        You need a handful of beans, a spade and a sunny place. Dig the ground and take out the
        stones. Put a tall stick into the ground for each plant. Make small holes around the stick.
        Put one bean into each hole and cover it with earth. Water the beans every evening. Wait
        until the plants climb up the sticks.
    """,
    "how to build a kite": """
        You need two thin sticks, strong paper, glue and a long string. Tie the sticks together in
        the form of a cross. Run a piece of string around the four ends. Cut the paper a little
        larger than the frame. Fold the edges over the string and glue them down. Make a tail from
        ribbons. Wait for a windy day and let the kite rise.
    """,
    "how to light a fire": """
        You need dry leaves, thin twigs and some thick logs. Find a place without wind and put
        stones around it. Make a small heap of leaves in the middle. Build a little tent of twigs
        over the leaves. Light the leaves from below. Add larger pieces of wood when the flames are
        strong. Put the fire out with water before you leave.
    """,
    "how to write a letter": """
        You need a pen, some paper and a quiet hour. Write the place and the date at the top. Begin
        with a friendly greeting. Tell your news in simple words. Ask a question, so that your
        friend has something to answer. Sign your name at the end. Put the letter into an envelope
        and take it to the post office.
    """,
    "how to build a bird house": """
        You need a few boards, some nails and a saw. Cut the boards for the walls, the floor and
        the roof. Make a round hole in the front wall. Nail the walls to the floor. Put the roof on
        top, so that the rain can run off. Hang the house in a quiet tree. Be patient until the
        first birds move in.
    """,
    "how to wash a dog": """
        You need warm water, soap and a lot of patience. Fill a tub with water. Call the dog in a
        friendly voice. Wet the fur and rub in the soap. Do not get any soap into its eyes. Rinse
        the fur until the water is clear. Step back quickly, because now the dog will shake itself.
    """,
    "how to polish boots": """
        You need a brush, a soft cloth and a tin of wax. Brush the dry mud off the boots. Wipe them
        with a wet cloth and let them dry. Put a little wax on the cloth. Rub it into the leather
        in small circles. Wait for a few minutes. Brush the boots until they shine.
    """,
    "how to draw a tree": """
        You need a pencil and a sheet of paper. Look at a real tree for a while. Draw the trunk
        with two long lines. Let it become thinner towards the top. Add the large branches first.
        Draw smaller branches at the end of the large ones. Put in the leaves with light, quick
        strokes.
    """,
    "how to make a candle": """
        You need beeswax, a piece of string and an old pot. Melt the wax slowly over warm water.
        Tie the string to a small stick. Dip the string into the wax and take it out again. Wait
        until the wax is hard. Dip it again and again until the candle is thick enough. Cut the
        bottom flat, so that the candle can stand.
    """,
    "how to find the way at night": """
        You need a clear sky and good eyes. Stand in a dark and open place. Look for the seven
        stars of the Plough. Follow the last two stars of the Plough upwards. There you will find
        the North Star. Turn your face to it, and you are looking north. The east is then on your
        right and the west is on your left.
    """,
    "how to keep a garden": """
        You need a spade, some seeds and time. Dig the earth in the early spring. Sow the seeds in
        straight rows. Pull out the weeds while they are small. Water the plants in the evening,
        when the sun is low. Leave some flowers for the bees. Pick the fruit when it is ripe and
        share it with your neighbours.
    """,
    "how to catch a fish": """
        You need a rod, a line, a hook and a worm. Find a quiet place beside the river. Put the
        worm on the hook. Throw the line far out into the water. Sit still and do not talk. Wait
        until the line moves. Pull it in slowly and let the small fish go.
    """,
    "how to make friends": """
        You do not need anything but an open heart. Say hello and smile. Ask the other person a
        question and listen to the answer. Share what you have. Keep your promises. Say sorry when
        you have made a mistake. Do not hurry, because a good friendship grows slowly.
    """,
}

LATER_STEPS = ("Then", "Next,", "After that,", "Now", "When that is done,")

# A slash parts the two lines of a couplet.
RHYMES = options("""
- The moon is [high|bright], the night is deep, / the little lambs have gone to sleep.
- The wind is singing in the tree, / and every wave runs to the sea.
- A small boat sails across the bay, / it left the harbour yesterday.
- The snow is falling, soft and white, / it falls and falls throughout the night.
- The baker lights the fire at four, / and warm new bread is at the door.
- The rain is drumming on the stone, / but I am warm and not alone.
- A robin sits upon the wall, / it sings for us and for us all.
- The leaves are red, the leaves are brown, / and one by one they tumble down.
- The river runs, the river bends, / it is the best of all my friends.
- I had a kite, I let it fly, / it wrote my name across the sky.
- The old grey cat, the young black hen / will never be good friends again.
- The stars are lamps above the hill, / the world is dark, the world is still.
- The bees are busy in the sun, / they hum a song till day is done.
- My grandma has a wooden chair, / she tells her stories sitting there.
- The road is long, the road is wide, / but you are walking at my side.
- The clock says tick, the clock says tock, / there is a mouse inside the clock.
- The fisherman comes home at last, / he ties his boat, he ties it fast.
- A candle burns, a candle glows, / and where it shines the darkness goes.
- The frogs are singing in the pond, / the owls reply from far beyond.
- O little house beside the lake, / I dream of you till I awake.
- The spring is green, the summer gold, / the autumn wise, the winter cold.
- The wheat is tall, the sky is blue, / and all of this I share with you.
- The mountain wears a hat of snow, / the cows are in the grass below.
- Good night, dear moon, good night, dear sea, / good night to you, good night to me.
- A traveller came down the lane, / he asked for shelter from the rain.
- The fox goes out, the geese stay in, / the moon has silver on its chin.
- I found a shell, I held it near, / the whole wide ocean I could hear.
- The lantern swings, the shadows dance, / two hedgehogs meet, perhaps by chance.
- The miller sleeps, the mill goes round, / the flour falls without a sound.
- The garden gate is open wide, / so come and sit with me inside.
""")
