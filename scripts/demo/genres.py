# SPDX-License-Identifier: Apache-2.0
"""Templates of the demo corpus' other genres: fables, places, letters, markets, facts and more."""

from jpaged.scripts.demo.tales import beats

FABLES = {
    "the {a} who was too proud": beats("""
- A {nature} {a} [lived|had a home] near {spot}. Every day {he} told the other animals how
  [fine|great] {he} was.
- One day a {a} met a {b} near {spot}. "Look at me," said the {a}. "Nobody is like me."
- The {a} was very proud, because {he} could {skill}.

- "[Can you do that|What can you do]?" {he} asked the {b}. "Not much," said the {b}, "but I can
  {skill2}."
- The {b} listened and said only, "Everyone can do something."
- "I am [better|more important] than any {b}," said the {a}. The {b} did not answer.

- Soon afterwards the water rose, and the {a} sat on a small rock and could not get away.
- A few days later the {a} fell into a [deep hole|pit] and could not get out.
- Then {season} came, and the {a} found nothing to eat.

- "Help me!" {he} cried, but nobody wanted to help someone so proud. Only the {b} came.
- The others laughed. But the {b} brought food and [a long branch|some friends].
- All {his} fine words were of no use. It was the {b} who heard {him} and came {quickly}.

- "Why do you help me?" asked the {a}. "Because I can," said the {b}.
- From then on the {a} talked less and listened more.
- The {a} was ashamed and thanked the {b}.

- {Moral} pride is loud, but kindness is strong.
- {Moral} nobody is so great that he never needs a friend.
- {Moral} the one you laugh at today may help you tomorrow.
"""),
    "the {a} and the {b} who ran a race": beats("""
- The {a} and the {b} wanted to know who was faster.
- "Let us run a race to {spot}," said the {a} to the {b}. The {b} agreed.
- One {season} morning a {a} laughed at a {b} because {he2} was so slow.

- All the animals came to watch. The {c} gave the sign, and they began.
- "You will see," said the {b}. The {c} was the judge and stood near {spot2}.

- The {a} was soon far ahead. "There is plenty of time," {he} thought, and {he} lay down under a
  {tree}.
- At first the {a} was in front. But on the way {he} stopped to [eat {food}|look at {himself} in
  the water].
- The {a} ran so fast that {he} took the wrong road.

- The {b} went on, step by step, and never stopped. [Nobody took any notice of {him2}.|]
- The {b} did not hurry and did not rest. {He2} only looked at the road.

- When the {a} [woke up|came back], the {b} was already sitting near {spot} and smiling.
- In the end the {b} won by the length of a nose, and the {c} laughed until {he3} cried.

- {Moral} slow and steady goes far.
- {Moral} it is not enough to be fast, one must also arrive.
- {Moral} a race is not over before the end.
"""),
    "the small {b} who helped a {a}": beats("""
- A {a} caught a small {b} near {spot}. "Please let me go," said the {b}. "One day I will help
  you."
- Once a {b} fell into a [deep hole|well], and a {a} pulled {him2} out. "I will not forget it,"
  said the {b}.
- One cold night a {b} asked a {a} for shelter, and the {a} moved aside and made room.

- The {a} laughed. "How could someone like you ever help me?" But {he} was [kind|in a good mood].
- "It was nothing," said the {a}, and {he} soon forgot about it.

- Some weeks later hunters came and threw a net over the {a}. {He} pulled and pulled, but {he} was
  caught.
- In {season} the {a} got a thorn in {his} foot and could not walk any more.
- Then one day a trap closed around the leg of the {a}.

- The {b} heard {him} and came {quickly}. "Now it is my turn," {he2} said.
- None of the great animals dared to come near. But the {b} was so small that nobody saw {him2}.

- {He2} worked all night, and in the morning the {a} was free.
- {He2} called {his2} brothers and sisters, and together they [freed|saved] the {a}.

- "I laughed at you," said the {a}, "and I was wrong."
- After that the {a} and the {b} were often seen together near {spot}.

- {Moral} nobody is too small to help.
- {Moral} a good deed is never lost.
- {Moral} we should never laugh at the promise of a friend.
"""),
    "the lazy {a}": beats("""
- All summer long the {b} worked and collected food. The {a} lay in the shade and sang.
- The {b} got up early every morning. The {a} got up at noon and yawned.
- A {a} and a {b} lived under the same {tree}. The {b} was busy, and the {a} was lazy.

- "Why do you work so hard?" asked the {a}. "The sun is shining, and there is enough for everyone."
- "Come and play," said the {a}. "Later," said the {b}. "First I have to get ready for the winter."

- Then the days became short, and the first snow fell. The {a} was hungry.
- But the summer ended, and one morning there was frost on the grass. The {a} began to shiver.

- {He} went to the {b} and knocked. "Please give me something to eat," {he} said.
- "What did you do all summer?" asked the {b}. "I sang," said the {a}, and {he} looked at the
  ground.

- The {b} shook {his2} head. Then {he2} opened the door. "Come in and sing for us," {he2} said.
- The {b} gave {him} half of everything. "But next year you will help me," {he2} said.

- The next summer the {a} was the first to get up, and {he} sang while {he} worked.
- And the {a} kept {his} word.

- {Moral} those who plan ahead sleep well.
- {Moral} there is a time for work and a time for play.
- {Moral} winter comes for everyone.
"""),
    "the greedy {a}": beats("""
- A {a} found a [huge cake|large piece of cheese|heavy basket of plums|whole pumpkin|big loaf of
  bread] near {spot}. It was enough for ten, but {he} wanted all of it.
- One day a {a} was walking over a bridge with a [huge cake|large piece of cheese|heavy basket of
  plums|whole pumpkin|big loaf of bread]. {He} looked down into the water.
- A greedy {a} came to a garden full of {good1} and {good2}.

- A {b} came by. "Will you give me a little?" {he2} asked. "No," said the {a}. "It is mine."
- {He} told no one about it. When a {b} asked where {he} was going, {he} said, "Nowhere."
- "Be careful," said a {b} who was sitting on a stone. "Too much is as bad as too little."

- The {a} ate and ate until {he} could not move. Then {he} heard the farmer coming.
- {He} tried to carry everything at once, and so {he} dropped it all into the river.
- {He} hid it in a hole. But when {he} came back, it had gone bad, and nobody could eat it.

- "If I had shared it," {he} thought, "I would have had enough and a friend as well."
- The {b} saw it and gave {him} a piece of {his2} own bread. The {a} ate it in silence.
- {He} went home hungry and tired, and {he} had a long time to think.

- {Moral} those who want everything often lose everything.
- {Moral} sharing makes a small meal large.
- {Moral} enough is as good as a feast.
"""),
    "the {a} who wanted to be a {b}": beats("""
- A {a} was not happy. "If only I were a {b}!" {he} said every day.
- A young {a} looked at a {b} and sighed. "You can {skill2}," {he} said. "I want to do that too."
- One {season} day a {a} decided to live like a {b}.

- {He} tried to eat what a {b} eats, but it made {him} ill. {He} tried to sleep where a {b} sleeps,
  but it was too [cold|wet|narrow|high].
- {He} walked like a {b} and talked like a {b}. The other animals did not know if they should laugh
  or cry.
- {He} practised for days, but {he} only fell on {his} nose.

- The {c} watched {him} for a while. "What are you doing?" asked the {c}.
- At last {he} asked the {c} for advice. "Tell me," said the {c}, "what does a {b} wish for?"
- The {b} came by and laughed. "How funny," {he2} said. "I have always wanted to be a {a}!"

- "Nobody but you can {skill}," said the {c}. "Have you forgotten that?"
- The {a} thought about it. It was true. {He} could {skill}, and who else could do that?

- So the {a} went home and was glad to be a {a}.
- From that day on {he} looked into the water every morning and said, "Good morning, {a}!"

- {Moral} it is best to be yourself.
- {Moral} we often forget our own gifts.
- {Moral} everyone is good at something.
"""),
}

