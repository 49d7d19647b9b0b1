# SPDX-License-Identifier: Apache-2.0
"""Templates of the demo corpus' tales: how they open, what happens, and how they end.

A text is a list of beats with a blank line between them, and a beat is a list of alternatives that
start with "- ". `scripts.demo.corpus.Writer` describes the notation inside an alternative.
"""

from jpaged.scripts.demo.words import options

Beat = tuple[str, ...]


def beats(text: str) -> tuple[Beat, ...]:
    """Parses a text of beats."""
    return tuple(options(block) for block in text.split("\n\n"))


# How the first episode of a tale begins, and how those after it do.
ONE_DAY = (
    "one day",
    "one [morning|afternoon|evening]",
    "one {mild} {season} [morning|day|evening]",
    "early one morning",
    "late one evening",
    "one {weekday}",
    "on a {mild} {season} day",
    "one {mild} [morning|day] in {month}",
    "on the {ordinal} of {month}",
)
LATER = (
    "a few days later",
    "the following week",
    "the next morning",
    "not long afterwards",
    "some weeks later",
    "one evening that same {season}",
    "about a month later",
    "on the following {weekday}",
    "when the leaves had changed their colour",
    "a year later",
)

CHILD_OPENING = beats("""
- Once upon a time there [was|lived] a [{kind}|little|young] {noun} [named|called] {hero}, who
  lived in a {home}.
- Once upon a time, in a {home}, there lived a [{kind}|little|young] {noun} [named|called|whose
  name was] {hero}.
- Once upon a time a {kind} {noun} named {hero} lived with {his} {relative} in a {home}.
- Once there was a {kind} {noun} called {hero}. {He} lived in a {home}, not far from {spot}.
- Long ago, in a {home}, there was a {noun} named {hero}. {He} was {kind} and {kind2}.
- Many years ago a {noun} called {hero} lived in a {home} near {spot}.
- In a {home} lived a {kind} {noun} [named|called] {hero}.
- There was once a {noun} named {hero} who was [known|loved] for being {kind}. {His} home was a
  {home}.
- {Hero} was a {kind} {noun} who lived in a {home}.
- {Hero} lived with {his} {relative} in a {home}. [Everybody|Everyone there] said that {he} was
  {kind}.
- {Hero} was [eight|nine|ten|eleven|twelve] years old and lived in a {home}.
- This is the story of {hero}, a {kind} {noun} from a {home}.
- The [little|young|{kind}] {noun} [lived|had always lived] in a {home}. {His} name was {hero}.
- {Heros} house stood near {spot}. It was small, and it was always full of
  [laughter|noise|books|flowers|light].
- My grandmother [used to tell|often told] me about a {noun} named {hero} who lived in a {home}.

- {He} had {hair}, and {he} always wore a {garment}.
- {He} was a {noun} with {hair}, and {he} asked a thousand questions.
- {He} loved {hobby}, and {he} knew every [path|corner|stone|tree] around {spot}.
- {His} favourite [place|spot] was {spot}, where {he} [could listen to|often listened to] {sound}.
- Every day after school {he} went to {spot} and watched the {sight}.
- {He} [liked|loved] {hobby} more than anything else in the world.
- {He} had a {pet} named {petname}, and the two of them were never apart.
- When {he} was not {hobby}, {he} helped {his} {relative} and {past_chore}.
- {His} {relative} [often said|liked to say] that {saying}.
- {He} was [a little|rather|very] {kind2}, but {he} was afraid of {fear}.
-
""")

GROWN_OPENING = beats("""
- Once upon a time there [was|lived] a [{kind}|{age}] {trade} [named|called] {hero} in a {home}.
- Once upon a time, in a {home}, a {age} {trade} named {hero} {worked}.
- Once upon a time a {kind} {trade} lived near {spot}. {His} name was {hero}.
- Once there was a {age} {trade} called {hero} who {worked}.
- Long ago a {trade} named {hero} {worked}. {He} lived in a {home}.
- In a {home} lived a {age} {trade} [named|called] {hero}.
- {Hero} was a {age} {trade} who lived in a {home}.
- {Hero} the {trade} lived in a {home} and {worked}.
- Everybody [around {spot}|for miles around] knew {hero}, the {kind} {trade}.
- The {age} {trade} lived in a {home}. {His} name was {hero}.
- For [ten|twenty|thirty|forty] years {hero} had been the only {trade} near {spot}.
- There was once a {trade} named {hero} who {worked} and asked for very little.
- This is the story of {hero}, a {age} {trade} who {worked}.

- {He} had {hair} and wore the same {garment} every day.
- {He} liked {his} work, and {he} liked {season} best of all.
- {He} spent the day {working}, and in the evening {he} sat near {spot} and listened to {sound}.
- People came from far away because of {his} {product}.
- {He} went [to work|out] every morning in a {garment}.
- {He} owned little more than {his} {tool} and a {pet} named {petname}.
- Nobody in the [village|town|whole country] was better at {working}.
- {He} was a {kind2} {noun}, and {he} always had time for [a joke|children|a good story|a kind
  word].
- {He} lived alone, but {he} was never lonely, for {he} had a {pet} named {petname}.
- "[My dear {tool}|My good old {tool}]," {he} liked to say, "we two have seen [many winters|a
  lot]."
- {He} [often said|liked to say] that {saying}.
-
""")

