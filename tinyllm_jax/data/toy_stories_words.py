"""Words, sentences and plots of the built-in stories, as `toy_stories_grammar.Grammar` reads them.

Rules that keep the corpus what it is:
- every filling of every slot makes sense, so lists that can meet in one sentence share no word;
- what a plot says never depends on the values of variables, only repeats them;
- each plot names each of its variables on every path, or its value could not be read back;
- no option is rarer than 1 in 60 where it stands, so that all are met often in a short training.
The tests hold the grammar to all but the first two, which take a reader.
"""


def listed(words: str) -> tuple[str, ...]:
    """Give the words between the bars."""
    return tuple(words.split("|"))


GIRLS = listed(
    "Anna|Clara|Daisy|Ella|Hazel|Ivy|Lily|Lucy|Mia|Molly|Nora|Poppy|Rosie|Ruby|Sophie|Tilly"
)
BOYS = listed("Ben|Billy|Felix|Finn|Henry|Hugo|Jack|Leo|Max|Milo|Noah|Oscar|Sam|Theo|Toby|Will")


def by_gender(girl: str, boy: str) -> tuple[str, ...]:
    """Give the text of each name's form."""
    return (girl,) * len(GIRLS) + (boy,) * len(BOYS)


# Forms are called by their female text; "him" is the object, since "her" is the possessive.
PEOPLE = {
    "name": GIRLS + BOYS,
    "child": by_gender("girl", "boy"),
    "she": by_gender("she", "he"),
    "She": by_gender("She", "He"),
    "her": by_gender("her", "his"),
    "Her": by_gender("Her", "His"),
    "him": by_gender("her", "him"),
}


def named(names: str) -> dict[str, tuple[str, ...]]:
    """Give a variable that has the one form "name"."""
    return {"name": listed(names)}


VARIABLES = {
    "hero": PEOPLE,
    "friend": PEOPLE,
    "place": named(
        "the park|the beach|the river|the lake|the farm|the market|the castle|the pond|the barn|"
        "the mill|the well|the bridge|the harbor|the school|the orchard|the tower"
    ),
    "toy": named(
        "ball|kite|doll|drum|bell|flute|wand|crown|flag|hoop|whistle|puppet|ribbon|mask|yo-yo|"
        "toy boat|toy train|toy horse|toy bear|paper bird"
    ),
    "food": named(
        "apple pie|berry pie|pumpkin pie|plum pie|carrot cake|honey cake|lemon cake|nut cake|"
        "cherry tart|apple tart|pear tart|berry tart|nut bread|pumpkin bread|honey bread|plum "
        "bread"
    ),
    "plant": named(
        "rose|tulip|turnip|pumpkin|melon|carrot|cabbage|bean plant|apple tree|pear tree|plum "
        "tree|cherry tree|lemon tree|berry bush|rose bush|nut tree"
    ),
    "build": named(
        "boat|ship|wagon|cart|hut|tent|swing|slide|stage|robot|rocket|fort|den|house|train|plane"
    ),
}

DISTINCT = {"friend": "hero"}