PLACE = beats("""
- {Village} is a [small|quiet|old|friendly] [village|town] near {wild}. [About|Not more than]
  [two|three|four|five|six] hundred people live there.
- The village of {village} lies between {wild} and {spot}.
- If you follow the road past {spot}, you come to {village}, a [small|quiet|sleepy] [village|town].
- There is a place called {village} where the [houses|doors] are {colour} and the streets are
  narrow.
- Between {wild} and the old road there is a place named {village}.

- In the middle stands an old {tree}, and under it there is a bench where people [meet|talk|rest].
- The houses are built of [grey stone|dark wood|red brick], and there are {flower} in every window.
- From {spot} one can see {sight} and, on a clear day, {wild}.
- There is one shop, one school and one inn, and everybody knows everybody.
- The oldest house belongs to a {trade} named {hero}, who has been there for many years.

- In the morning one hears {sound}. In the evening the lamps are lit, and the air smells of
  {smell}.
- On {weekday} there is a market, where people buy {good1}, {good2} and {good3}.
- In {season} {nature}, and {people}.
- The children play near {spot}, and the old people sit in the sun and talk about [the weather|old
  times].
- Nothing much ever happens there, and that is what people like about it.

- Strangers are welcome. They are given {food} and a chair by the fire.
- An old story says that a {keepsake} lies buried near {wild}, but nobody has ever found it.
- Every year, when {nature}, there is a feast with music and dancing until late at night.
- A {trade2} once said that {saying}, and the words are carved over the door of the inn.
- Whoever has been to {village} wants to come back.
- A {bird} sings in the {tree}, and far away there is {sound}. It is a good place to live.
""")