FIRST_PERSON_OPENING = beats("""
- When I was [seven|eight|nine|ten|eleven|twelve] years old, I lived in a {home}.
- I grew up in a {home}, not far from {spot}.
- I still remember the {season} when it happened. I was [young|still a child] and lived in a
  {home}.
- My name is {name}, and I want to tell you what happened to me near {spot}.
- This happened to me many years ago, when I lived with my {relative} in a {home}.
- Let me tell you a story. At that time I lived in a {home}.
- Nobody believes me, but it is true. I was a {noun} of [ten|eleven|twelve], and our house stood
  near {spot}.

- I loved {hobby}, and I knew every [path|corner|stone|tree] around {spot}.
- My {relative} [often said|liked to say] that {saying}.
- I had a {pet} named {petname}, and the two of us were never apart.
- Every day after school I went to {spot} and watched the {sight}.
- I had {hair} in those days, and I always wore a {garment}.
- I was a {kind} child, but I was afraid of {fear}.
-
""")

UNNAMED_OPENING = beats("""
- {Hero} lived in a {home} and {worked}.
- {Hero} lived alone in a {home}.
- {Hero} had {worked} for [twenty|thirty|forty|fifty] years.
- {Hero} woke before the sun, as {he} did every day.
- {Hero} sat near {spot} and looked at the {sight}.
- {Hero} was known in every house for {his} {product}.
- Once upon a time there was a {bare_hero} who lived in a {home}.
- Once upon a time a {bare_hero} {worked} and lived in a {home}.
- There was once a {bare_hero} who {worked}.
- Long ago, in a {home}, there lived a {bare_hero}.
- In a {home} lived a {bare_hero} who {worked}.
- Near {spot}, in a {home}, lived a {bare_hero}.
- A {bare_hero} lived near {spot}. Nobody knew how old {he} was.

- {He} was {kind} and {kind2}, and {he} loved {his} work.
- {He} had {hair} and wore a {garment}, in the summer as well as in the winter.
- {He} liked {his} work, and {he} liked {season} best of all.
- All day long {he} could be seen {working}.
- {His} hands were [rough|strong|never still], but {his} eyes were [kind|bright|full of light].
- {He} did not talk much. {He} liked {sound} better than words.
- {He} had no family, only a {pet} named {petname} and {his} {tool}.
- The children loved {him} because {he} told them stories about {wild}.
- {He} [often said|liked to say] that {saying}.
- In the evening {he} ate {food} and looked at the {sight}.
-
""")