PHRASES = {
    # Who
    "trait": "a little|a young|a small|a cheerful|a gentle|a curious|a brave|a clever|a "
    "friendly|a playful|a quiet|a lively|a happy|a shy|a merry|an eager",
    "animal": "rabbit|fox|bear|mouse|frog|squirrel|hedgehog|kitten|puppy|otter|badger|duckling",
    "hero_kind": {"{hero.child}": 1, "<animal>": 2},
    "friend_kind": {"{friend.child}": 1, "<animal>": 2},
    "a_hero": "<trait> <hero_kind> named {hero}",
    "a_friend": "<trait> <friend_kind> named {friend}",
    "relative": "grandmother|grandfather|mother|father|aunt|uncle|sister|brother",
    # When and where
    "one_day": "One [sunny|warm|bright|cool|windy|misty|cloudy|clear|fine|calm] [morning|"
    "afternoon|day|Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday]",
    "soon": "Just then|Soon|After a while|Before long|A little later|At that moment",
    "every": "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday|morning|afternoon|day",
    "number": "two|three|four|five|six|seven|eight|nine",
    "near": "near|close to|behind|beside",
    "somewhere": "the park|the beach|the river|the lake|the farm|the market|the castle|the pond|"
    "the barn|the mill|the well|the bridge|the harbor|the school|the orchard|the tower",
    "under": "a bench|a log|a bush|a leaf|a cart|a table|a boat|a tree",
    "behind": "a rock|a fence|a wall|a hedge|a gate|a shed|a barrel|a wagon",
    "soft_place": "the grass|the hay|the mud|the sand|the leaves|the flowers|a puddle|a basket|"
    "a bucket|a bush|a cart|a barrel",
    # How
    "softly": "softly|kindly|gently|quietly|warmly|shyly|sweetly|calmly",
    "cried": "cried|said|called|cheered|shouted|laughed",
    "walked": "walked|ran|skipped|danced|marched|hurried|raced|hopped",
    "play": "play|sing|dance|paint|read|draw|cook|swim|bake|dig|climb|sew",
    "playing": "playing|singing|dancing|painting|reading|drawing|resting|sleeping",
    "sad": "sad|worried|tired|lonely|cross|silly",
    "calm": "Do not worry|Do not cry|Do not be sad|Do not give up|Be brave|All will be well",
    # Things
    "color": "red|blue|green|yellow|purple|pink|white|brown|black|gray|golden|silver",
    "toy_adj": "red|blue|green|yellow|purple|pink|white|brown|black|gray|golden|silver|tiny|"
    "pretty|shiny|new",
    "flavor": "apple|berry|pumpkin|plum|carrot|honey|lemon|nut|cherry|pear",
    "box": "box|bag|basket|bucket|jar|pot|barrel|chest",
    "hat": "hat|cap|scarf|coat|cape|shirt",
    "things": "shells|stones|buttons|feathers|leaves|marbles|beads|coins|keys|bells|stars|ribbons",
    "sticks": "sticks|stones|boxes|logs|bricks|shells",
    "glue": "rope|string|mud|clay|glue|straw|paint|sand",
}