LETTER = beats("""
- Dear {friend},
- Dear [Grandmother|Grandfather|Mother|Father],
- My dear {friend},
- Dear Aunt {friend},
- Dear Uncle {uncle},

- Thank you for your [letter|kind letter|present]. It [came|arrived] on {weekday}, and I was {joy}.
- How are you? I hope that you are well. We are all well here.
- It has been a long time since I wrote to you. Please forgive me.
- I am writing to you from {village}, where I have been for {number} days.
- I have some good news for you. We have a new {pet}, and its name is {petname}.

- It is {season} now, and {nature}. Here {people}.
- The weather is {mild}, and from my window I can see {sight}.
- Every morning I am woken by {sound}. I like it here very much.
- Here {nature}, and I think of you when I walk past {spot}.

- Last {weekday} we went to {spot}. We ate {food} and came home [late|wet|tired] and {joy}.
- {Hero} the {trade} asked about you. {He2} has made a {keepsake} for your birthday.
- I have learned to play the {music}. It does not sound very good yet, but the {pet} likes it.
- Yesterday I {past_chore} and {past_chore}, and in the evening we played cards.
- Do you remember the {keepsake} that I lost? It was {hiding}!
- I am reading a book about a journey to {wild}. I cannot stop, and my {relative} says that I will
  ruin my eyes.

- When will you come and visit us? There is a bed for you, and we will [bake a cake|cook your
  favourite soup|light a big fire].
- Please write soon and tell me everything. Is your {relative} well again?
- I am sending you {gift}. I hope that you like it.
- You always said that {saying}, and now I know that you were right.
- Give my love to your {relative}, and do not forget to [write|water the {flower}].

- With love from {writer}
- Your friend, {writer}
- Yours, {writer}
- Many warm greetings from your {writer}
""")

MARKET = beats("""
- On {weekday} {hero} went to the market in {village}. It was a {mild} {season} morning.
- It was market day in {village}, and {hero} had {number} coins in {his} pocket.
- Early on {weekday} {hero} took a basket and walked to the market.
- The market of {village} is held every {weekday}. {Hero} never missed it.

- {His} {relative} had given {him} a list. It said, "{Good1}, {good2} and {good3}."
- {He} wanted to buy {good1} and perhaps some {good2}.
- The square was full of people, and everywhere there were {good1}, {good2} and {good3}.
- There were tables with {good1}, carts with {good2}, and a {trade2} who sold {good3}.

- "[Fresh|Cheap] {good1}!" called one voice. "The best {good2} in the country!" called another.
- The air smelled of {smell}, and somewhere somebody was playing the {music}. {Interlude}
- A {pet} ran between the legs of the people with a sausage in its mouth, and everyone laughed.
- Near the fountain a man was juggling with {number} [oranges|eggs|apples|plates], and the children
  clapped.

- "How much are the {good1}?" asked {hero}. "{Number} coins," said the {trade2}. "That is too
  much," said {hero}. "I will give you three." In the end they agreed.
- "Try this," said a [woman|man] with a {colour} hat and gave {him} a piece of
  [cheese|cake|sausage|melon]. It was very good.
- {He} met {friend} in front of a table with {good2}. They talked about the weather and about [the
  harvest|a wedding|the new bridge|old friends].
- {Hero} counted {his} coins twice. Then {he} bought {good1} and a small bag of nuts.
- "Are these {good2} good?" asked {hero}. "They could not be better," said the {trade2}.

- At noon the basket was full, and {his} purse was empty. {Hero} sat down and ate {food}.
- On the way home {he} saw that there was something more in the basket. Somebody had put {gift}
  into it.
- {He} had forgotten the {good3}, but {he} had bought a {keepsake}. "What is that for?" asked {his}
  {relative}.
- {Hero} carried everything home and thought that {saying}.
- When the church clock struck {hour}, the tables were empty, and only a few leaves lay in the
  square.
""")