EPISODES = {
    "a lost {keepsake}": beats("""
- {One_day} {hero} [noticed|saw|found out] that {his} {keepsake} was gone.
- {One_day}, on the way to {spot}, {hero} lost {his} {keepsake}. {He} did not notice it until the
  evening.
- {Hero} owned a {keepsake}, and {he} never went anywhere without it. But {one_day} it was not in
  its place.
- "Where is my {keepsake}?" {hero} cried {one_day}. Nobody had seen it.
- {One_day} {hero} reached into {his} pocket and found nothing there. The {keepsake} was gone.

- It had been a present from {his} [father|mother|grandfather|best friend], and {he} was {sorrow}.
- {He} felt {sorrow}, because there was no other {keepsake} like it.
- {He} looked {hiding} and {hiding}, but [it was not there|{he} found only [dust|a button|an old
  coin]].
- First {he} looked {hiding}. Then {he} looked {hiding}. There was no {keepsake} anywhere.
- {He} searched [the whole house|every room|the {room} and the {room}] until it was dark.

- {He} asked {friend} for help. "[Think|Tell me]," said {friend}, "where did you see it last?"
- "[Do not worry|Do not give up]," said {friend}. "We will look for it together."
- On the road {he} met {friend}. "[What is wrong|Why do you look so {sorrow}]?" asked {friend}.
  {Hero} told {him2} about the {keepsake}.
- {Friend} heard about it and came [at once|to help]. "Four eyes see more than two," {he2} said.

- They went back to {spot} and looked at every stone. {Interlude}
- They walked the whole way again, [step by step|very slowly], from {spot} to {spot2}.
- Together they searched near {spot}, and they asked everyone they met. Nobody had seen a
  {keepsake}.
- {Hero} closed {his} eyes and tried to remember. "I was near {spot2}," {he} said at last.

- {Suddenly} something [shone|glittered|moved] in the light. There, {hiding}, lay the {keepsake}!
- {Suddenly} {friend} [laughed|pointed]. The {keepsake} was {hiding}, and it had been there all the
  time.
- Then a {bird} flew up, and {hero} saw the {keepsake} {hiding}.
- In the end it was {friend} who found it. It lay {hiding}.
- At last they found it {hiding}. "[How did it get there|Who put it there]?" asked {hero}, but
  nobody knew.

- {Hero} was {joy}. "Thank you," {he} said. "[Without you|Alone] I would never have found it."
- {Hero} held the {keepsake} in both hands and was {joy}.
- To say thank you, {hero} gave {friend} {gift}, and they shared {food}.
- From then on {hero} kept the {keepsake} [in a safe place|close to {his} heart|on a string].
"""),
    "a storm": beats("""
- {One_day} the sky turned [black|dark|a strange yellow]. {Hero} was near {spot} when the wind
  began to blow.
- {One_day} a great storm came up over {wild}. {Hero} heard the [first thunder|wind] and looked up.
- {One_day}, while {hero} was walking to {spot2}, the clouds grew dark and heavy.
- "[A storm is coming|The weather is changing]," said {hero} {one_day}, and {he} was right.

- Rain [fell like a wall|beat on the roofs], and the wind [tore at|shook] every door. {Hero} was
  {sorrow}.
- Lightning lit up {spot}. Then the thunder rolled, and the ground seemed to shake.
- Soon {he} could not see [ten steps ahead|the road any more]. The wind was louder than {sound}.
- People ran [home|for shelter] and closed their shutters. Only {hero} stayed outside.

- Then {he} heard a voice. It was {friend}, who was [trapped|alone|lost] near {wild}.
- {Suddenly} {he} thought of {friend}, who had gone to {wild} in the morning.
- Someone was calling for help near {wild}. {Hero} knew the voice. It was {friend}.

- {He} [took|found] a lantern and a [long|strong] rope and went out {quickly}. "[Hold on|Stay where
  you are]!" {he} shouted.
- {He} was afraid, but {he} went {quickly}. Step by step {he} fought against the wind.
- "[I am coming|Do not be afraid]!" {hero} called. {He} tied a rope around the {tree} and climbed
  down.
- {He} did not think of the danger. With {his} [coat|scarf] over {his} head {he} ran to {wild}.

- {He} took {friend} by the hand, and together they [reached|found] a dry place and waited there.
- {Friend} was wet and cold, but {he2} was not hurt. Arm in arm they walked back to {spot}.
- At last {he} saw {him2} under a {tree}. "You came!" said {friend}, and {he2} began to laugh and
  cry.

- By morning the storm was over. The sky was {sky}, and {spot} [looked clean and new|lay in the
  sun].
- When the sun came up, the wind was gone, and {friend} was {joy}.
- That night they sat by the fire and ate {food}, while the rain became [softer|weaker] and
  stopped.

- "[I will never forget this|You saved my life]," said {friend}. {Hero} only [smiled|shook {his}
  head].
- People talked about that night for years, but {hero} said that anyone would have done the same.
- {Friend} gave {him} {gift}. "It is not much," {he2} said, "but it comes from the heart."
- After that night the two were friends for life.
"""),
    "a hurt {patient}": beats("""
- {One_day} {hero} found a young {patient} near {spot}. Its {part} was hurt.
- {One_day}, close to {wild}, {hero} heard a small sound. It was a {patient} with a broken {part}.
- {One_day} a {patient} lay in the grass near {spot}. It could not move its {part}.
- {Hero} was on the way home {one_day} when {he} saw a little {patient}. It was trembling and could
  not use its {part}.

- "[Poor little thing|Do not be afraid]," said {hero}. "[I will help you|Nobody will hurt you
  here]."
- {He} wrapped it in {his} [scarf|coat|old blanket] and carried it home {gently}.
- {He} knelt down {gently} and held out {his} hand. The {patient} looked at {him} with [dark|round]
  eyes.
- {He} knew that it would not live through the night alone, and so {he} took it home.

- {Friend} knew a lot about animals. "It needs [rest|warmth] and water," {he2} said.
- {He} asked {friend} what to do. {Friend} [cleaned|bound] the {part} and showed {him} how to feed
  it.
- {He} made a bed of [straw|hay|soft wool] in a box and put it beside the stove.
- At home {he} gave it water and [bread|seeds|a little milk]. It ate and fell asleep.

- Every [morning|evening] {hero} sat beside the box and talked to it. {Interlude}
- For [two|three|four] weeks {he} looked after it. Each day the {patient} grew a little stronger.
- At first it would not eat. But on the third day it took some food out of {his} hand.
- {He} called it [Friend|Moss|Feather|Sunday], and soon it came when it heard its name.

- One day the {part} was healed, and {hero} carried the {patient} back to {wild}.
- One fine day {hero} knew that it was time to let it go.
- At last the {patient} was well again. {Hero} opened the door, and it stood still and looked back.
- "You are free now," said {hero}, and {he} was happy and sad at the same time.

- The {patient} looked at {him} once more. Then it was gone.
- It [disappeared|vanished] between the [trees|bushes|stones], and {hero} waved for a long time.
- {Hero} thought that {he} would never see it again.

- But every year it came back to {spot}, and sometimes it brought its young.
- Weeks later {hero} lost {his} way near {wild}. A {patient} appeared and led {him} home.
- Some evenings {hero} heard it near the house, and then {he} was {joy}.
- The next morning there was a {keepsake} on the doorstep. {Hero} always believed that the
  {patient} had brought it.
"""),
    "a {made} that would not work": beats("""
- {One_day} {hero} decided to build a {made}.
- {One_day} {hero} saw a {made} at {spot} and wanted to make one too.
- "I am going to build a {made}," said {hero} {one_day}. {Friend} [only laughed|did not believe
  it].
- {Hero} had dreamed of {his} own {made} for years, and {one_day} {he} began to build it.

- {He} collected wood, nails and string and worked all day in the {room}.
- {He} drew a plan, measured everything twice and [cut|sawed] the wood {gently}.
- {He} found some old boards {hiding} and carried them to the {room}.
- It was harder than {he} had thought. {His} fingers hurt, and the glue would not hold.

- The first {made} fell apart [at once|after a minute|with a loud crack], and {hero} was {sorrow}.
- But when {he} tried it, the {made} broke in two. {He} threw the hammer into a corner.
- In the evening the {made} was finished. It looked fine, but it did not work at all.
- The wind came and knocked it over. All that work was for nothing!

- "[Let me see|Show me]," said {friend}. {He2} looked at it for a long time. "[This side is too
  heavy|This part is too weak]," {he2} said.
- Then {elder} came by. "Do you know how many I broke when I was young?" {he3} asked. "{Number}!"
- {Friend} came to help. "{Saying}," {he2} said. "Let us begin again."
- {Hero} wanted to give up. But {elder} said, "{Saying}."

- So {hero} started again. This time {he} worked {gently} and [made every part stronger|did not
  hurry].
- {He} took everything apart and began from the beginning. {Interlude}
- Together they found better wood and [tied it with a strong rope|used longer nails].
- Day after day {he} tried something new, and day after day {he} learned something.

- At last the {made} was ready, and this time it [held|worked]!
- When the last nail was in its place, nobody said a word. Then {friend} began to clap.
- The new {made} was [stronger|better] than anything in the [village|shops]. {Hero} painted it
  {colour}.

- {Hero} was {joy}, and {he} let everyone try it.
- "You see," said {friend}, "{saying}."
- People came from {spot} to look at the {made}, and they asked {him} to build another one.
- {Hero} kept one piece of the first {made} on the wall, so that {he} would never forget how it
  began.
"""),
    "someone who was afraid of {fear}": beats("""
- There was only one thing that {hero} was afraid of, and that was {fear}.
- {Hero} had always been afraid of {fear}. Nobody knew about it except {friend}.
- Everybody thought that {hero} was brave. But in truth {he} was afraid of {fear}.

- {One_day} {friend} did not come home from {wild}. Somebody had to go and look for {him2}.
- {One_day} {his} {pet} {petname} ran away to {wild}, and it was getting late.
- {One_day} {he} had to bring [medicine|a letter|an important message] to {wild}, and there was no
  other way.

- {Hero} stood at the door with a beating heart. {His} knees were [weak|shaking].
- "I cannot do it," {he} said. But {he} knew that nobody else could do it.
- "[Are you afraid|Is something wrong]?" asked {elder}. "So am I, sometimes," {he3} said. "Take my
  {keepsake} with you."
- {He} counted to {number} and took a deep breath. {Interlude}

- {He} took one step, then another. {He} sang a little song, and the fear grew smaller.
- {He} thought of [what {he} loved|home|summer] and went on. It was not as bad as {he} had
  imagined.
- With every step {his} heart became lighter. Even {sound} sounded like [music|a friend].
- Twice {he} wanted to turn back, and twice {he} went on.

- In the end everything was [well|all right]. {Hero} had done it, and {he} was {joy}.
- When {he} came back to {spot}, all the people were waiting with lanterns.
- Before {he} knew it, the hardest part was over. {He} looked back and had to laugh.

- After that day {hero} was not afraid of {fear} any more, or only a very little.
- "Being brave does not mean that you are not afraid," said {elder}. "It means that you go on."
- {Hero} was still a little afraid of {fear}. But now {he} knew that {saying}.
"""),
    "a strange door near {wild}": beats("""
- {One_day} {hero} found a {colour} door [in the side of a hill|behind a curtain of ivy] near
  {wild}.
- {One_day} {hero} discovered a small door behind the {tree}. {He} had never seen it before.
- {One_day}, near {wild}, {hero} [fell over|stepped on] something hard. It was the handle of an old
  door.

- It was locked, but {hiding} {he} found a [rusty|small|silver] key.
- There was no handle and no bell, only a sign. It said, "[Knock three times|Only for friends|Be
  kind]."
- {He} put {his} ear against the wood and heard [soft|strange|faint] [music|voices|laughter] on the
  other side.
- {Hero} ran to get {friend}. Together they pushed until it opened.

- Behind the door a stair led down into the dark. {Interlude}
- The door opened without a sound. Behind it was a [garden|room|long hall] that nobody had seen for
  years.
- Inside it was [warm|cool] and smelled of {smell}. A candle was burning on a table.

- In the middle of the room stood a chest full of [letters|maps|toys|old books|seeds].
- There [sat|was] an old woman who was [knitting a scarf|reading a letter|drinking tea]. "I have
  been waiting for you," she said.
- On the wall hung a picture. It showed {spot} as it had been a hundred years ago.
- On the table lay a {keepsake} and a note that said, "[For the one who comes|Take me with you]."

- "[Take what you need|You may ask one question]," said a friendly voice, "but leave something
  behind."
- {Hero} took only the {keepsake}, and in its place {he} left {gift}.
- {Hero} sat down and read until the candle was [short|almost gone].
- {He} wanted to stay for ever, but then {he} heard {sound} and thought of home.

- When {he} came back the next day, there was no door, only [stone|ivy|grass].
- {He} told {friend} about it, but the door was never seen again.
- {Hero} locked the door and kept the secret. But the {keepsake} stood on {his} shelf for ever.
- Ever afterwards {hero} believed that {saying}.
"""),
    "a stranger at the door": beats("""
- {One_day} somebody knocked at {heros} door. It was [an old man|a tired woman|a traveller] with a
  heavy bag.
- {One_day} a stranger came to {spot}. [He|She] had [no shoes|a torn coat] and asked for a place to
  sleep.
- {One_day}, [after dark|in heavy rain], a poor traveller came along the road.

- Other people had [closed their doors|turned away]. But {hero} said, "Come in and sit by the
  fire."
- {Hero} did not have much, but {he} put {food} on the table.
- "[Come in|Sit down]," said {hero}. "There is not much in the house, but we will share it."
- "You must be hungry," said {hero}, and {he} brought {food}.

- The stranger ate {gently} and looked around the room. "You have a good heart," said the stranger.
- After the meal the stranger told stories about [distant countries|kings and ships|the stars]
  until midnight.
- The stranger took out a {music} and played. {Interlude}
- They talked until late, and {hero} learned that the stranger had once been a {trade2}.

- In the morning the bed was empty. On the table lay a {keepsake}.
- At sunrise the stranger said goodbye and gave {him} a {keepsake}. "It will help you one day."
- "I cannot pay you," said the stranger, "but take these seeds. Plant them near {spot}."

- {Hero} did not think much about it. But from that day on there was always enough in the house.
- In the next year {hero} was in trouble, and the stranger came back with [help|{number} friends].
- Soon the most beautiful {flower} were growing near the house, even in the winter.
- {Hero} later heard that the stranger was a famous {trade2} who tested the hearts of people.

- "[How strange|Who would have thought]," said {friend}, "that one kind evening could do so much."
- {Hero} never locked {his} door again.
- And {he} knew for the rest of {his} life that {saying}.
"""),
    "{contest}": beats("""
- Every year there was {contest} at {spot}. {Hero} had never taken part in it.
- {One_day} a sign hung at {spot}. It said that {contest} would be held on {weekday}.
- "Will you come to {contest}?" {friend} asked {one_day}. {Hero} thought about it all night.
- All through {season} {hero} had been getting ready for {contest}.

- {He} practised every day, [early and late|before breakfast and after supper].
- {He} was {sorrow}, because the others were [older|faster|louder] and sure that they would win.
- "You have no chance," said [a tall boy|a proud man] named {rival}. {Hero} said nothing and
  practised.
- {Elder} gave {him} some advice. "{Saying}," {he3} said.

- On the great day there were flags and music, and the air smelled of {smell}.
- [Hundreds|Dozens] of people came to {spot}. {Hero} could hear {his} own heart.
- When {his} turn came, it became very quiet. {Interlude}

- At the beginning everything went wrong. But {hero} did not stop.
- Halfway through, {rival} fell and hurt his knee. {Hero} turned around and helped him up.
- {He} thought only of the next step, and then of the step after that.
- {Rival} was far ahead. But he laughed too early and made a mistake.

- In the end {hero} did not win, but the people clapped for {him} the longest.
- {Hero} came in [first|second|third], and nobody was more surprised than {he} was.
- When the judges called {heros} name, {friend} threw {his2} hat into the air.

- The prize was a {keepsake}. {Hero} gave it to {friend}, who had believed in {him}.
- "Next year I will try again," said {hero}, and {he} was {joy}.
- {Rival} shook {his} hand. "You are better than I thought," he said. "And I am sorry."
- That evening they all ate {food} together and sang until the stars came out.
"""),
    "a quarrel between friends": beats("""
- {Hero} and {friend} did everything together. But {one_day} they had a quarrel about a {keepsake}.
- {One_day} {hero} and {friend} [quarrelled|had an argument] near {spot}. It was about almost
  nothing.
- {One_day} {hero} broke the {keepsake} of {friend} and did not dare to say so.

- "It is mine!" cried {friend}. "No, it is mine!" shouted {hero}. Neither of them would give in.
- "You never listen to me," said {friend}. {Hero} turned around and walked away {quickly}.
- Hard words were said, and each of them went home alone.

- For a whole week they did not speak. {Hero} went to {spot} alone, and it was [boring|very quiet]
  there.
- The days were long. Even {food} did not taste good any more.
- {Hero} was {sorrow}, but {he} was too proud to say it. {Interlude}
- When they met at {spot}, they looked the other way.

- "[Something is missing|You look {sorrow}]," said {elder}. "Do you want to be right, or do you
  want to have a friend?"
- One night {hero} could not sleep. "What is a {keepsake} without a friend?" {he} thought.
- {Elder} told {him} that {saying}. {Hero} thought about it for a long time.

- The next morning {hero} went to {friend}. "I am sorry," {he} said. "I was wrong."
- So {he} wrote a note and put it under the door of {friend}. It said, "[I miss you|Please forgive
  me]."
- {Hero} took {gift} and went to {spot}. On the way {he} met {friend}, who was carrying {gift}.

- "I am sorry too," said {friend}, and they both began to laugh.
- {Friend} opened the door before {he} could knock. "I wanted to come to you," {he2} said.
- They looked at each other and did not know what to say. Then {friend} smiled.

- They repaired the {keepsake} together, and now it belonged to both of them.
- From that day on they shared everything, and they were {joy}.
- They still quarrelled sometimes, but never for longer than an hour.
"""),
    "a clock that stood still": beats("""
- {One_day} the big clock [near|opposite] {spot} stopped. Nobody knew [what time it was|what to
  do].
- For {number} years the old clock near {spot} had been silent. {One_day} {hero} looked up at it.
- {One_day} there was no sound from the clock tower. {Hero} was the first to notice it.

- The shops opened too late, and the children came to school in the middle of the night.
- People asked a famous clockmaker, but he only shook his head. "It is too old," he said.
- "Without the clock the day has no [beginning|middle]," said {friend}.

- {Hero} climbed up the [ninety|hundred|two hundred] steps of the tower with a lantern. {Interlude}
- {Hero} was {kind} and wanted to know how the clock worked, and so {he} went up to it.
- "May I try?" asked {hero}. The people laughed, but they gave {him} the key.

- {He} looked at all the wheels, one after another, until {he} found a {keepsake} between two of
  them.
- Behind the largest wheel a {bird} had built its nest. There were {number} eggs in it.
- There was dust everywhere. {He} cleaned every wheel {gently} and put a drop of oil on it.

- "So that is the reason!" {he} [said|laughed]. {He} waited until everything was ready and pushed
  the wheel.
- {He} worked all night by the light of the lantern, while {friend} held the tools.
- Very {gently} {he} moved it away. Then {he} pushed the [great|longest] hand and held {his}
  breath.

- There was a tick, and then another. The clock began to strike, and the people came out of their
  houses.
- At {hour} o'clock the bell rang over the roofs. Everyone was {joy}.
- Slowly the hands began to move, and the old clock sang again.

- After that {hero} wound the clock every {weekday}.
- The people gave {him} {gift}, but the sound of the bell was the best reward.
- "How did you do it?" they asked. "I only looked," said {hero}.
"""),
    "a birthday surprise": beats("""
- It was almost the birthday of {elder}, but {hero} had no money for a present.
- {One_day} {hero} [remembered|learned] that {elder} had a birthday on {weekday}.
- "What would make you happy on your birthday?" {hero} asked {elder} {one_day}. {He3} only smiled.

- {He} had {number} coins, and that was not enough for a {keepsake}.
- {He} went to all the shops, but everything was too dear.
- "A present does not have to cost anything," said {friend}.

- So {hero} asked all the neighbours. One gave flour, one gave eggs, and one gave {goods}.
- Then {he} had an idea. {He} would collect [stories|flowers|songs] from everyone who loved
  {elder}.
- {Hero} and {friend} worked in secret. They painted, sewed and baked, and they told nobody.
- {He} earned a little money because {he} {past_chore} for a neighbour.

- On the morning of the birthday they hung lanterns in the {tree}. {Interlude}
- When {elder} came home, the {room} was dark. Then {number} candles were lit at the same time.
- {Hero} covered the table with {flower} and waited behind the door.

- "Surprise!" they all called. {Elder} had to sit down.
- {Elder} did not say anything at first, and there were tears in {his3} eyes.
- "Is all this for me?" asked {elder}. "Yes," said {hero}, "all of it."

- They ate {food} and danced to the music of a {music}.
- "It is the best birthday of my life," said {elder}, and {hero} was {joy}.
- It was a small feast, but nobody ever forgot it.
"""),
    "a journey to {wild}": beats("""
- {Hero} had always wanted to see {wild}. {One_day} {he} packed {his} bag.
- "What is behind {wild}?" {hero} asked {one_day}. Nobody could tell {him}, and so {he} went to
  find out.
- {One_day} a letter came for {him}. "Come to {wild}," it said, "and bring a {keepsake}."

- {He} took bread, a blanket and {his} {keepsake} and [left|set off] before sunrise.
- {Friend} wanted to come too. "Two are better than one," {he2} said, and so they went together.
- {His} neighbours shook their heads. "It is too far," they said. But {hero} [went on|only
  smiled|had made up {his} mind].

- On the first day {he} [crossed a river|walked through tall grass], and everything was easy.
  {Interlude}
- The road was long and full of stones. At night {he} slept under a {tree}.
- On the second day {he} met a {trade2}, who gave {him} {food} and showed {him} the way.
- Near a bridge {he} met an old woman who was carrying wood. {Hero} carried it for her.

- Then the path [ended|disappeared], and fog covered everything. {Hero} was {sorrow}.
- On the third day it rained, and {he} had nothing left to eat.
- There were two roads, one to the left and one to the right, and {he} did not know which one to
  take.

- But {he} remembered that {saying}, and {he} went on.
- A {bird} flew from stone to stone as if it wanted to show {him} the way, and {he} followed it.
- {He} sat down and waited until {he} heard {sound}. Then {he} knew where to go.

- At last {he} stood there, and the whole world lay below {him} in the evening light.
- When {he} arrived, {he} found neither gold nor magic, but the most beautiful [view|silence] in
  the world.
- And there it was. It was [smaller|larger|more beautiful] than {he} had thought.

- {He} stayed for {number} days. Then {he} went home and told everybody about it.
- "And what did you bring home?" asked {elder}. "A story," said {hero}.
- When {he} came home, everything looked the same, but {he} had changed.
- {He} brought back a {colour} stone, and whenever {he} held it, {he} was {joy}.
"""),
    "a garden behind the house": beats("""
- Behind {heros} house there was a piece of land where nothing grew.
- {One_day} {hero} bought a handful of seeds from a {trade2}. "What are they?" {he} asked. "You
  will see."
- {Hero} wanted to have a garden, but the ground near {spot} was hard and full of stones.

- "Nothing will ever grow there," said {friend}. {Hero} took a spade and began to dig.
- {He} carried away the stones, {number} baskets of them, and {he} dug until {his} back hurt.
- Every evening {he} carried water from {spot}. {Interlude}

- For weeks nothing happened. {Hero} was {sorrow}, but {he} did not stop.
- Then the snails came and ate the first green leaves. {He} had to start again.
- It did not rain for a month, and the ground became as hard as stone.
- {Friend} laughed at first. Then {he2} brought a watering can and helped.

- One morning there was something green, no larger than a fingernail.
- After a warm night of rain the first leaves came out of the ground.
- "Come and look!" called {hero} one morning. There were {number} tiny plants in a row.

- By the end of the summer there were {flower}, beans and pumpkins, and bees came from everywhere.
- The plants grew and grew until they reached the roof. They were full of {colour} flowers.
- In the autumn {he} filled {number} baskets and gave most of them away.

- "How did you do it?" asked {friend}. "With water and time," said {hero}.
- Everybody who passed by stopped for a while, and {hero} gave them some {flower}.
- {Hero} sat on the bench, ate {food} and was {joy}.
"""),
    "a light in the night": beats("""
- {One_day} {hero} saw a small light near {wild}. Nobody lived there.
- Every night at {hour} o'clock a light shone near {wild}. {One_day} {hero} decided to find out
  why.
- {One_day} {hero} could not sleep. {He} went to the window and saw a light that moved.

- "It is a ghost," said {friend}. "It is only the moon," said {elder}. {Hero} did not believe
  either of them.
- {He} put on {his} coat and went out {gently}. The night was clear and full of stars.
- {He} woke {friend}, and they followed the light together. They did not make a sound.

- The light moved on, and {hero} went after it, past {spot} and past {spot2}. {Interlude}
- Grass brushed against {his} legs. Once {he} heard {sound} and stood still.
- {His} heart beat loudly, but {he} wanted to know the truth.

- Then {he} saw that it was a lantern. A [little girl|small boy] was holding it and looking for a
  {pet}.
- It was {elder}, who was counting the stars and writing the number in a book.
- There [sat|stood] a {trade2} who had lost the road. "I have waited for help for hours."
- It was only [a hundred fireflies|a piece of glass] in the moonlight, but it was beautiful.

- {Hero} was so surprised that {he} had to laugh. "So that is the ghost!" {he} said.
- They sat down, drank hot tea and watched the sky until it was {sky}.
- "You are not alone any more," said {hero}, and {he} stayed until everything was all right.

- In the morning {he} told the story, but only {friend} believed {him}.
- After that {hero} often went there at night, and {he} was {joy} each time.
- And whenever {hero} saw a light in the dark, {he} remembered that {saying}.
"""),
    "a {pet} named {petname}": beats("""
- {Hero} had a {pet} named {petname}. It was [black|white|grey|brown|spotted] and very {kind2}.
- {One_day} a [black|white|grey|brown|spotted] {pet} sat in front of the door. {Hero} named it
  {petname}.
- Nobody wanted the {pet} {petname}, because it was too old. But {hero} took it home {one_day}.

- {Petname} slept [beside the stove|in a basket|at {his} feet] and followed {him} to {spot} every
  day.
- "You cannot keep it," said {his} neighbour. "It will eat all your food." But {hero} only laughed.
- It stole the fish and hid {his} shoes, but {hero} could not be angry with it.

- {Once} {petname} did not come home. {Hero} called its name until {he} had no voice left.
- {Once} {hero} was asleep when {petname} pulled at {his} blanket. The {room} was full of smoke!
- {Once} {petname} ran to {wild} and did not come back when {hero} called.

- {He} ran outside {quickly}. {Interlude}
- {He} took {his} coat and called {friend}, and they did not lose a moment.
- "{Petname}!" {he} called. "{Petname}!" There was no answer but {sound}.

- In the end everything turned out well. {Petname} was sitting {hiding}, as calm as a king.
- It was {friend} who heard something {hiding}. There was {petname} with {number} little ones!
- {Petname} led them to a child who had lost its way, and they brought it home.

- "You are the best {pet} in the world," said {hero}, and {petname} ate [a whole sausage|the
  largest piece of fish|from a silver plate] that evening.
- {Hero} took {petname} in {his} arms and was {joy}.
- Since that day nobody has ever said a bad word about {petname}.
- "[A good friend|Such a friend] may eat as much as it likes," said {hero}.
"""),
    "the {music} nobody could play": beats("""
- {One_day} {hero} found an old {music} {hiding}. Nobody in the family could play it.
- {One_day} {hero} heard someone play the {music} at {spot}, and {he} could not forget the sound.
- In the {room} of {elder} there was an old {music}. {One_day} {hero} asked for it.

- {He} tried it, and it sounded like [a sick cat|a rusty gate]. {His} neighbours closed their
  windows.
- "I will teach you," said {friend}, "but you must practise every day."
- At first {his} fingers were slow and the notes were wrong. {Interlude}

- {He} went to {spot}, where nobody could hear {him}, and played for the {sight}.
- All through {season} {he} practised, a little better every day.
- Some days {he} was {sorrow} and wanted to stop. Then {he} remembered that {saying}.

- Then came the day of the feast, and the [famous fiddler|band] did not arrive. "Who will play for
  us?" the people asked.
- {Once} {elder} was ill and could not sleep. {Hero} sat beside the bed and began to play.
- {Once} the people stood at {spot} and were sad, because the harvest had been bad.

- {Hero} stood up and played {gently}. It became so quiet that one could hear {sound}.
- {He} closed {his} eyes and played a song about home. Somebody began to sing.
- {His} hands were shaking, but the first note was clear, and so were all the others.

- When {he} had finished, nobody moved. Then they all clapped and called for more.
- "Where did you learn that?" they asked. {Hero} was {joy} and played until midnight.
- After that there was music near {spot} every {weekday}.
"""),
    "a map in an old book": beats("""
- {One_day} a piece of paper fell out of an old book. It was a map of {wild}, and {hero} was the
  first to see it.
- {One_day} {hero} bought a second-hand book near {spot}. Between two pages there was a map.
- "Look at this," {friend} said to {him} {one_day}. It was a map with a {colour} cross on it.

- The paper was yellow, and the writing was hard to read. It said, "[Follow the water|Count your
  steps]."
- A line of small dots led from {spot} to {wild}. Beside the cross there was a picture of a {tree}.
- "It is a treasure map!" said {friend}. {Hero} was not sure, but {he} wanted to know.

- The next morning they [left|went out] with a spade, a lantern and [some bread|two blankets|a long
  rope]. {Interlude}
- They walked past {spot2} and counted [two|three|five|nine] hundred steps. Then they stood in
  front of a {tree}.
- It took them a whole day to find the place. {Friend} had a blister, but {he2} did not complain.

- They dug until it was dark. Then the spade hit something hard. It was a box!
- {Hiding} there was a tin box, closed with a {colour} ribbon.
- The ground was hard, and there was nothing but stones and roots. {Hero} was about to give up when
  {friend} cried out.

- Inside there was no gold. There was a {keepsake} and a letter from a child who had lived long
  ago.
- In the box lay {number} old coins, a {keepsake} and a drawing of {spot}.
- They opened it {gently}. It was full of seeds, and a note said, "Plant them and wait."

- They put a letter of their own into the box and buried it again for the next one.
- "[That is better than gold|It is a real treasure]," said {hero}, and {he} was {joy}.
- They sold nothing and kept everything, and the map still hangs in the {room}.
- The coins were enough for a new roof for {elder}, and there was cake for everybody.
"""),
    "help for the {trade2}": beats("""
- {One_day} the {trade2} was ill, and there was nobody to do the work.
- {One_day} {hero} met the {trade2} near {spot}. "I am too tired to work," said the {trade2}.
- {One_day} the tools of the {trade2} were stolen, and the whole [village|town] was {sorrow}.

- "[I can do it|Let me try]," said {hero}. "[It cannot be so hard|Show me what to do]."
- {Hero} did not wait. {He} went there {quickly} and asked what {he} could do.
- {Friend} had an idea. "If everyone works for one hour," {he2} said, "everything will be done."

- On the first day {he} did everything wrong and made a terrible mess. {Interlude}
- {Hero} {past_chore} and tried to learn as fast as {he} could.
- The work was hard, and {his} arms were heavy in the evening. But {he} came back the next day.
- {He} got up at [four|five] o'clock, when the sky was still dark, and went to work.

- The {trade2} [watched|sat by the window] and gave {him} advice. "{Saying}."
- {Friend} came too, and later others came, until there were {number} helpers.
- By and by {he} understood how it was done, and {he} even began to like it.

- After {number} days the {trade2} was well again and [looked around in surprise|could not believe
  it].
- At the end of the week everything was finished, and it was better than before.
- "Who did all this?" asked the {trade2}. Nobody answered, but everybody looked at {him}.

- "Take this," said the {trade2} and gave {him} a {keepsake}. {Hero} was {joy}.
- From then on {hero} had a new friend, and {he} knew how hard that work was.
- "One day you will be a {trade2} yourself," they told {him}. {Hero} liked that idea.
- In the evening they all sat near {spot} and ate {food}.
"""),
}

ENDING = beats("""
- And they lived happily ever after.
- And that is how it happened.
- And if you go to {spot} today, you can still hear people tell this story.
- {Hero} never forgot that {season}.
- That night {hero} slept well and dreamed of {spot}.
- And {he} knew now that {saying}.
- Then {hero} went home, for it was late, and {food} was on the table.
- When {he} was very old, {hero} still liked to tell this story.
- Outside one could only hear {sound}, and everything was well.
- The stars came out over {spot}, one after another.
- It was a good day, and {hero} smiled when {he} fell asleep.
-
-
-
""")