# Each alternative is one whole sentence, and `toy_stories.split_sentences` must agree: a quotation
# that ends in `!` or `?` is followed by a small letter or by the end of its sentence.
SENTENCES = {
    # Beginnings
    "opening": {
        "Once upon a time, there was <a_hero>.": 3,
        "There once was <a_hero>.": 1,
        "Long ago, in a [green|sunny|faraway|hidden|lovely|pretty|tiny|peaceful] [valley|"
        "village|town|forest], there lived <a_hero>.": 2,
    },
    "home": (
        "{hero.She} lived in a [cozy|neat|round|crooked|tall|bright|warm|pretty] [house|hut|"
        "cabin|tent|cottage|shed] <near> <somewhere>.",
        "{hero.She} always wore a <color> <hat> and <color> [boots|shoes|socks|pants].",
        "{hero.She} loved to [play|sing|dance|paint|read|draw] in the [sun|snow|garden|barn|"
        "park|grass|kitchen|yard] with {hero.her} <relative>.",
        "{hero.She} collected <things> and kept them in a <color> <box>.",
    ),
    "best_friend": "{hero.Her} best friend was <a_friend>, who always wore a <color> <hat>.",
    "meet": "<soon>, <a_friend> [came by|walked past|came along|ran by] in a <color> <hat>.",
    "thanks": '"[Thank you so much|You are wonderful|You are a good friend|How clever you are], '
    '{friend}!" <cried> {hero}.',
    # Endings
    "end_party": "To celebrate, they [shared|had] some <flavor> [pie|cake|bread] and [warm milk|"
    "hot tea|cold juice|cool water].",
    "end_walk": "Then they <walked> home under the [blue sky|pink sky|golden sun|red sun|silver "
    "moon|white moon|bright stars|golden stars|gray clouds|pink clouds|tall trees|green trees], "
    "[laughing|singing|dancing|smiling] all the way.",
    "end_dream": "That night, {hero} [slept well|fell asleep fast|went to bed early] and "
    "dreamed of <number> <color> [ships|dragons|horses|birds|trains|fish|stars|castles].",
    "end_friends": "From that day on, {hero} and {friend} would <play> together every <every>.",
    "end_closer": "They were [better|closer|happier] friends than ever, and they would <play> "
    "together every <every>.",
    # A toy is lost and found
    "lost": "<one_day>, {hero} lost {hero.her} <toy_adj> {toy} <near> {place}.",
    "searched": "{hero.She} looked under <under> and behind <behind>, but it was not there.",
    "wrong": '"[What is wrong|What is the matter|Why are you so sad|Can I help you|What '
    'happened|Are you all right]?" asked {friend} <softly>.',
    "my_toy": '"I [lost|cannot find|miss] my {toy}," [said|cried|sighed|sobbed] {hero}.',
    "found": "They looked [high and low|far and wide|here and there|all around|everywhere], and "
    "[at last|soon] {friend} found it in <soft_place>.",
    "moral_lost": "{hero} learned that [it is good to ask for help|good friends never give up].",
    # A toy is stuck in a tree
    "stuck": "<one_day>, {hero}'s <toy_adj> {toy} got stuck in a [tall|big|crooked|green|thin|"
    "lonely] [oak|pine|apple|cherry|plum|pear|nut|lemon] tree.",
    "tried": "{hero.She} [jumped|hopped|called|climbed] <number> times, but the {toy} [did not "
    "move|stayed there|would not come down].",
    "ladder": '"<calm>," said {friend}, and {friend.she} [got|brought] a [ladder|stick|broom|'
    "rope|rake|net|spoon|pole] from {place}.",
    "came_down": "With a [soft|loud|little|big|happy|funny] [thump|plop|bump|pop], it [fell|"
    "dropped] into <soft_place>.",
    # Something baked is shared
    "baked": "<one_day>, {hero} baked a [big|small|warm|sweet|round|golden|tiny|tall] {food} "
    "with [butter|cream|sugar|jam|milk|seeds].",
    "smell": "The [sweet|warm|lovely|wonderful|good] smell reached {place}, where <a_friend> "
    "was <playing>.",
    "knocked": "{friend} <walked> to {hero}'s house and knocked <number> times on the <color> "
    "door.",
    "may_i": '"May I have a [small|tiny|big|sweet|warm|little] [slice|bite|piece] of your '
    '{food}?" asked {friend} <softly>.',
    "nodded": "{hero} wanted to eat it all, but {friend} looked so [sad|tired|lonely|cold|"
    "hungry|small|sweet|shy] that {hero.she} gave {friend.him} <number> [slices|pieces|bites].",
    "moral_share": "{hero} learned that [food is better with a friend|it is good to share].",
    # Friends caught in the rain
    "outing": "<one_day>, they <walked> to {place} to [pick flowers|fly a kite|feed the birds|"
    "play ball|read a book|draw the clouds|look for snails|have tea|pick berries|sing songs].",
    "clouds": "<soon>, [dark|gray|black|heavy|big|thick] clouds came, and it began to [rain|"
    "pour|storm].",
    "scared": "{friend} [cried|shook|jumped], because {friend.she} was afraid of [thunder|the "
    "dark|the wind|loud sounds|the rain|storms].",
    "comfort": '"[Do not worry|Do not cry|Be brave|All will be well|Stay with me|I am here]," '
    "said {hero}, and {hero.she} held up a <color> [umbrella|blanket|coat|cape|leaf|bag].",
    "shelter": "They [waited|hid|stayed|sat] under <under> and [told stories|sang songs|counted "
    "to ten|ate an apple|played a game|made faces|read a book|drew clouds] until it was over.",
    "rainbow": "Then a [bright|big|lovely|wonderful|tall] rainbow [shone|came out] over "
    "<somewhere>.",
    # A seed grows
    "seed": "<one_day>, {hero} found a [tiny|round|shiny|funny|brown|black|white|golden] seed "
    "<near> {place}.",
    "planted": "{hero.She} planted it in a <color> [pot|bucket|box|barrel|jar|cup] and [watered "
    "it|sang to it|talked to it|read to it] every [morning|afternoon|day|night].",
    "nothing": "For <number> [days|weeks], nothing [happened|grew|came up], and {hero} felt <sad>.",
    "patient": '"[Do not worry|Do not cry|Do not give up|Wait a little longer]," said {friend}, '
    '"because every seed needs [sun|rain|time|love|sleep|water|a song|a friend]."',
    "grew": "At last, a [tiny|green|little|pretty|round|shiny] leaf came up, and by [spring|"
    "summer|fall|winter] it was a [big|small|tall|pretty|lovely|round|strong|fine] {plant}.",
    "moral_seed": "{hero} learned that [good things take time|it is good to wait].",
    # Something is built twice
    "plan": "<one_day>, they wanted to build a [big|tall|tiny|lovely|strong|round|fine|pretty] "
    "{build} <near> {place}.",
    "gathered": "{hero} [brought|carried|found|got] <number> <sticks>, and {friend} [brought|"
    "carried|found|got] some <glue>.",
    "knocked_down": "But then a [strong wind|goat|cow|wheel|storm|ball|pig|sheep] knocked it "
    "[down|over|flat].",
    "oh_no": '"[Oh no|What a mess|How sad|Not again]!" [cried|said|sighed|sobbed] {friend}.',
    "again": '"<calm>," said {hero} <softly>.',
    "stood": "This time they used <number> <sticks> and some <glue>, and it stood as [strong|"
    "tall] as a [tree|giant|bear|horse|castle|tower|mill|bridge].",
    "moral_build": "{hero} learned that [it is good to try again|good friends never give up].",
    # Something found goes back to its owner
    "found_toy": "<one_day>, {hero} found a <toy_adj> {toy} <near> {place}.",
    "honest": "{hero.She} wanted to keep it in {hero.her} <color> <box>, but {hero.she} knew "
    "that [it was not right|someone had lost it|someone was looking for it].",
    "asked": "{hero.She} asked the [baker|farmer|doctor|sailor|king|queen] and the [teacher|"
    "painter|singer|dancer|builder|writer], but they both said no.",
    "saw": "Then {hero.she} saw <a_friend>, who was [looking|sleeping|crying] behind <behind>.",
    "yours": '"Is this your {toy}?" asked {hero} <softly>.',
    "yes": '"Yes, my <relative> [made|found|painted] it for me!" <cried> {friend}.',
    "reward": "To say thank you, {friend} gave {hero} a <color> [feather|button|shell|flower|"
    "stone|bell|spoon|book|blanket|<hat>].",
    "moral_return": "{hero} learned that [it is good to do right|a lost thing should go home].",
    # A birthday present
    "birthday": "<one_day>, {hero} [saw|heard|knew] that it was {friend}'s birthday.",
    "made": "{hero.She} made {friend.him} a [little|tiny|pretty|lovely|big|shiny] {toy} and "
    "painted <number> <color> [stars|flowers|moons|birds|fish|leaves] on it.",
    "wrapped": "{hero.She} put it in a <color> [box|bag|basket] with a <color> bow and took it "
    "to {place}, where {friend} was <playing>.",
    "unwrapped": "{friend} opened it [slowly|quickly|quietly|gently] and [jumped|danced|laughed|"
    "hopped|sang] for joy.",
    "best_gift": '"[This is the best gift ever|I love it so much|You are wonderful|I always '
    'wanted one|You are a good friend]!" <cried> {friend}.',
    "moral_gift": "{hero} learned that [the best gifts come from the heart|it is good to give].",
    # A quarrel
    "both": "<one_day>, they found a <toy_adj> {toy} <near> {place}, and they both wanted it.",
    "mine": '"I [saw it first|found it|ran faster|picked it up|asked for it|was here first]!" '
    "[shouted|cried|called|said] {hero}.",
    "no_mine": '"But I [need it more|love it more|saw it too|have no toys|am smaller|always '
    'wanted one]!" [shouted|cried|called|said] {friend}.',
    "tugged": "They pulled so [hard|fast|long] that the {toy} [flew|fell|dropped] into "
    "<soft_place>.",
    "peace": '{hero} felt [sad|bad|sorry|silly] and said, "[Let us take turns|We can share it|'
    'You can have it first|I am sorry|You are my friend]."',
    "turns": "They washed it with [warm water|soap|a sock|a leaf], and each had it for <number> "
    "[hours|days|weeks].",
    "moral_turns": "{hero} learned that [it is good to share|a friend is better than a toy].",
    # A journey
    "set_off": "<one_day>, they left for {place} in a <color> [boat|wagon|balloon|cart|sled|"
    "train|bus|ship].",
    "packed": "{hero} brought <number> [apples|carrots|cakes|plums|pears|nuts|pies|tarts], and "
    "{friend} brought a [map|tent|rope|net|drum|clock|blanket|book].",
    "passed": "On the way, they saw <number> [goats|cows|pigs|ducks|sheep|horses|birds|cats] "
    "<playing> behind <behind>.",
    "are_we": '"[Are we lost|Is it far|Are we there yet|Do you know the way|Is this the way]?" '
    "asked {friend} <softly>.",
    "i_see": '"Look, I can see {place}!" <cried> {hero}.',
    "treasure": "There they found a [big|tiny|heavy|lovely|round|strong] <box> full of <color> "
    "<things>.",
    "moral_trip": "{hero} learned that [a long way is short with a friend|it is good to keep "
    "going].",
}