DIARY = beats("""
- {Weekday}, the {ordinal} of {month}.
- {Village}, the {ordinal} of {month}.
- Dear diary,

- It is {season}, and {nature}. I got up early and {past_chore}.
- Today was a {mild} day. I {past_chore}, and then I {past_chore}.
- I slept badly, because I could hear {sound} all night.
- Nothing special happened today, and yet I am {joy}.

- In the morning I met {friend} near {spot}. We talked about [the weather|school|the harvest|old
  times] and laughed a lot.
- {Friend} came and asked if I wanted to go to {wild}. We took [bread|apples|a blanket|two
  umbrellas] with us.
- At noon there was {food}. My {relative} told us about [the old days|a long journey|a {trade2} who
  had found a treasure].
- I saw a {animal} near {spot} today. It looked at me for a long time and was not afraid.
- I found a {keepsake} {hiding}. I wonder who lost it.

- In the afternoon the weather changed. {Weather}
- Later I sat under the {tree} and drew {sight}. {Interlude}
- I tried to play the {music}, but my fingers were cold.

- Now it is late, and I am tired. Tomorrow I want to [build a {made}|visit {friend}|sleep until
  noon].
- Before I go to bed I must write down one thing, and that is that {saying}.
- I can hear {sound} while I am writing this. Good night.
- I have only one candle left, and so I will stop here.
""")

MEETING = beats("""
- "Good [morning|evening|day], {friend_name}," said {hero}. "How are you?" "I am well, thank you,"
  [said|answered] {friend_name}. "I am on the way to {spot}."
- "Hello, {friend_name}!" called {hero}. "Where are you going?" "To {spot}," said {friend_name}.
  "Do you want to come with me?"
- "Excuse me," said {hero}, "is this the way to {spot}?" "Yes," said a [girl|boy] with {hair}. "I
  am going there too. My name is {friend_name}."
- "Have you heard the news?" asked {hero}. "What news?" asked {friend_name}. "There will be
  {contest} at {spot}."
- "What a {mild} day!" said {friend_name}. "Yes," answered {hero}, "and tomorrow will be the same."
- "Oh, it is you," said {friend_name} and smiled. "I was just thinking of you." "And I of you,"
  said {hero}.
- "Hello, {hero}," said {friend_name}. "I am looking for {good1}. Do you know where I can find
  some?" "Let us ask at {spot}," said {hero}.
- "Why are you so late?" asked {friend_name}. "I am sorry," said {hero}. "First I {past_chore}, and
  then I had to look for my {keepsake}."

- "Did you see the {animal} near {spot}?" asked {hero}. "Yes," said {friend_name}, "and it saw me
  too."
- "My {pet} has run away," said {hero}. "Will you help me to look for it?" "Of course," said
  {friend_name}.
- "I want to build a {made}," said {hero}, "but I do not know how." "Neither do I," said
  {friend_name}. "Let us ask the {trade2}."
- "I have [bread and cheese|some apples|ginger biscuits|a melon|two boiled eggs] in my bag," said
  {hero}. "Are you hungry?" {Friend_name} was always hungry.
- "What is that in your hand?" asked {hero}. "A {keepsake}," said {friend_name}. "I found it under
  the {tree}."

- They walked on together, past {spot} and past {spot2}. {Interlude}
- They sat down on a wall and looked at the {sight}. {Interlude}
- For a while they said nothing and listened to {sound}.

- "Do you think that {saying}?" asked {friend_name}. "I am sure of it," said {hero}.
- "It is getting late," said {hero}. "See you tomorrow!" "See you tomorrow," said {friend_name}.
- "This was a good day," said {friend_name}, and {hero} thought the same.
- Then they said goodbye, and each of them went home {joy}.
""")

