"""English words that are no objects, for the rule-based chunker: closed word classes, and exceptions to its rules.

Any word that is not listed may be an object.
"""

from __future__ import annotations

from localctl.phrases import DETERMINERS as DETERMINERS
from localctl.phrases import NUMBERS as NUMBERS
from localctl.phrases import SINGULAR as SINGULAR
from localctl.phrases import word_set

PRONOUNS = word_set(
    "i you he she it we they me him us them who whom someone somebody nobody something nothing everything anything "
    "everyone itself himself herself themselves myself ourselves mine yours hers ours theirs ones what there here "
    "i'll you'll he'll she'll it'll we'll they'll i'd you'd he'd she'd we'd they'd i've you've we've they've i'm "
    "you're we're they're"
)
PREPOSITIONS = word_set(
    "aboard about above across after against along alongside amid among around as astride at atop away before behind "
    "below beneath beside besides between beyond by down during except far for from in inside into like near nearby "
    "next of off on onto opposite out outside over past per than through throughout to toward towards under "
    "underneath until unto up upon via with within without adjacent close further farther facing"
)
CONJUNCTIONS = word_set("and or but nor so yet while whereas when where which if because although though then not both")
BE = word_set("is are was were be been being am isn't aren't wasn't weren't it's there's that's")
VERBS_AHEAD = word_set(  # words before a verb
    "can could will would shall should may might must do does did don't doesn't didn't cannot can't won't let"
)
HAVE = word_set("has have had having shows showing depicts depicting contains containing features featuring")
ADVERBS = word_set(
    "just very too also only directly immediately slightly exactly now still always never almost quite rather "
    "somewhere together apart again both even straight there here somewhat furthermore overhead underfoot aloft ahead "
    "forward upward upwards downward downwards yesterday today tomorrow enough alone maybe perhaps"
)
DENIALS = word_set(
    "no not without neither nor never minus except excluding isn't aren't wasn't weren't"
)  # the next object is denied
BREAKS = PRONOUNS | PREPOSITIONS | CONJUNCTIONS | BE | VERBS_AHEAD | HAVE | ADVERBS

# Words for places in the image, if they end a phrase: "on the left", "in the top right corner".
PLACES = word_set(
    "left right top bottom side sides front back rear middle center centre corner corners edge background backdrop "
    "foreground distance hand half third part area left-hand right-hand upper lower higher lowest highest topmost "
    "bottommost leftmost rightmost end way other same west east north south "
    "low high first second former latter"
)
# Words for the image itself, if "of", "with" or a verb follows.
PICTURES = word_set(
    "photo photograph picture image drawing painting illustration render rendering sketch scene view shot closeup "
    "close-up portrait snapshot depiction artwork frame canvas"
)
# Adjectives, to continue phrases such as "a red and white ball", "the big, fluffy dog".
ADJECTIVES = word_set(
    "red green blue yellow purple orange cyan pink white black gray grey brown beige silver gold golden violet magenta "
    "turquoise teal maroon navy tan dark light bright pale colorful colourful big small large little tiny huge giant "
    "tall short long wide narrow thin thick fat round square flat old new young ancient modern beautiful pretty cute "
    "ugly shiny dull clean dirty wet dry hot cold warm soft hard smooth rough heavy empty full open closed striped "
    "dotted spotted wooden metal metallic plastic leather happy sad angry nice lovely cozy cosy tired hungry thirsty "
    "sleepy asleep awake silent visible"
)
# Forms of verbs without -ed or -ing.
VERBS = word_set(
    "sit sits sat stand stands stood lie lies lay lain rest rests hang hangs hung float floats fly flies flew lean "
    "leans look looks appear appears seem seems remain remains stay stays wait waits sleep sleeps slept run runs ran "
    "walk walks jump jumps eat eats ate drink drinks drank swim swims swam hold holds held wear wears wore worn ride "
    "rides rode carry carries carried put seen shown drawn found kept set built made left-aligned grow grows grew "
    "hover hovers grazes graze chases chase follows follow watches sees see surrounds faces touches meets holds pulls "
    "drive drives drove driven fell falls rose rises shone shines threw throws swung swings clung clings knelt kneels "
    "leapt leaps bent slung ridden overhung strewn laden borne upheld dangle points talk talks loves lives gave gives "
    "crouches crouch hides hid stretches stares gazes bring brings brought takes took goes went gone come comes came "
    "keeps keep stuck laid spread goes belongs"
)
_REGULAR = word_set(  # regular verbs whose form in -s is hardly ever a plural noun
    "peer gaze glance leer swoop soar glide drift creep hop dive perch kneel squat lounge balance dangle sway loom "
    "lurk bounce climb descend glow hover chug trot gallop stroll wander pose smile bloom sprout crackle spin whir "
    "hum howl sing flap flutter recline slumber snooze doze bask huddle cling sprawl swim wade scamper scurry gleam "
    "shimmer roost nestle teeter loiter sparkle linger stoop crouch hang grin bob tilt"
)
VERBS |= _REGULAR | {verb + ("es" if verb.endswith("ch") else "s") for verb in _REGULAR}
PARTICIPLES = word_set(  # of irregular verbs: "a lamp held above"
    "held put seen shown drawn found kept set built made worn spread laid stuck ridden slung overhung strewn laden "
    "borne upheld hung lain driven"
)
NO_PARTICIPLES = word_set(  # nouns that end like participles or verbs, and a few adjectives
    "building painting ceiling railing clothing wedding evening morning drawing pudding awning earring carving "
    "dwelling bedding topping dressing filling duckling dumpling sapling seedling stocking parking crossing lightning "
    "living dining moped biped hundred naked wicked lens gas canvas atlas chess christmas series species glasses "
    "scissors pants jeans shorts trousers stairs headphones binoculars sunglasses news alps tennis"
)
NO_ADVERBS = word_set("fly butterfly dragonfly firefly lily family jelly belly bully ally doily")
BACKDROPS = word_set(  # seldom what "it" means
    "floor ground wall ceiling sky street road grass sidewalk pavement room field snow water beach sand air yard scene"
)
NO_OBJECTS = word_set(  # nouns for what has no place in the image
    "air morning evening night day dawn dusk noon midnight afternoon sunrise sunset summer winter spring autumn time "
    "times moment year years century way shade atmosphere style touch sense contrast fun luck care law memory story "
    "honest life order total glow beauty surroundings row"
)
PARTS = word_set(
    "shade shadow head top edge foot base shoulder shoulders lap surface tip feet center centre middle bottom back side"
)
STYLES = word_set(  # after a comma or "on", without a determiner: "a fox, oil on canvas"
    "watercolor watercolour oil canvas bokeh lighting light film style art illustration photography photo render "
    "painting sketch detailed 4k 8k cinematic dramatic epic fantasy colors colours realistic hd resolution trending "
    "artstation anime cartoon retro vintage minimalist postcard glowing macro"
)
COMMENTS = word_set("creating adding providing making giving bringing offering ready surveying allowing")
BODY = word_set(
    "foot feet hand hands head heads back lap side sides arm arms shoulder shoulders eye eyes face paw paws leg legs "
    "neck waist chest knees hips"
)  # after "his", "her", "its" or "their"