PLOTS = {
    "lost": "<opening> <home> <lost> <searched> <meet> <wrong> <my_toy> <found> [<thanks>|"
    "<end_party>|<end_walk>|<end_dream>|<end_friends>|<moral_lost>]",
    "stuck": "<opening> <home> <stuck> <tried> <meet> <ladder> <came_down> [<thanks>|"
    "<end_party>|<end_walk>|<end_dream>|<end_friends>]",
    "share": "<opening> <home> <baked> <smell> <knocked> <may_i> <nodded> [<end_dream>|"
    "<end_friends>|<moral_share>]",
    "rain": "<opening> <best_friend> <outing> <clouds> <scared> <comfort> <shelter> <rainbow> "
    "[<end_party>|<end_walk>|<end_dream>|<end_closer>]",
    "seed": "<opening> <home> <seed> <planted> <nothing> <meet> <patient> <grew> [<end_party>|"
    "<end_dream>|<end_friends>|<moral_seed>]",
    "build": "<opening> <best_friend> <plan> <gathered> <knocked_down> <oh_no> <again> <stood> "
    "[<end_party>|<end_walk>|<end_dream>|<end_closer>|<moral_build>]",
    "return": "<opening> <home> <found_toy> <honest> <asked> <saw> <yours> <yes> [<reward>|"
    "<end_walk>|<end_dream>|<end_friends>|<moral_return>]",
    "gift": "<opening> <best_friend> <birthday> <made> <wrapped> <unwrapped> <best_gift> "
    "[<end_party>|<end_walk>|<end_dream>|<end_closer>|<moral_gift>]",
    "quarrel": "<opening> <best_friend> <both> <mine> <no_mine> <tugged> <peace> <turns> "
    "[<end_walk>|<end_dream>|<end_closer>|<moral_turns>]",
    "trip": "<opening> <best_friend> <set_off> <packed> <passed> <are_we> <i_see> <treasure> "
    "[<end_party>|<end_walk>|<end_dream>|<end_closer>|<moral_trip>]",
}