ANIMAL_FACTS = beats("""
- {Plural} live [in many parts of the world|in many countries]. A {a} lives {place}.
- The {a} is a {nature} animal. It lives {place}.
- A {a} lives {place}.
- Have you ever seen a {a}? {Plural} are not hard to know.
- There are few animals as {nature} as the {a}.

- It has {body}. It eats {eats}.
- {Plural} eat {eats}.
- It lives on {eats}, and it has {body}.
- You can tell a {a} by its body, for it has {body}.

- A {a} can {skill}.
- One thing makes the {a} special. It can {skill}.
- What surprises many people is that a {a} can {skill}.

- A young {a} is called a {young}.
- Its young have a name of their own. A young {a} is called a {young}.
- What is a young {a} called? It is called a {young}.

- In old stories the {a} is often {nature}.
- People say that {plural} are {nature}, but an animal only does what it must do to live.
- If you want to watch {plural}, you must be quiet and patient.
-
""")

SEASON_FACTS = beats("""
- In {season} {nature1}, and {nature2}.
- {Season} is the time when {nature1}.
- The months of {season} are {month1}, {month2} and {month3}.
- {Season} begins in {month1}, when {nature1}.

- {Nature2}, and {people1}.
- {People1}. {Nature3}.
- At this time of the year {people1}, while {nature3}.
- Many people like {season} because {nature3}.

- The weather is often {mild} or {mild2}. {People2}.
- Some days are {mild}, and others are {mild2}.
- It is a good time for {food} and for a long walk.
- {People2}, and in the evening they eat {food}.

- After {season} comes {next_season}, and everything begins to change again.
- Then {next_season} comes, and {next_nature}.
- When {season} is over, people look forward to {next_season}.
-
""")

TRADE_FACTS = beats("""
- A {trade} {does}.
- What does a {trade} do? A {trade} {does}.
- Do you know what a {trade} does? A {trade} {does}.

- The most important tool of a {trade} is the {tool}.
- It is not easy work. A {trade} needs [strong|quick|careful] hands and a lot of patience.
- Many a {trade} gets up before the sun and works until it is dark.
- You can find one in a {workplace}.

- Without the {trade} we would have no {product}.
- "I like my work," says {hero}, who is a {trade}, "because people are glad about {product}."
- {Hero} is a {trade}. {He} has done this work for {number} years and still learns something every
  day.
- People say that a good {trade} never hurries, for {saying}.
""")

COUNTRY_FACTS = beats("""
- {Country} is a country in {continent}. The capital of {country} is {capital}.
- The capital of {country} is {capital}.
- {Capital} is the capital of {country}, a country in {continent}.
- {Country} lies in {continent}, and its capital is {capital}.
- What is the capital of {country}? The capital of {country} is {capital}.

- {Capital} is a large city with many [streets|parks|museums|shops] and [bridges|towers|old
  houses].
- A well-known river there is the {river}.
- The {river} flows through the country on its way to the sea.
- People from {country} are proud of their food, their music and their old stories.
- There are cities and villages, fields and hills, and people who like to tell stories.
-

- If you travel to {capital}, you can [walk through the old streets|visit a museum|sit in a park]
  and eat {food}.
- Travellers come from all over the world to see {capital}.
- A letter from {capital} takes a few days, but it is worth waiting for.
- In the evening the lights of {capital} can be seen from far away.
""")

INTRODUCTION = beats("""
- Hello! My name is {hero}, and I am [seven|eight|nine|ten|eleven|twelve] years old.
- My name is {hero}. I live in a {home}.
- I am {hero}, and I live in a {home} with my {relative} and a {pet} named {petname}.
- Good morning! I am called {hero}.

- I like {hobby} and {hobby2}, but I do not like {fear}.
- My best friend is called {friend_name}. We meet near {spot} every day.
- When I grow up, I want to be a {trade}, because a {trade} {does}.
- Our neighbour is a {trade}. A {trade} {does}.
- My favourite food is {food}, and my favourite animal is the {animal}.

- In {season} {nature}. I like that best of all.
- Every morning I hear {sound}, and then I know that I am at home.
- Our house stands near {spot}. From my window I can see {sight}.
- I have a {keepsake}. It is not worth much, but I would never give it away.

- Once I walked to {wild} all alone. I was {sorrow} at first, but in the end I was {joy}.
- My {relative} says that {saying}. I think that is true.
- What about you? Please tell me something about your life.
- That is all I can tell you about me. And who are you?
""")
